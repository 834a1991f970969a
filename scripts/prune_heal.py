#!/usr/bin/env python3
"""What prune_heal.sh needs besides the programs: the remaining layers, the table, the picture.

    scripts/prune_heal.py ways SCORES.json REMOVE       NAME=LAYERS for each removal to evaluate
    scripts/prune_heal.py table OUT REMOVE ARM...       the table; the standard library alone
    scripts/prune_heal.py costs OUT REMOVE ARM...       loss recovered against tokens and seconds
    scripts/prune_heal.py picture OUT REMOVE ARM...     OUT/loss_by_layers.png, .svg (matplotlib)

Losses come from the JSON files that build/evaluate wrote to OUT/curve.
"""
import glob
import json
import math
import os
import random
import re
import statistics
import sys

import script_errors  # noqa: F401  how errors end
from runs import Run

MODELS = {"none": "no drop path", "drop_flops": "drop path, equal FLOPs"}
COLORS = {"none": "black", "drop_flops": "#d55e00"}
RANDOM = 10                                             # sets of layers that are removed at random,
                                                        # per model
HEALED = {"full": "all of it trained on", "last": "its last layers trained on",
          "lora": "adapters trained on it",
          "whole": "nothing removed, trained on as long"}
# by degrees of freedom, from 1
T95 = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622]


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def ways(scores, remove):
    """Greedy for 1 .. 2 remove layers, the row of the least angle, random sets: name and the layers
    that stay."""
    layers = len(scores["layers"])
    order = [step["layer"] for step in scores["greedy"]]
    yield from ((f"greedy_{k}", order[:k]) for k in range(1, len(order) + 1))
    start = min(range(layers - remove + 1), key=lambda l: scores["angular"][l][remove - 1])
    yield f"angular_{remove}", range(start, start + remove)
    for i in range(RANDOM):
        yield f"random_{remove}_{i}", random.Random(i).sample(range(layers), remove)


def losses(out, model, pattern, depth):
    """By seed, the mean of the losses in the files of that pattern."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(out), "curve", f"{model}_s*_{pattern}.json")):
        seed = re.fullmatch(rf"{model}_s(\d+)_.*", os.path.basename(path)).group(1)
        found.setdefault(int(seed), []).append(read(path)[depth]["val_loss"])
    return {seed: statistics.fmean(x) for seed, x in sorted(found.items())}


def rows(out, remove, arms):
    """Title and by model the losses by seed."""
    parts = [("all layers", "greedy_1", "full")]
    parts += [(f"{remove} removed, {what}", f"{name}_{remove}{more}", "reduced") for what, name,
              more in
              (("greedily", "greedy", ""), ("in a row, by angle", "angular", ""),
               (f"at random (mean of {RANDOM})", "random", "_*"))]
    parts += [(f"{remove} removed greedily, {HEALED.get(arm, arm)}", f"heal_{arm}", "full")
              for arm in arms]
    parts.append((HEALED["whole"], "heal_whole", "full"))
    for title, pattern, depth in parts:
        yield title, {model: losses(out, model, pattern, depth) for model in MODELS}


def mean_text(values):
    x = list(values)
    return "-" if not x else f"{x[0]:.4f}" if len(
        x) == 1 else f"{statistics.fmean(x):.4f} ± {statistics.stdev(x):.4f}"


def difference_text(a, b):
    """b - a, paired by seed, with half the width of the 95 % interval by Student's t."""
    x = [b[seed] - a[seed] for seed in a if seed in b]
    if len(x) < 2:
        return f"{x[0]:+.4f}" if x else "-"
    half = T95[min(len(x), 10) - 2] * statistics.stdev(x) / len(x) ** 0.5
    return f"{statistics.fmean(x):+.4f} ± {half:.4f}"


def print_table(head, body):
    width = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    for i, row in enumerate([head, *body]):
        print("| " + " | ".join(x.ljust(w) if k == 0 else x.rjust(w) for k,
                                (x, w) in enumerate(zip(row, width))) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k,
                                 w in enumerate(width)) + "|")


