"""Shared by plot.py and tensorboard.py: reads a run's folder as train_gpt leaves it. Uses only the
standard library.

metrics.jsonl has one object per optimizer step (dev/run/metrics.h), config.txt the options as
`name = value` (dev/run/options.h).
"""
import json
import math
import os
import re
import sys
from array import array

import script_errors  # noqa: F401  # no exception escapes as a traceback

# Options in which runs of one experiment may differ without preventing the averaging of their
# steps.
SAME_EXPERIMENT = {"seed", "out", "threads", "resume", "save-every", "keep", "log-every",
                   "sample-every",
                   "sample-tokens", "prompt"}


def fail(message):
    sys.exit(f"error: {message}")


def note(message):
    print(f"note: {message}", file=sys.stderr, flush=True)


def metrics_path(run):
    """The path of a RUN argument's records: a folder with metrics.jsonl, or such a file."""
    return os.path.join(run,
                        "metrics.jsonl") if os.path.isdir(run) or not os.path.exists(run) else run


def find_runs(arguments):
    """The runs named by the arguments, each once; a folder without metrics.jsonl stands for the
    runs in it, sorted by name."""
    found = []
    for argument in arguments:
        if os.path.isdir(argument) and not os.path.exists(metrics_path(argument)):
            inside = [os.path.join(argument, name) for name in sorted(os.listdir(argument))]
            found += [run for run in inside if os.path.isdir(run)
                      and os.path.exists(metrics_path(run))]
        else:
            found.append(argument)
    return list({os.path.realpath(run): run for run in found}.values())


def run_names(runs):
    """The folder's name, or the whole path if two runs share it."""
    short = [os.path.basename(os.path.dirname(os.path.abspath(metrics_path(run)))) for run in runs]
    return [name if short.count(name) == 1 else run for name, run in zip(short, runs)]


def read_config(run):
    """The options in config.txt, as strings; empty if there is none."""
    config = {}
    try:
        with open(os.path.join(os.path.dirname(metrics_path(run)), "config.txt"),
                  encoding="utf-8-sig") as file:
            for line in file:
                name, equals, value = line.partition("=")
                if equals and not line.startswith("#"):
                    config[name.strip()] = value.strip()
    except (OSError, UnicodeDecodeError):
        pass
    return config


def parse_record(line):
    """The object on a line of metrics.jsonl; raises ValueError with what is wrong."""
    record = json.loads(line)
    if not isinstance(record, dict) or not is_number(record.get("step")):
        raise ValueError("not the record of a step")
    return record


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def records(path):
    """Yields the objects of a metrics.jsonl. Its end may be damaged: the run is still writing, or
    has died."""
    last, bad, good = -math.inf, None, False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = parse_record(line)
                except ValueError:                      # not JSON, not UTF-8, not a record
                    bad = bad or number
                    continue
                if bad:
                    fail(f"{path}:{bad}: not a record of a step, but not the file's end either")
                if record["step"] <= last:
                    fail(f"{path}:{number}: step {record['step']} after step {last}")
                last, good = record["step"], True
                yield record
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}\n"
             "  hint: a run is train_gpt's --out folder, or its metrics.jsonl")
    if not good:
        fail(f"{path}: no records yet")
    if bad:
        note(f"{path}:{bad}: the end of the file is cut off or damaged; ignored")


class Run:
    """A run's values as columns of doubles, NaN if a step has none. `look` is called with every
    record."""

    def __init__(self, run, name, look=None):
        self.path, self.name, self.config = metrics_path(run), name, read_config(run)
        self.columns = {}
        for n, record in enumerate(records(self.path)):
            for key, value in record.items():
                if key not in self.columns and (is_number(value) or value is None):
                    self.columns[key] = array("d", [math.nan]) * n
            for key, column in self.columns.items():
                value = record.get(key)
                if value is not None and not is_number(value):
                    fail(f"{self.path}:{n + 1}: {key} is {value!r}, not a number")
                column.append(math.nan if value is None else value)
            if look:
                look(record)

    def column(self, key):
        return self.columns.get(key) or array("d", [math.nan]) * len(self.columns["step"])

    def last(self, key):
        """The last value under that key; NaN if there is none."""
        return next((v for v in reversed(self.column(key)) if math.isfinite(v)), math.nan)


def group_runs(runs, ignored=()):
    """Lists of runs that differ only by seed (and ignored options), in the given order; without
    config.txt, single runs."""
    groups = {}
    for run in runs:
        options = tuple((k, v) for k, v in sorted(run.config.items()) if k not in SAME_EXPERIMENT
                        and k not in ignored)
        groups.setdefault(options or run.path, []).append(run)
    return list(groups.values())


def group_name(group):
    """The common prefix of the runs' names, without a seed marker: none_s1337, none_s1338 ->
    none."""
    if len(group) == 1:
        return group[0].name
    common = os.path.commonprefix([run.name for run in group])
    return re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d*$", "", common) or common or group[0].name
