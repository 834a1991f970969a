#!/usr/bin/env python3
"""Draws runs from their metrics.jsonl: curves, and with --heat maps of what drop path dropped.

    scripts/plot.py runs/base runs/drop       losses, perplexity, gradients, speed, drops: plot.png
                                              and plot.svg
    scripts/plot.py runs --x steps,flops --y val_loss --out loss.svg
                                              the same loss for less compute?
    scripts/plot.py runs --by drop-path       final results, against an option in which runs differ
    scripts/plot.py runs --table              final results as a table; this needs no matplotlib
    scripts/plot.py --study runs/studies/quick/report.json     what build/study has found

A RUN is a folder with metrics.jsonl, such a file, or a folder of runs. Runs that differ only by
seed are drawn as one: their mean, with the range from the lowest to the highest as a band.
"""
import argparse
import functools
import json
import math
import os
import re
import statistics
import zlib

from runs import Run, fail, find_runs, group_name, group_runs, note, run_names

X_LABELS = {
    "steps": "optimizer steps",
    "tokens": "tokens",
    "flops": "executed FLOPs",
    "seconds": "training time without evaluation (s)",
}
Y_LABELS = {
    "losses": "loss (nats per token)",                  # training as a thin line, validation with
                                                        # markers
    "loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "val_ppl": "validation perplexity (per token)",
    "val_bpb": "validation loss (bits per byte)",
    "val_prefix": "validation loss of the first layers\n(nats per token)",      # --eval-depths
    "val_even": "validation loss of evenly spaced layers\n(nats per token)",
    "grad_norm": "gradient norm before clipping",
    "drop_p": "drop rate of the last layer",
    "kept_attn": "attention branches that ran",
    "kept_mlp": "MLP branches that ran",
    "flops_fraction": "executed FLOPs / full FLOPs",
    "tok_per_s": "tokens per second",
    "mfu": "FLOPs per second / measured peak",
    "peak_bytes": "peak memory (bytes)",
    "lr": "learning rate",
    "layers": "layers that exist",
}
DEFAULT_Y = "losses,val_ppl,grad_norm,tok_per_s"
# Okabe and Ito: colour-blind safe
COLORS = ["black", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9"]
LINES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1))]
MARKS = ["o", "s", "^", "D", "v", "x", "P", "*"]
MOST_POINTS, USUAL_POINTS = 2000, 100                   # points per curve: the most, and the usual
                                                        # number
ARMS = ["none", "drop", "drop_flops"]                   # of compare: these have fixed colors
# by degrees of freedom, from 1
T95 = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622]
COLUMNS = 48                                            # of a heat map: from this number to twice
                                                        # as many
INSIDE = 0.97                                           # fraction of a curve's points; the highest
                                                        # may be clipped


# ---- What was dropped: (columns, L, 2), from the plans of the steps ----

def kept_of_plan(plan, record, np):
    """The fraction of the step's rows that ran each branch (L,2); format: drop_plan_write in
    dev/model/drop_path.h."""
    micro = plan.split(" ")
    if "." not in plan:                                 # one digit per layer: bit 0 attention, bit
                                                        # 1 MLP
        digits = np.array([list(m.encode()) for m in micro]) - ord("0")
        return np.stack([digits & 1, digits >> 1 & 1], axis=-1).mean(axis=0)
    rows = np.array([[bin(int(row, 16)).count("1") for row in m.split(".")]
                     for m in micro]).sum(axis=0).reshape(-1, 2)
    for branch, key in enumerate(("kept_attn", "kept_mlp")):
        if rows[:, branch].any() and record.get(key):   # the number of rows follows from the
                                                        # fraction kept
            return rows / (rows[:, branch].mean() / record[key])
    return rows * 0.0