def healing(out, model, arm):
    """By seed, the evaluations of a healing run: tokens, seconds of its steps, validation loss."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(out), "heal", f"{model}_s*_{arm}")):
        seed = int(re.fullmatch(rf"{model}_s(\d+)_.*", os.path.basename(path)).group(1))
        run, seconds = Run(path, arm), 0.0
        points = []
        for tokens, ms, loss in zip(run.column("tokens"), run.column("ms"),
                                    run.column("val_loss")):
            seconds += ms / 1000
            if math.isfinite(loss):
                points.append((tokens, seconds, loss))
        found[seed] = points
    return found


def costs(out, remove, arms):
    """What removal costs, and how much of that each arm has made good after so many tokens and
    seconds: means over the seeds that have an evaluation there."""
    head = ["loss recovered, nats (seconds)"]
    body, columns = [], []
    runs = {(model, arm): healing(out, model, arm)
            for model in MODELS for arm in [*arms, "whole"]}
    for points in (p for by in runs.values() for p in by.values()):
        columns += [tokens for tokens, _, _ in points if tokens not in columns]
    columns.sort()
    head += [f"{tokens:,.0f} tokens" for tokens in columns] + ["of what removal cost"]
    for model, title in MODELS.items():
        whole = losses(out, model, "greedy_1", "full")
        pruned = losses(out, model, "pruned", "full")
        lost = {seed: pruned[seed] - whole[seed] for seed in pruned if seed in whole}
        for arm in [*arms, "whole"]:
            before = whole if arm == "whole" else pruned          # what training alone gives
            cells, last = [], {}
            for at in columns:
                gained, spent = [], []
                for seed, points in runs[model, arm].items():
                    for tokens, seconds, loss in points:
                        if tokens == at and seed in lost:
                            gained.append(before[seed] - loss)
                            spent.append(seconds)
                            last[seed] = gained[-1]
                cells.append(f"{statistics.fmean(gained):+.4f} ({statistics.fmean(spent):.1f})"
                             if gained else "-")
            share = statistics.fmean(last.values()) / statistics.fmean(
                lost[seed] for seed in last) if last else math.nan
            body.append([f"{title}, {HEALED.get(arm, arm)}", *cells,
                         f"{100 * share:.0f} % of {statistics.fmean(lost.values()):.4f}"
                         if last else "-"])
    print_table(head, body)


def table(out, remove, arms):
    head = ["validation loss (nats per token)", *MODELS.values(), "difference (95 %)"]
    body = [[title, *(mean_text(by[m].values()) for m in MODELS), difference_text(by["none"],
        by["drop_flops"])]
            for title, by in rows(out, remove, arms)]
    whole = {m: losses(out, m, "greedy_1", "full") for m in MODELS}
    for name, pattern, depth in (("greedy removal costs", f"greedy_{remove}", "reduced"),):
        cost = {m: {s: x - whole[m][s] for s, x in losses(out, m, pattern, depth).items()}
                for m in MODELS}
        body.append([name, *(mean_text(cost[m].values()) for m in MODELS),
                     difference_text(cost["none"], cost["drop_flops"])])
    print_table(head, body)


def picture(out, remove, arms):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    marks = dict(zip([*arms, "whole"], "osD^v"))
    for model, title in MODELS.items():
        curve = {0: losses(out, model, "greedy_1", "full")}
        while losses(out, model, f"greedy_{len(curve)}", "reduced"):
            curve[len(curve)] = losses(out, model, f"greedy_{len(curve)}", "reduced")
        x = sorted(curve)
        axes.plot(x, [statistics.fmean(curve[k].values()) for k in x], color=COLORS[model],
                  label=title)
        axes.fill_between(x, [min(curve[k].values()) for k in x],
                          [max(curve[k].values()) for k in x], color=COLORS[model], alpha=.15)
        for arm in arms:
            healed = losses(out, model, f"heal_{arm}", "full")
            if healed:
                axes.plot([remove], [statistics.fmean(healed.values())], marks[arm],
                          color=COLORS[model], fillstyle="none",
                          label=f"{title}: {HEALED.get(arm, arm)}")
    axes.set_xlabel("layers removed, greedily")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=.3)
    for kind in ("png", "svg"):
        path = os.path.join(out, f"loss_by_layers.{kind}")
        figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    print(f"wrote {path[:-4]}.png and .svg")


def main():
    command, path, remove, *arms = sys.argv[1:] if len(sys.argv) > 3 else ["", "", 0]
    if command == "ways":
        scores = read(path)
        for name, gone in ways(scores, int(remove)):
            print(f"{name}=" + ",".join(str(l) for l in range(len(scores["layers"]))
                                        if l not in gone))
    elif command in ("table", "costs", "picture"):
        {"table": table, "costs": costs, "picture": picture}[command](path, int(remove), arms)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
