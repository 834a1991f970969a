#!/usr/bin/env python3
"""Lines and branches that the tests have reached, of train_gpt.c and the shipped headers, from
gcc's counts in a build folder.

    make coverage            builds with counts, runs the tests, prints this table
    make coverage LINES=1    and every line that no test has reached

A header is compiled into several programs, and a function into several copies: a line counts as
reached when any of them reached it, and so does a branch. What a program counts is lost when it is
killed or aborts (CHECK, assert).
"""
import collections
import fnmatch
import json
import os
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback

SHOWN = ["train_gpt.c", "dev/check.h", "dev/model/*.h", "dev/run/*.h", "dev/files/*.h"]
LEFT_OUT = ["dev/model/cuda.h"]                                # for the GPU engine alone, which
                                                               # this build leaves out
LEAST = 95.0                                             # per cent of lines


def run_gcov(folder):
    """gcov's JSON of every program in the folder."""
    names = [os.path.abspath(os.path.join(folder, n)) for n in sorted(os.listdir(folder))
             if n.endswith(".gcno")]
    if not names:
        sys.exit(f"error: {folder} has no .gcno files\n  hint: make coverage builds them, with gcc")
    gcov = os.environ.get("GCOV", "gcov")
    with tempfile.TemporaryDirectory() as empty:
        try:
            out = subprocess.run([gcov, "--json-format", "--branch-probabilities", "--stdout"] +
                                 names, cwd=empty,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        except OSError as e:
            sys.exit(f"error: cannot run {gcov}: {e.strerror}\n  hint: GCOV=gcov-12 names the one "
                     f"of your compiler")
    if out.returncode:
        sys.exit(f"error: {gcov} fails: {out.stderr.decode().splitlines()[-1:]}\n"
                 "  hint: it must be of the compiler's version")
    return [json.loads(line) for line in out.stdout.splitlines() if line.strip()]


class File:
    """How often each line ran, and each branch of it. Copies of a line that branch otherwise are
    kept apart."""

    def __init__(self):
        self.lines = collections.Counter()
        # (line, how many) -> place -> count
        self.branches = collections.defaultdict(collections.Counter)

    def add(self, line):
        number, branches = line["line_number"], line["branches"]
        self.lines[number] += line["count"]
        for i, b in enumerate(branches):
            self.branches[number, len(branches)][i] += b["count"]

    def reached(self):
        return sum(1 for n in self.lines.values() if n), len(self.lines)

    def branches_reached(self):
        """Of each line the copy of which most is reached."""
        best = {}
        for (number, n), counts in self.branches.items():
            share = (sum(1 for i in range(n) if counts[i]), n)
            if number not in best or share[0] * best[number][1] > best[number][0] * share[1]:
                best[number] = share
        return sum(b[0] for b in best.values()), sum(b[1] for b in best.values())


def collect(folder):
    root = os.getcwd()
    files = collections.defaultdict(File)
    for program in run_gcov(folder):
        for f in program["files"]:
            path = os.path.relpath(os.path.join(program.get("current_working_directory", root),
                                                f["file"]), root)
            if any(fnmatch.fnmatch(path, p) for p in SHOWN) and path not in LEFT_OUT:
                for line in f["lines"]:
                    files[path].add(line)
    return files


def per_cent(part, whole):
    return 100.0 * part / whole if whole else 100.0


def print_missing(path, f):
    with open(path, encoding="utf-8") as source:
        text = source.read().splitlines()
    for number in sorted(n for n, count in f.lines.items() if not count):
        print(f"{path}:{number}: {text[number - 1].strip()}")


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    files = collect(sys.argv[1])
    total = [0, 0, 0, 0]
    print(f"{'file':24} {'lines':>16} {'branches':>18}")
    for path in sorted(files, key=lambda p: (p.count("/"), p)):
        row = files[path].reached() + files[path].branches_reached()
        total = [a + b for a, b in zip(total, row)]
        print(f"{path:24} {row[0]:5} of {row[1]:5} {per_cent(*row[:2]):5.1f}%"
              f" {row[2]:5} of {row[3]:5} {per_cent(*row[2:]):5.1f}%")
    print(f"{'all':24} {total[0]:5} of {total[1]:5} {per_cent(*total[:2]):5.1f}%"
          f" {total[2]:5} of {total[3]:5} {per_cent(*total[2:]):5.1f}%")
    if "--lines" in sys.argv:
        print("\nlines that no test has reached:")
        for path in sorted(files):
            print_missing(path, files[path])
    if per_cent(*total[:2]) < LEAST:
        print(f"FAIL: less than {LEAST:g}% of the lines")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