class KeptMap:
    """Means of kept_of_plan over bins of steps, whose width doubles as the run grows, so memory is
    bounded."""

    def __init__(self, np):
        self.np, self.sums, self.width, self.inside, self.first, self.last = np, [], 1, 0, None, 0

    def look(self, record):
        plan = record.get("plan")
        if not plan:
            return
        try:
            kept = kept_of_plan(plan, record, self.np)
            # --grow: layers that did not exist were not run
            if self.sums and len(kept) > len(self.sums[0]):
                self.sums = [self.np.pad(s, ((0, len(kept) - len(s)), (0, 0))) for s in self.sums]
            if self.sums and kept.shape != self.sums[0].shape:
                raise ValueError
        except (ValueError, AttributeError):
            fail(f"step {record['step']}: plan {str(plan)[:40]!r} is not one of this run")
        if self.inside == 0:
            if len(self.sums) == 2 * COLUMNS:
                self.sums = [a + b for a, b in zip(self.sums[::2], self.sums[1::2])]
                self.width *= 2
            self.sums.append(0 * kept)
        self.sums[-1] = self.sums[-1] + kept
        self.inside = (self.inside + 1) % self.width
        self.first, self.last = record["step"] if self.first is None else self.first, record["step"]

    def dropped(self):
        """(columns, L, 2), or None if nothing was dropped."""
        if not self.sums:
            return None
        counts = [self.width] * (len(self.sums) - 1) + [self.inside or self.width]
        dropped = 1 - self.np.stack([s / n for s, n in zip(self.sums, counts)])
        return dropped if dropped.max() > 1e-9 else None


def depths(config, layers):
    """D(l) for l = 1..L (--drop-depth in dev/DROP_PATH.md); None if the options are unknown."""
    span = max(1, layers - 1)
    rule = {"linear": lambda l: l / layers, "linear0": lambda l: (l - 1) / span,
            "uniform": lambda l: 1.0,
            "alternate": lambda l: float(l % 2 == 0),
            "exp": lambda l: 2 ** ((l - 1) / span) - 1}.get(config.get("drop-depth"))
    found = rule and [rule(l) if layers > 1 else 1.0 for l in range(1, layers + 1)]
    rates = [float(rate) for rate in config.get("drop-rates", "").strip('"').split(",") if rate]
    if rates:
        found = [rate / (max(rates) or 1) for rate in rates]
    protected = config.get("drop-protect", "none").split(",")
    if found and "first" in protected:
        found[0] = 0.0
    if found and "last" in protected:
        found[-1] = 0.0
    return found


def draw_heat(part, run, kept, np, plt):
    """Three maps of a run, layers by steps: the drop rate from the options, and what was dropped of
    each branch."""
    dropped = kept.dropped()
    layers = dropped.shape[1]
    maps = [("attention dropped", dropped[:, :, 0]), ("MLP dropped", dropped[:, :, 1])]
    depth = depths(run.config, layers)
    if depth and not run.config.get("drop-replay", '""').strip('"'):
        rates = np.nan_to_num(np.array(run.column("drop_p")))
        rates = np.array([part.mean() for part in np.array_split(rates,
            min(len(rates), len(dropped)))])
        maps.insert(0, ("drop rate p(layer, step)", rates[:, None] * np.array(depth)[None, :]))
    part.suptitle(f"{run.name}: what was dropped, in bins of {kept.width} "
                  f"step{'s' * (kept.width > 1)}", fontsize=10)
    axes = part.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    top = max(float(values.max()) for _, values in maps)
    for ax, (title, values) in zip(axes, maps):
        image = ax.imshow(values.T, cmap="Greys", vmin=0, vmax=top or 1, origin="lower",
                          aspect="auto",
                          interpolation="nearest", extent=(kept.first - 1, kept.last, 0.5,
                                                           layers + 0.5))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(X_LABELS["steps"])
        ax.yaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=8))
    axes[0].set_ylabel("layer")
    part.colorbar(image, ax=list(axes), label="fraction dropped")


# ---- Curves ----

