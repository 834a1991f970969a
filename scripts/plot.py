#!/usr/bin/env python3
"""Draws curves of any set of runs from their metrics.jsonl.

    scripts/plot.py runs/base runs/drop                                  training loss (lines) and validation loss (marks)
    scripts/plot.py runs/* --x flops --y val_loss --out loss.svg         the same loss for less compute?
    scripts/plot.py runs/drop --y tok_per_s --smooth 50 --out speed.png

A RUN is a directory with metrics.jsonl, or such a file. Needs matplotlib.
"""
import argparse
import json
import math
import os
import sys

X_LABELS = {
    "steps": "optimizer steps",
    "tokens": "tokens",
    "flops": "executed FLOPs",
    "seconds": "training time without evaluation (s)",
}
Y_LABELS = {
    "loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "val_ppl": "validation perplexity (per token)",
    "val_bpb": "validation loss (bits per byte)",
    "grad_norm": "gradient norm before clipping",
    "drop_p": "drop rate of the last layer",
    "flops_fraction": "executed FLOPs / full FLOPs",
    "tok_per_s": "tokens per second",
    "lr": "learning rate",
}
LINES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3))]
MARKS = ["o", "s", "^", "D", "v", "x", "P"]


def fail(message):
    sys.exit(f"error: {message}")


def read_records(path):
    """The objects of a metrics.jsonl. Only its last line may be cut off: the run may still be writing, or have died."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        fail(f"cannot read {path}: {getattr(e, 'strerror', None) or e}")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number < len(lines):
                fail(f"{path}:{number}: not JSON")
            print(f"warning: {path}:{number}: the last line is cut off, left out", file=sys.stderr)
            break
        if not isinstance(record, dict):
            fail(f"{path}:{number}: not a JSON object")
        records.append(record)
    if not records:
        fail(f"{path}: no records")
    return records


def number_of(record, key, path, number):
    """The number under that key; None when it is absent or null, as val_* are between evaluations."""
    value = record.get(key)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    fail(f"{path}:{number}: {key} is {value!r}, not a number")


def read_curve(path, records, x, y):
    """Points (x, y) of the records that have y. The axes flops and seconds add up what each step has spent."""
    key, unit = {"steps": ("step", 1), "tokens": ("tokens", 1), "flops": ("flops", 1), "seconds": ("ms", 1e-3)}[x]
    xs, ys, total = [], [], 0.0
    for number, record in enumerate(records, 1):
        at, value = number_of(record, key, path, number), number_of(record, y, path, number)
        if at is None:
            fail(f"{path}:{number}: {key} is missing")
        total += at * unit
        if value is not None:
            xs.append(total if x in ("flops", "seconds") else at)
            ys.append(value)
    return xs, ys


def smoothed(values, n):
    """The mean of each value and the up to n-1 before it; what is not finite is left out of the mean."""
    result = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i + 1 - n):i + 1] if math.isfinite(v)]
        result.append(sum(window) / len(window) if window else math.nan)
    return result


def run_names(runs):
    """The directory's name, or the whole path where two runs share it."""
    short = [os.path.basename(os.path.normpath(run)) for run in runs]
    return [name if short.count(name) == 1 else run for name, run in zip(short, runs)]


def draw_run(axes, i, name, path, options):
    """Draws one run; returns how many points it has."""
    records = read_records(path)
    style = {"color": f"C{i % 10}", "linestyle": LINES[i % len(LINES)]}
    mark = {"marker": MARKS[i % len(MARKS)], "markersize": 5, "markerfacecolor": "white"}
    points = 0
    for y in [options.y] if options.y else ["loss", "val_loss"]:
        xs, ys = read_curve(path, records, options.x, y)
        points += len(xs)
        if not xs:
            continue
        if y.startswith("val_"):                        # few points: every one is marked, none is smoothed
            label = f"{name}, validation" if not options.y else name
            axes.plot(xs, ys, label=label, linewidth=1.2, **style, **mark)
        else:
            label = f"{name}, training" if not options.y else name
            every = max(1, len(xs) // 8)
            marks = mark if options.y else {}           # beside validation marks, training is a plain thin line
            axes.plot(xs, smoothed(ys, options.smooth), label=label, linewidth=0.8, markevery=(i % every, every), **style,
                      **marks)
    return points


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directory with metrics.jsonl, or the file")
    parser.add_argument("--x", choices=X_LABELS, default="steps")
    parser.add_argument("--y", choices=Y_LABELS, help="default: loss and val_loss")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="mean over N steps (default 1; not for val_*)")
    parser.add_argument("--out", default="plot.png", help="the extension picks the format: png, svg, pdf (default plot.png)")
    options = parser.parse_args()
    if options.smooth < 1:
        fail("--smooth must be at least 1")
    if os.path.splitext(options.out)[1] not in (".png", ".svg", ".pdf"):
        fail(f"--out {options.out}: the name must end in .png, .svg or .pdf")
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        fail("matplotlib is missing: python3 -m pip install matplotlib")

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points = 0
    for i, (run, name) in enumerate(zip(options.runs, run_names(options.runs))):
        path = os.path.join(run, "metrics.jsonl") if os.path.isdir(run) else run
        points += draw_run(axes, i, name, path, options)
    if not points:
        fail(f"no run has {options.y or 'loss or val_loss'}")
    axes.set_xlabel(X_LABELS[options.x])
    axes.set_ylabel(Y_LABELS[options.y] if options.y else "loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(options.out, dpi=150)
    except OSError as e:
        fail(f"cannot write {options.out}: {e.strerror}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
