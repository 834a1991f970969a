#!/usr/bin/env python3
"""What companions.sh needs besides the programs: the table.

    scripts/companions.py BUILD OUT DATA ARM...     the standard library alone

Runs are the final ones of the study in OUT/study, which keeps them; losses on both texts come from
BUILD/evaluate, entropies and seconds from each run's metrics.jsonl.
"""
import glob
import json
import os
import statistics
import subprocess
import sys

import script_errors  # noqa: F401  how errors end

NAMES = {"none": "nothing", "dropout": "dropout 0.1", "smoothing": "label smoothing 0.1",
         "hard": "AttentionDrop, hard", "blur": "AttentionDrop, blurred",
         "rdrop": "dropout 0.1, consistency", "hardtwins": "AttentionDrop, consistency",
         "distill": "distillation", "align": "attention of a teacher"}
MARKS = (("smoothing", "label-smoothing"), ("distill", "distill"), ("align", "align"),
         ("dropout", "dropout-embd"))                   # the options that tell these arms
FIRST_SEED = 1001                                       # of a study's final runs
# by degrees of freedom, from 1
T95 = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622]


def losses(build, out, data, run, side):
    """The mean loss of a run's last checkpoint on the train or val shards; kept in a file."""
    path = os.path.join(out, "losses", f"{os.path.basename(run)}_{side}.json")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        subprocess.run([os.path.join(build, "evaluate"), os.path.join(run, "latest"), "--val",
                        os.path.join(data, f"{side}_*.bin"), "--json", path], check=True,
                       stdout=subprocess.DEVNULL)
    with open(path, encoding="utf-8") as file:
        return json.load(file)["full"]["val_loss"]


def arm_of(options):
    """The arm of companions.sh that a result's options are of."""
    o = dict(word.split("=", 1) for word in options.split())
    scores, twins = o.get("attentiondrop"), "consistency" in o
    if scores == "hard" and twins:
        arm = "hardtwins"
    elif twins:
        arm = "rdrop"
    elif scores in ("hard", "blur"):
        arm = scores
    else:
        arm = next((arm for arm, option in MARKS if option in o), "none")
    return arm + ("_drop" if "drop-path" in o else "")


def results(out):
    """Final runs by arm and seed: the folder of each. Tuning runs have seeds of their own."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(out), "study", "results", "*.json")):
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        run = os.path.join(out, "study", "runs", result["key"])
        if result["status"] == "ok" and result["seed"] >= FIRST_SEED and os.path.isdir(run):
            found.setdefault(arm_of(result["options"]), {})[result["seed"]] = run
    return found


def last(run):
    """The last record, and the median seconds of a step."""
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return records[-1], statistics.median(r["ms"] for r in records) / 1000


def interval(values):
    half = T95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5 if 1 < len(
        values) < 11 else float("nan")
    return f"{statistics.fmean(values):+.4f} ± {half:.4f}"


def main(build, out, data, *arms):
    runs = results(out)
    rows = []
    for drop in "", "_drop":
        for arm in arms:
            own = runs.get(arm + drop, {})
            val = {seed: losses(build, out, data, run, "val") for seed, run in own.items()}
            if not own:
                continue
            base = {seed: losses(build, out, data, run, "val")
                    for seed, run in runs.get("none" + drop, {}).items()}
            gap = [val[seed] - losses(build, out, data, run, "train") for seed, run in own.items()]
            ends = [last(run) for run in own.values()]
            apart = [val[seed] - base[seed] for seed in val if seed in base]
            name = NAMES.get(arm, arm) + (" + drop path" if drop else "")
            rows.append((name, f"{ends[0][0]['step']:.0f}", f"{statistics.fmean(val.values()):.4f}",
                         "" if arm == "none" else interval(apart), f"{statistics.fmean(gap):+.4f}",
                         f"{statistics.fmean(e['attn_entropy'] for e, _ in ends):.3f}",
                         f"{1000 * statistics.fmean(s for _, s in ends):.1f}"))
    print("| | steps | val loss | less that of nothing, 95% | val - train | entropy | ms a step |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