def bins(values, width, harmonic=False):
    """Means over bins of `width` values. For speeds the harmonic mean: all tokens of a bin by all
    its seconds."""
    parts = [[v for v in values[i:i + width] if math.isfinite(v)] for i in range(0, len(values),
        width)]
    mean = statistics.harmonic_mean if harmonic else statistics.fmean
    return [mean(part) if part else math.nan for part in parts]


def read_curve(run, x, y):
    """{step: (x, y)} for the steps that have y. The axes flops and seconds are cumulative."""
    key, unit = {"steps": ("step", 1), "tokens": ("tokens", 1), "flops": ("flops", 1),
                 "seconds": ("ms", 1e-3)}[x]
    total, curve = 0.0, {}
    for step, at, value in zip(run.column("step"), run.column(key), run.column(y)):
        if not math.isfinite(at):
            fail(f"{run.path}: step {step:.0f}: {key} is missing")
        total += at * unit
        if math.isfinite(value):
            curve[step] = total if x in ("flops", "seconds") else at, value
    return curve


def read_group(group, x, y, smooth):
    """xs and, per run, ys of a group over the steps that all its runs have; and the number of steps
    per point."""
    curves = [read_curve(run, x, y) for run in group]
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    sparse = y.startswith("val_")                       # few points: all are drawn
    width = max(1 if sparse else smooth or math.ceil(len(steps) / USUAL_POINTS),
                math.ceil(len(steps) / MOST_POINTS))
    xs = bins([statistics.fmean(c[s][0] for c in curves) for s in steps], width)
    return xs, [bins([c[s][1] for s in steps], width, y == "tok_per_s") for c in curves], width


def drops_nothing(group):
    try:
        return float(group[0].config["drop-path"]) == 0 and not group[0].config.get("drop-replay",
            "").strip('"')
    except (KeyError, ValueError):
        return False


def baseline(groups):
    """The baseline for differences: the first group that drops nothing or, if all drop, the first
    group."""
    return next((g for g in groups if drops_nothing(g)), groups[0])


def styles(groups):
    """(color, line, marker) of each group, chosen by name, so that an arm looks the same in every
    plot. Black drops nothing."""
    chosen = []
    for group in groups:
        name = group_name(group)
        code = ARMS.index(name) - 1 if name in ARMS[1:] else zlib.crc32(name.encode())
        color, line = 1 + code % (len(COLORS) - 1), code % len(LINES)
        if drops_nothing(group):
            color, line = 0, 0
        while (color, line) in [c[:2] for c in chosen] and len(chosen) < len(LINES):
            line = (line + 1) % len(LINES)
        chosen.append((color, line, (color + line) % len(MARKS)))
    return [(COLORS[c], LINES[n], MARKS[m]) for c, n, m in chosen]


