#!/usr/bin/env python3
"""The table and the picture of layerskip.sh.

    scripts/layerskip.py table OUT EXIT       the table; the standard library alone
    scripts/layerskip.py picture OUT EXIT     OUT/loss_by_exit.png, .svg (matplotlib)

Losses come from the JSON files that build/layers wrote to OUT/scores, speeds and acceptance from
what build/generate said, in OUT/text. A speed-up is the median over the rounds, in which plain and
speculative decoding took turns.
"""
import glob
import json
import os
import re
import statistics
import sys

import script_errors  # noqa: F401  how errors end

ARMS = {"none": "plain", "drop": "drop path", "exits": "exits", "both": "both (LayerSkip)"}
COLORS = {"none": "black", "drop": "#d55e00", "exits": "#0072b2", "both": "#009e73"}
SPEED = re.compile(r"text \d+ tokens at ([\d.]+) per second")
DRAFTS = re.compile(r"drafts: \d+ by (\d+) layers, ([\d.]+)% accepted; ([\d.]+) tokens a round")


def losses(out, arm):
    """By seed, the loss after 1, 2, ... layers; the last one is the model's."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(out), "scores", f"{arm}_s*.json")):
        seed = int(re.fullmatch(rf"{arm}_s(\d+)\.json", os.path.basename(path)).group(1))
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        found[seed] = [layer["exit_loss"] for layer in report["layers"]]
    return dict(sorted(found.items()))


def said(out, arm, seed, way):
    path = os.path.join(out, "text", f"{arm}_s{seed}_{way}.log")
    if not os.path.exists(path):
        return "", []
    with open(path, encoding="utf-8") as file:
        text = file.read()
    return text, [float(x) for x in SPEED.findall(text)]


def text_of(values, digits):
    x = list(values)
    if not x:
        return "-"
    mean = f"{statistics.fmean(x):.{digits}f}"
    return mean if len(x) == 1 else f"{mean} ± {statistics.stdev(x):.{digits}f}"


def speed_rows(out, seeds):
    """The rows of the table that are about speed: title and by arm a text."""
    plain, rows = {}, []
    for arm in ARMS:
        plain[arm] = [statistics.median(speed) for seed in seeds[arm]
                      if (speed := said(out, arm, seed, "plain")[1])]
    rows.append(("plain decoding, bytes per second",
                 {arm: text_of(plain[arm], 0) for arm in ARMS}))
    for way, title in (("fixed", "fixed exit"), ("auto", "--exit-layer auto")):
        accepted, tokens, ups, chosen = ({arm: [] for arm in ARMS} for _ in range(4))
        for arm in ARMS:
            for seed in seeds[arm]:
                text, fast = said(out, arm, seed, way)
                slow = said(out, arm, seed, "plain")[1]
                if fast and slow:
                    ups[arm].append(statistics.median(b / a for a, b in zip(slow, fast)))
                if drafts := DRAFTS.findall(text):
                    chosen[arm].append(drafts[-1][0])
                    accepted[arm].append(float(drafts[-1][1]))
                    tokens[arm].append(float(drafts[-1][2]))
        rows.append((f"{title}: layers that draft",
                     {arm: ", ".join(chosen[arm]) or "none" for arm in ARMS}))
        rows.append((f"{title}: drafts accepted, %",
                     {arm: text_of(accepted[arm], 1) for arm in ARMS}))
        rows.append((f"{title}: bytes per round", {arm: text_of(tokens[arm], 2) for arm in ARMS}))
        rows.append((f"{title}: speed-up, paired", {arm: text_of(ups[arm], 2) for arm in ARMS}))
    return rows


def table(out, exit_layer):
    by = {arm: losses(out, arm) for arm in ARMS}
    depth = max((len(x) for seeds in by.values() for x in seeds.values()), default=0)
    if not depth:
        sys.exit(f"error: no losses in {out}/scores")
    body = []
    for layers in sorted({2, exit_layer, depth // 2, 2 * depth // 3, depth - 2, depth}):
        if 1 <= layers <= depth:
            body.append((f"loss after {layers} of {depth} layers",
                         {arm: text_of((x[layers - 1] for x in by[arm].values()), 4)
                          for arm in ARMS}))
    body += speed_rows(out, by)
    seeds = max(len(x) for x in by.values())
    head = [f"mean of {seeds} seed" + "s" * (seeds != 1), *ARMS.values()]
    rows = [head, *([title, *values.values()] for title, values in body)]
    width = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(x.ljust(w) if k == 0 else x.rjust(w) for k,
                                (x, w) in enumerate(zip(row, width))) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k,
                                 w in enumerate(width)) + "|")


def picture(out, exit_layer):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, title in ARMS.items():
        seeds = list(losses(out, arm).values())
        if not seeds:
            continue
        x = range(1, len(seeds[0]) + 1)
        axes.plot(x, [statistics.fmean(s[k - 1] for s in seeds) for k in x], color=COLORS[arm],
                  label=title)
        axes.fill_between(x, [min(s[k - 1] for s in seeds) for k in x],
                          [max(s[k - 1] for s in seeds) for k in x], color=COLORS[arm], alpha=.15)
    axes.axvline(exit_layer, color="gray", linewidth=.8, linestyle=":")
    axes.set_xlabel("layers run before the loss is read")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 6))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=.3)
    for kind in ("png", "svg"):
        path = os.path.join(out, f"loss_by_exit.{kind}")
        figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    print(f"wrote {path[:-4]}.png and .svg")


def main():
    command, path, layers = sys.argv[1:] if len(sys.argv) == 4 else ["", "", ""]
    if command in ("table", "picture") and layers.isdigit():
        {"table": table, "picture": picture}[command](path, int(layers))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
