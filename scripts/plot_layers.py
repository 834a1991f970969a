#!/usr/bin/env python3
"""Draws what build/layers --json has written: which layers a model can do without.

    scripts/plot_layers.py layers.json                  layers.png and .svg beside it
    scripts/plot_layers.py layers.json --out picture    picture.png and .svg

Panels: what the loss gains by each layer and branch, with two standard errors; how far each span of
layers turns the stream; Block Influence and the relative sizes of branches; the loss of the first
layers alone and after greedy removals; and, where the training run was read too, what dropping cost
there.
"""
import argparse
import json
import math
import os

import script_errors  # noqa: F401  how errors end

# Okabe and Ito: told apart by all eyes
BLACK, RED, BLUE, GREEN = "black", "#d55e00", "#0072b2", "#009e73"
BRANCHES = {"attn": ("attention", RED), "mlp": ("MLP", BLUE)}


def number(x):
    return math.nan if x is None else x


def column(rows, *keys):
    """Of each row the number under these keys; NaN for null."""
    out = []
    for row in rows:
        for key in keys:
            row = row[key]
        out.append(number(row))
    return out


def draw_ablation(axes, data):
    layers = data["layers"]
    for k, (name, keys, color) in enumerate([("layer", (), BLACK),
                                             *((t, (b,), c) for b, (t, c) in BRANCHES.items())]):
        cost, error = column(layers, *keys, "ablation"), column(layers, *keys, "ablation_error")
        if all(map(math.isnan, cost)):
            continue
        bars = [0 if math.isnan(e) else 2 * e for e in error]
        axes.bar([l + .27 * (k - 1) for l in range(len(cost))], cost, .25, yerr=bars, color=color,
                 label=name, error_kw={"lw": .8})
    axes.axhline(0, color="gray", lw=.6)
    axes.set(xlabel="without this layer or branch", ylabel="loss gained (nats per token)")
    if min(column(layers, "ablation")) > 0:
        axes.set_yscale("symlog", linthresh=max(1e-4, min(column(layers, "ablation"))))
    axes.legend(frameon=False)


def draw_angles(axes, data):
    import numpy as np
    L = len(data["layers"])
    grid = np.full((L, L), np.nan)
    for l, row in enumerate(data["angular"]):
        grid[:len(row), l] = list(map(number, row))
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis",
                        extent=(-.5, L - .5, .5, L + .5))
    for n in range(1, L):
        axes.plot(int(np.nanargmin(grid[n - 1])), n, "wo", ms=3)
    axes.set(xlabel="first layer of the span", ylabel="layers of the span")
    axes.set_title("angular distance; dots: the least", fontsize=9)
    axes.figure.colorbar(image, ax=axes)


def draw_sizes(axes, data):
    layers = data["layers"]
    x = range(len(layers))
    axes.plot(x, column(layers, "block_influence"), "o-", color=BLACK, label="Block Influence")
    for branch, (title, color) in BRANCHES.items():
        size = column(layers, branch, "relative_size")
        if not all(map(math.isnan, size)):
            axes.plot(x, size, "s--", ms=4, color=color, label=f"|{title}| / |x|")
    axes.set(xlabel="layer", yscale="log")
    axes.legend(frameon=False)


def draw_depth(axes, data):
    L = len(data["layers"])
    exits = column(data["layers"], "exit_loss")
    if not all(map(math.isnan, exits)):
        axes.plot(range(1, L + 1), exits, "o-", color=BLACK, label="the first layers alone")
    if data["greedy"]:
        steps = [(L, data["loss"]), *((L - 1 - k, number(s["loss"])) for k,
                                      s in enumerate(data["greedy"]))]
        axes.plot(*zip(*steps), "s-", ms=4, color=GREEN, label="greedy removal")
        for (x, y), step in zip(steps[1:], data["greedy"]):
            axes.annotate(f"-{step['layer']}", (x, y), textcoords="offset points", xytext=(3, -9),
                          fontsize=7, color=GREEN)
    axes.set(xlabel="layers that run", ylabel="loss (nats per token)")
    axes.legend(frameon=False)


def draw_effects(axes, data):
    for branch, (title, color) in {**BRANCHES, "both": ("block", BLACK)}.items():
        units = [u for u in data["effects"]["units"] if u["branch"] == branch
                 and u["effect"] is not None]
        if units:
            axes.errorbar([u["layer"] + (.1 if branch == "mlp" else -.1) for u in units],
                          [u["effect"] for u in units],
                          [2 * u["error"] for u in units], fmt="o", ms=4, color=color, label=title)
    axes.axhline(0, color="gray", lw=.6)
    axes.set(xlabel="layer", ylabel="effect of dropping in training,\nminus the mean of all")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    else:
        axes.text(.5, .5, "not identified", transform=axes.transAxes, ha="center")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="what build/layers --json has written")
    parser.add_argument("--out", help="picture without its ending; if not given, beside the file")
    arguments = parser.parse_args()
    with open(arguments.file, encoding="utf-8") as file:
        data = json.load(file)
    if not isinstance(data, dict) or "angular" not in data:
        raise SystemExit(f"error: {arguments.file} is not what build/layers --json writes")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [draw_ablation, draw_angles, draw_sizes, draw_depth,
              *([draw_effects] if "effects" in data else [])]
    plt.rcParams["font.size"] = 8
    figure, axes = plt.subplots((len(panels) + 1) // 2, 2,
                                figsize=(10, 3.4 * ((len(panels) + 1) // 2)), layout="constrained")
    for panel, place in zip(panels, axes.flat):
        panel(place, data)
    for place in axes.flat[len(panels):]:
        place.axis("off")
    figure.suptitle(f"{data['checkpoint']}: loss {data['loss']:.4f}")
    out = arguments.out or os.path.splitext(arguments.file)[0]
    for kind in ("png", "svg"):
        figure.savefig(f"{out}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)
    print(f"wrote {out}.png and {out}.svg")


if __name__ == "__main__":
    main()