def draw_curve(ax, i, look, xs, runs, marks, thin):
    style = {"color": look[0], "linestyle": look[1]}
    mark = {"marker": look[2], "markersize": 5, "markerfacecolor": "white"} if marks else {}
    if marks and len(xs) > 12:
        every = len(xs) // 8
        mark["markevery"] = (i * every // 8, every)     # stagger the markers of different runs
    mean = [statistics.fmean(values) for values in zip(*runs)]
    ax.plot(xs, mean, linewidth=0.8 if thin else 1.3, **style, **mark)
    if len(runs) > 1:
        low, high = [min(values) for values in zip(*runs)], [max(values) for values in zip(*runs)]
        ax.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return mean


def growths(group, x):
    """Where on the axis x the runs of a group get more layers (--grow), and how many."""
    run = group[0]
    curve, layers = read_curve(run, x, "layers"), run.column("layers")
    steps = [(step, now) for step, before, now in zip(run.column("step")[1:], layers, layers[1:])
             if now > before]
    return [(curve[step][0], int(now)) for step, now in steps]


def draw_labels(ax, ends):
    """Names at the right end of their curves; ends = [(y, name)], spread out where they would
    overlap."""
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log"
    place = (lambda y: math.log(y / low) / math.log(high / low)) if log else (lambda y: (y - low) /
        (high - low))
    # of a text line, in axes units
    height = 9 / (ax.get_window_extent().height * 72 / ax.figure.dpi)
    below = -1.0
    for at, name in sorted((min(1.0, max(0.0, place(y))), name) for y, name in ends):
        below = max(at, below + height)
        ax.annotate(name, (1, below), xycoords="axes fraction", xytext=(3, 0),
                    textcoords="offset points", fontsize=7,
                    va="center", annotation_clip=False)


def panel_keys(group, y):
    """The columns that a panel draws of a group: for depths, the whole model and each share."""
    if y == "losses":
        return ["loss", "val_loss"]
    if y not in ("val_prefix", "val_even"):
        return [y]
    shares = [key for key in group[0].columns if re.fullmatch(y + r"_[0-9.e-]+", key)]
    return ["val_loss"] * bool(shares) + sorted(shares, key=lambda k: -float(k[len(y) + 1:]))


def draw_panel(ax, groups, x, y, smooth):
    """Draws one pair of axes; returns the labels' ends, to be placed once the layout is known."""
    ends, widths, lows, tops = {}, set(), [], []
    looks = styles(groups)
    for i, group in enumerate(groups):
        for key in panel_keys(group, y):
            xs, runs, width = read_group(group, x, key, smooth)
            if not xs:
                continue
            thin = key != y and key != "val_loss"       # beside the curve that counts
            share = f" {float(key[len(y) + 1:]):.3g}" if key.startswith(y + "_") else ""
            end = draw_curve(ax, i, looks[i], xs, runs, not thin or bool(share), thin)[-1]
            ends[i, share] = end, group_name(group) + share
            values = sorted(v for run in runs for v in run)
            lows.append(values[0])
            tops.append(values[int((1 if key.startswith("val_") else INSIDE) * (len(values) - 1))])
            if not key.startswith("val_"):
                widths.add(width)
        for at, layers in growths(group, x) if any(k == i for k, _ in ends) else ():
            ax.axvline(at, color=looks[i][0], linestyle=":", linewidth=0.8)
            ax.annotate(f"{layers} layers", (at, 1), xycoords=("data", "axes fraction"),
                        xytext=(2, -9),
                        textcoords="offset points", fontsize=7, color=looks[i][0])
    if not ends:
        ax.text(0.5, 0.5, f"no run has {y}", ha="center", transform=ax.transAxes)
    elif y in ("val_ppl", "grad_norm") and min(lows) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if ax.get_ylim()[1] < 9 *
                                     ax.get_ylim()[0] else "")
    elif y in ("losses", "loss", "val_loss", "val_bpb", "val_prefix", "val_even"):
        span = max(tops) - min(lows) or 1
        ax.set_ylim(min(lows) - 0.05 * span, max(tops) + 0.05 * span)
    elif y == "tok_per_s":
        ax.set_ylim(0, 1.1 * max(tops))
    means = f"\nmeans of {max(widths)} steps" if widths and max(widths) > 1 else ""
    ax.set_ylabel(Y_LABELS[y] + means)
    ax.set_xlabel(X_LABELS[x])
    ax.grid(alpha=0.3)
    ax.tick_params(axis="both", which="both", labelsize=8)
    return list(ends.values())


def draw_legend(part, groups, plt):
    handles = []
    for group, (color, line, mark) in zip(groups, styles(groups)):
        label = group_name(group) + (f" ({len(group)} seeds: mean, range)" if len(group) > 1
                                     else "")
        handles.append(plt.Line2D([], [], color=color, linestyle=line, label=label, marker=mark,
                                  markerfacecolor="white"))
    part.legend(handles=handles, loc="outside upper center", ncols=min(3, len(handles)), fontsize=9)


