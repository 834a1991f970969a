#!/usr/bin/env python3
"""Draws what build/collapse --every wrote: neural collapse along a run, or along several, side by
side.

    build/collapse runs/drop --every 500 --train 'data/train_*.bin' --csv drop.csv
    scripts/plot_collapse.py drop.csv base.csv --out collapse        collapse.png and collapse.svg

A panel for each number, a line for each file; where collapse has an ideal value, a thin line marks
it.
"""
import argparse
import csv
import math
import os

from plot import COLORS, LINES, MARKS, out_files, save
from runs import fail

# column: title, the value that collapse ends at (None: it has none), whether the axis is
# logarithmic
PANELS = {
    "cdnv": ("NC1: within-class variance / squared distance", None, True),
    "norm_cov": ("NC2: variation of the norms", 0, False),
    "etf_error": ("NC2: error from a simplex", 0, False),
    "log_kernel_var": ("GNC2: variance of the log kernel", 0, False),
    "duality": ("NC3: cosine of head and class mean", 1, False),
    "duality_var": ("UNC3: its variance", 0, False),
    "agreement": ("NC4: head and nearest mean agree", 1, False),
    "coverage": ("share of the tokens in these classes", None, False),
}


def read(path):
    """The columns of a file as {name: [numbers]}, by step; what is missing is NaN."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"cannot read {path}: {error}")
    if not rows or "step" not in rows[0] or "cdnv" not in rows[0]:
        fail(f"{path}: not what build/collapse --csv writes")
    try:
        columns = {name: [float("nan" if row[name] == "" else row[name]) for row in rows]
                   for name in ["step", *PANELS]}
    except (KeyError, TypeError, ValueError):
        fail(f"{path}: a column is missing or damaged\n  hint: write it again: build/collapse "
             f"--csv")
    if any(math.isnan(step) for step in columns["step"]):
        fail(f"{path}: a checkpoint without a step\n  hint: build/collapse RUN --every N")
    return columns


def draw(files, plt):
    shown = [name for name in PANELS if any(math.isfinite(v) for columns in files.values()
                                            for v in columns[name])]
    wide = min(4, len(shown))
    figure, axes = plt.subplots(-(-len(shown) // wide), wide, squeeze=False, layout="constrained",
                                figsize=(3.2 * wide, 2.5 * -(-len(shown) // wide)))
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown):
        title, ideal, logarithmic = PANELS[name]
        for i, (path, columns) in enumerate(files.items()):
            axis.plot(columns["step"], columns[name], LINES[i % len(LINES)],
                      color=COLORS[i % len(COLORS)],
                      marker=MARKS[i % len(MARKS)], markersize=3, linewidth=1.2,
                      label=os.path.splitext(os.path.basename(path))[0])
        if ideal is not None:
            axis.axhline(ideal, color="0.7", linewidth=0.8, zorder=0)
        if logarithmic:
            axis.set_yscale("log")
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("optimizer steps", fontsize=8)
    if len(files) > 1:
        axes.flat[0].legend(fontsize=7)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+",
                        help="what build/collapse --csv has written")
    parser.add_argument("--out", default="collapse",
                        help="file: .png, .svg or .pdf; without an ending .png and .svg (default "
                        "collapse)")
    options = parser.parse_args()
    files = {path: read(path) for path in options.files}
    outputs = out_files(options.out)
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        fail("matplotlib is missing: python3 -m pip install matplotlib")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "droppath.c", "font.size": 9})
    figure = draw(files, plt)
    for path in outputs:
        save(figure, path)
    print(f"wrote {', '.join(outputs)}")


if __name__ == "__main__":
    main()