def draw_runs(groups, kept, options, np, plt):
    """The whole figure: curves above, heat maps below."""
    panels = [(x, y) for y in options.y for x in options.x]
    columns = len(options.x) if len(options.x) > 1 else min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    hot = [g[0] for g in groups if kept[g[0]].dropped() is not None]
    if len(hot) > options.heat and options.heat:
        note(f"heat maps of the first {options.heat} of {len(hot)} runs with drop path: --heat "
             f"{len(hot)} draws all")
    hot = hot[:options.heat]
    heights = [3.2 * rows] + [2.6] * len(hot)
    figure = plt.figure(figsize=(5.2 * max(columns, 1 + (len(panels) == 1)), sum(heights)),
                        layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(rows, columns, squeeze=False).flat
    ends = [draw_panel(ax, groups, x, y, options.smooth) for ax, (x, y) in zip(axes, panels)]
    for ax in list(axes)[len(panels):]:
        ax.set_visible(False)
    draw_legend(parts[0], groups, plt)
    for part, run in zip(parts[1:], hot):
        draw_heat(part, run, kept[run], np, plt)
    figure.draw_without_rendering()
    for ax, e in zip(parts[0].axes, ends):
        draw_labels(ax, e)
    return figure


# ---- Final results ----

ENDS = {                                                # title, and its value for a run
    "steps": ("steps", lambda r: r.last("step")),
    "tokens": ("tokens", lambda r: r.last("tokens")),
    "flops": ("FLOPs executed", lambda r: math.fsum(v for v in r.column("flops")
        if math.isfinite(v))),
    "val_loss": ("validation loss", lambda r: r.last("val_loss")),
    "val_ppl": ("perplexity", lambda r: r.last("val_ppl")),
    "seconds": ("seconds", lambda r: math.fsum(v for v in r.column("ms") if math.isfinite(v)) /
                1000),
}


def mean_sd(values, form):
    mean = statistics.fmean(values)
    if math.isnan(mean):
        return "n/a"
    return format(mean, form) + (f" (sd {statistics.stdev(values):{form}})" if len(values) > 1
                                 else "")


def t_95(freedom):
    """Half the width of a 95% interval in standard errors; beyond the table by the Cornish-Fisher
    expansion."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def paired(group, base):
    """The loss of each seed minus the baseline's with the same seed: mean and 95% t-interval."""
    losses = {run.config.get("seed", ""): run.last("val_loss") for run in base}
    both = [run.last("val_loss") - losses.get(run.config.get("seed", ""), math.nan)
            for run in group]
    both = [d for d in both if math.isfinite(d)]
    if group is base or not both:
        return ""
    error = f" ± {t_95(len(both) - 1) * statistics.stdev(both) / math.sqrt(len(both)):.4f}" if len(
        both) > 1 else ""
    return f"{statistics.fmean(both):+.4f}{error}"


def print_table(groups):
    base = baseline(groups)
    rows = [["runs", "seeds", "steps", "tokens", "FLOPs", "validation loss", "perplexity",
             "seconds",
             f"loss minus {group_name(base)}'s, by seed (± 95% t-interval)"]]
    for group in groups:
        ends = {key: [number(run) for run in group] for key, (_, number) in ENDS.items()}
        mean = {key: statistics.fmean(values) for key, values in ends.items()}
        rows.append([group_name(group), str(len(group)), f"{mean['steps']:.0f}",
                     f"{mean['tokens']:.4g}",
                     f"{mean['flops']:.4g}", mean_sd(ends["val_loss"], ".4f"),
                     mean_sd(ends["val_ppl"], ".3f"),
                     f"{mean['seconds']:.1f}", paired(group, base)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for i, row in enumerate(rows):
        cells = [c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths))]
        print("| " + " | ".join(cells) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 1) + ("-" if k == 0 else ":") for k,
                                 w in enumerate(widths)) + "|")


def number_or_fail(run, name):
    try:
        return float(run.config[name].rstrip("%"))
    except (KeyError, ValueError):
        return fail(f"--by {name}: {run.path} has no number with that name in its config.txt")


def draw_ends(runs, by, plt):
    """Final validation loss and FLOPs of each run against an option; one line per set of runs that
    are otherwise alike."""
    lines = group_runs(runs, {by})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, key in zip(axes, ("val_loss", "flops")):
        for i, line in enumerate(lines):
            at = {}
            for run in line:
                at.setdefault(number_or_fail(run, by), []).append(ENDS[key][1](run))
            xs = sorted(at)
            color = COLORS[i % len(COLORS)]
            ax.plot(xs, [statistics.fmean(at[x]) for x in xs], color=color,
                    linestyle=LINES[i % len(LINES)],
                    label="mean" if len(lines) == 1 else f"mean of {line[0].name}, ...")
            ax.plot([x for x in xs for _ in at[x]], [v for x in xs for v in at[x]], linestyle="",
                    color=color,
                    marker=MARKS[i % len(MARKS)], markerfacecolor="white", label="runs")
        ax.set_xlabel(f"--{by}")
        ax.set_ylabel("total FLOPs executed" if key == "flops"
                      else "final validation loss (nats per token)")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


# ---- A study: report.json of build/study ----

def read_study(path):
    try:
        with open(path, encoding="utf-8") as file:
            study = json.load(file)
    except (OSError, ValueError) as e:
        fail(f"cannot read {path}: {e}")
    if not isinstance(study, dict) or study.get("format") != "droppath.c study 1":
        fail(f"{path}: not a report.json of build/study")
    return study


def draw_differences(ax, study, others):
    """Each arm minus the baseline: a mark for each seed, a thick line for the t-interval, a thin
    one for the bootstrap's."""
    for row, arm in enumerate(reversed(others)):
        color = COLORS[1 + (len(others) - 1 - row) % (len(COLORS) - 1)]
        if arm["difference"] is None:
            continue
        ax.plot(arm["differences"], [row + 0.18] * len(arm["differences"]), "o", color=color,
                markersize=3, markerfacecolor="white")
        for kind, at, width in (("t", 0, 2.2), ("bootstrap", -0.15, 0.8)):
            ends = [arm[f"{kind}_low"], arm[f"{kind}_high"]]
            if None not in ends:
                ax.plot(ends, [row + at] * 2, "-", color=color, linewidth=width)
        ax.plot([arm["difference"]], [row], "D", color=color, markersize=5)
    ax.axvline(0, color="black", linewidth=0.8)
    if study["margin"] is not None:
        ax.axvspan(-study["margin"], study["margin"], color="black", alpha=0.08, linewidth=0)
    ax.set_yticks(range(len(others)), [arm["name"] for arm in reversed(others)])
    ax.set_ylim(-0.6, len(others) - 0.4)
    ax.set_xlabel(f"{study['endpoint']} minus {study['baseline']}'s, by seed\n"
                  "95% intervals: thick by t, thin by bootstrap; grey: equivalent")


def draw_tuning(ax, study):
    """The means of tuning along each arm's first grid: the lowest over the others."""
    for i, arm in enumerate(study["arms"]):
        at = {}
        for place, mean in arm["tuning"]:
            first = place.split(" ")[0].partition("=")[2]
            at[first] = min(mean, at.get(first, mean))
        try:
            xs = sorted(at, key=lambda x: float(x.rstrip("%")))
            ax.plot([float(x.rstrip("%")) for x in xs], [at[x] for x in xs],
                    color=COLORS[i % len(COLORS)], linestyle=LINES[i % len(LINES)],
                    marker=MARKS[i % len(MARKS)], markerfacecolor="white", label=arm["name"])
        except ValueError:                              # words of a choice have no order
            continue
    names = {place.split("=")[0] for arm in study["arms"] for place, _ in arm["tuning"]}
    ax.set_xlabel(f"tuned: --{', '.join(sorted(names)) or 'nothing'}")
    ax.set_ylabel(study["endpoint"])
    if names and ax.get_xlim()[0] > 0:
        ax.set_xscale("log")
    if names:
        ax.legend(fontsize=7)


def draw_budgets(ax, study):
    """Loss against FLOPs: the baseline's own budgets as a line, the other arms as marks."""
    points = [point for point in zip(study["budget_flops"], study["budget_losses"])
              if None not in point]
    ax.plot([f for f, _ in points], [v for _, v in points], color="black", marker="o",
            markerfacecolor="white", label=study["baseline"])
    others = [arm for arm in study["arms"]
              if arm["name"] != study["baseline"] and arm["mean"] is not None]
    for i, arm in enumerate(others):
        ax.plot([arm["flops"]], [arm["mean"]], linestyle="",
                color=COLORS[1 + i % (len(COLORS) - 1)],
                marker=MARKS[(1 + i) % len(MARKS)], label=arm["name"])
    ax.set_xscale("log")
    ax.set_xlabel(X_LABELS["flops"])
    ax.set_ylabel(study["endpoint"])
    ax.legend(fontsize=7)


def draw_depths(ax, study, kept):
    """Loss against the share of the layers that is kept, the full depth last."""
    for i, arm in enumerate(study["arms"]):
        points = [(cell["share"], cell["mean"], cell["sd"]) for cell in arm["depths"]
                  if cell["kept"] == kept and cell["mean"] is not None]
        if not points or arm["mean"] is None:
            continue
        points.append((1, arm["mean"], arm["sd"]))
        ax.errorbar([x for x, _, _ in points], [m for _, m, _ in points],
                    yerr=[sd or 0 for _, _, sd in points], color=COLORS[i % len(COLORS)],
                    linestyle=LINES[i % len(LINES)], marker=MARKS[i % len(MARKS)],
                    markerfacecolor="white", capsize=2, label=arm["name"])
    ax.set_xlabel({"prefix": "share of the layers: the first ones",
                   "even": "share of the layers: evenly spaced"}[kept] + " (bars: sd)")
    ax.set_ylabel("val_loss")
    ax.legend(fontsize=7)


def draw_removed(ax, study):
    """Loss against the share of the layers that is left when those that cost least are removed."""
    for i, arm in enumerate(study["arms"]):
        uses = {use["of"]: use for use in arm.get("uses", [])}
        points = [(1 - share, uses[name]["mean"], uses[name]["sd"])
                  for name, share in (("removed_0.5", 0.5), ("removed_0.25", 0.25), ("loss", 0))
                  if uses.get(name, {}).get("mean") is not None]
        if not points:
            continue
        ax.errorbar([x for x, _, _ in points], [m for _, m, _ in points],
                    yerr=[sd or 0 for _, _, sd in points], color=COLORS[i % len(COLORS)],
                    linestyle=LINES[i % len(LINES)], marker=MARKS[i % len(MARKS)],
                    markerfacecolor="white", capsize=2, label=arm["name"])
    ax.set_xlabel("share of the layers: those that cost least removed (bars: sd)")
    ax.set_ylabel("val_loss")
    ax.legend(fontsize=7)


def draw_study(study, plt):
    others = [arm for arm in study["arms"] if arm["name"] != study["baseline"]]
    kinds = [kept for kept in ("prefix", "even")
             if study["endpoint"] == "val_loss" and any(
                 cell["kept"] == kept for arm in study["arms"] for cell in arm.get("depths", []))]
    lower = [functools.partial(draw_depths, kept=kept) for kept in kinds]
    if any(use["mean"] is not None for arm in study["arms"] for use in arm.get("uses", [])):
        lower.append(draw_removed)
    rows = 1 + bool(lower)
    figure, axes = plt.subplots(rows, 3, squeeze=False, layout="constrained",
                                figsize=(15, rows * max(4, 1.5 + 0.4 * len(others))))
    axes = axes.flat
    for ax, draw in zip(axes[3:], lower):
        draw(ax, study)
    for ax in axes[3 + len(lower):]:
        ax.set_visible(False)
    draw_differences(axes[0], study, others)
    draw_tuning(axes[1], study)
    draw_budgets(axes[2], study)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.tick_params(axis="both", which="both", labelsize=8)
    return figure


# ---- Options and files ----

def names(choices):
    def convert(text):
        chosen = text.split(",")
        for name in chosen:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(choices)}")
        return chosen
    return convert


def at_least(least):
    def convert(text):
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)
    return convert


def out_files(out):
    ending = os.path.splitext(out)[1]
    if ending in (".png", ".svg", ".pdf"):
        return [out]
    if re.fullmatch(r"\.[A-Za-z]+", ending):
        fail(f"--out {out}: the name must end in .png, .svg or .pdf, or have no extension for .png "
             f"and .svg")
    return [out + ".png", out + ".svg"]


def save(figure, path):
    """Saves a figure atomically: it gets its name when it is complete."""
    part = f"{path}.part"
    try:
        figure.savefig(part, dpi=150, format=path[-3:], metadata={"Date": None}
                       if path.endswith(".svg") else None)
        os.replace(part, path)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a folder with metrics.jsonl, the file itself, or a "
        "folder of runs")
    add("--x", type=names(X_LABELS), default=["steps"], metavar="X,...",
        help=f"{', '.join(X_LABELS)} (default steps)")
    add("--y", type=names(Y_LABELS), default=DEFAULT_Y.split(","), metavar="Y,...",
        help=f"{', '.join(Y_LABELS)} (default {DEFAULT_Y})")
    add("--smooth", type=at_least(1), metavar="N",
        help="each point is the mean of N steps (default: so that about "
        f"{USUAL_POINTS} points remain; never for validation)")
    add("--heat", type=at_least(0), default=0, metavar="N",
        help="maps of what was dropped, for the first N runs with "
        "drop path (default 0: none; of a group, the first seed)")
    add("--by", metavar="OPTION", help="draw the final results against this option, such as "
        "drop-path")
    add("--table", action="store_true", help="print the final results, and draw nothing")
    add("--study", action="store_true", help="RUN is the report.json of build/study")
    add("--out", default="plot", help="file: .png, .svg or .pdf; without an extension .png and "
        ".svg (default plot)")
    options = parser.parse_args()
    study = read_study(options.runs[0]) if options.study else None
    found = [] if study else find_runs(options.runs)
    if not found and not study:
        fail(f"{' '.join(options.runs)}: no run found\n"
             "  hint: a run is a folder with metrics.jsonl: the --out of train_gpt")
    if options.table:
        print_table(group_runs([Run(run, name) for run, name in zip(found, run_names(found))]))
        return
    files = out_files(options.out)
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import numpy as np
    except ImportError:
        fail("matplotlib is missing: python3 -m pip install matplotlib\n  hint: --table works "
             "without it")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "droppath.c", "font.size": 9})
    if study:
        figure = draw_study(study, plt)
        for path in files:
            save(figure, path)
        print(f"wrote {', '.join(files)}")
        return
    kept, runs = {}, []
    for path, name in zip(found, run_names(found)):
        heat = KeptMap(np)
        runs.append(Run(path, name, heat.look if options.heat and not options.by else None))
        kept[runs[-1]] = heat
    figure = draw_ends(runs, options.by, plt) if options.by else draw_runs(group_runs(runs), kept,
        options, np, plt)
    for path in files:
        save(figure, path)
    print(f"wrote {', '.join(files)}")


if __name__ == "__main__":
    main()
