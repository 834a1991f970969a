#!/usr/bin/env python3
"""Do the tests notice a wrong operator, constant or missing statement? In drop_path.h, checkpoint.h and the drop-path
parts of train_gpt.c, one place at a time is changed (a mutant), what depends on it is compiled, and tests run until
one fails.

    make mutate                          150 mutants drawn by seed 1; what was tried before is not tried again
    make mutate MUTANTS=0                all of them
    dev/mutate/mutate.py --seconds 170   stops in time; the next call goes on
    dev/mutate/mutate.py --quick         without whole runs by the mutant, which a later call makes up for
    dev/mutate/mutate.py --list          the mutants, without trying them

A mutant is caught when a test fails, a sanitizer stops it, or it takes ten times as long as what it was made from.
What survives is printed; dev/mutate/survivors.txt says why it may. Exit code 1 below 90% caught, survivors all counted.

Not changed: CHECK and assert, which no right caller reaches; texts of messages; comments.
"""
import argparse
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORK = os.path.join(ROOT, "build", "mutate")
TREE = os.path.join(WORK, "tree")
SURVIVORS = os.path.join(ROOT, "dev", "mutate", "survivors.txt")
LEAST = 90.0                                             # per cent caught
FLAGS = "-std=c11 -g -march=native -fno-math-errno -ffp-contract=fast -fopenmp -w".split()
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer".split()
LIBS = ["-lm", "-pthread"]

# What decides which rows run, at what scale, and what becomes of their gradients and memory.
ENGINE_FUNCTIONS = """
    token_place line_of residual_forward residual_backward gradient_index gradient_add kept_per_row kept_bound
    keep rows_of to_stream from_stream tokens_of attention_branch_forward attention_branch_backward
    mlp_branch_forward mlp_branch_backward block_forward block_backward run_forward model_forward_backward
    model_update""".split()

# Whole runs by the mutant's train_gpt, for what survives the tests of its part.
WHOLE_RUNS = """
    trainer_survival_scaling_reaches_the_checkpoint trainer_replay_gives_the_same_run
    trainer_weights_of_another_run trainer_drop_path_zero_is_plain_training trainer_refuses
    trainer_survives_numbers_that_are_not_finite trainer_warns_of_a_high_rate trainer_learns_and_records
    trainer_resume_is_bit_identical""".split()
ENGINE_TESTS = """
    engine_golden_skip engine_golden_dense engine_golden_gradients engine_golden_eval engine_update_untouched
    engine_update engine_update_clipped engine_update_not_taken engine_slots engine_ignored engine_logits
    engine_evaluates engine_forward_is_pure engine_rows_alone engine_smaller_calls engine_micro_batches
    engine_bf16_is_near engine_any_batch engine_dropped_is_zero engine_scale engine_rows_apart engine_poison
    engine_nan_reaches_the_loss engine_bounded engine_threads""".split()

FILES = {"dev/drop_path.h": 1, "dev/checkpoint.h": 2, "train_gpt.c": 3}     # the group of dev/mutate/tests.c

OPERATORS = [(" < ", " <= "), (" < ", " >= "), (" <= ", " < "), (" > ", " >= "), (" > ", " <= "), (" >= ", " > "),
             (" == ", " != "), (" != ", " == "), (" + ", " - "), (" - ", " + "), (" * ", " / "), (" / ", " * "),
             (" % ", " * "), (" && ", " || "), (" || ", " && "), (" += ", " -= "), (" -= ", " += "),
             (" & ", " | "), (" | ", " & "), (" |= ", " &= "), (" << ", " >> "), (" >> ", " << ")]
NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?![\w.])")
STATEMENT = re.compile(r"^(\s+)((?:\*|\()*[A-Za-z_][\w.\[\]>()*+ -]*?(?:\(.*\)|\s(?:[-+*|]?=)\s.*|\+\+|--));\s*$")
KEYWORD = re.compile(r"^\s*(return|else|if|for|while|do|switch|case|default|typedef|enum|struct|static|const|int|char|"
                     r"double|float|real|unsigned|size_t|u?int\d+_t|FILE|DIR|Text|Json|FileMap|Weights|CHECK|assert)\b")


# ---- Making mutants ----

def code_only(text):
    """The text with comments, string and character constants blanked; every place keeps its offset."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|^[ \t]*#[^\n]*', re.S | re.M)
    return pattern.sub(lambda m: re.sub(r"[^\n]", "\x01", m.group()), text)


def function_spans(code):
    """name -> (from, to) of their bodies; a function ends with } at the start of a line, or on its first line."""
    spans = {}
    for m in re.finditer(r"^(?:static|[a-zA-Z]).*?\b(\w+)\([^;{}]*\)\s*\{", code, re.M):
        spans[m.group(1)] = (m.end(), code.find("\n" if code[m.end()] != "\n" else "\n}", m.end()))
    return spans


def contract_spans(code):
    return [(m.start(), code.find(";", m.end())) for m in re.finditer(r"\b(CHECK|assert)\(", code)]


def closing(code, at):
    depth = 0
    for i in range(at, len(code)):
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i
    return at


def mutants_of(path):
    """(from, to, replacement) of every mutant of a file."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        text = f.read()
    code = code_only(text)
    spans = function_spans(code)
    if path == "train_gpt.c":
        missing = [name for name in ENGINE_FUNCTIONS if name not in spans]
        if missing:
            sys.exit(f"error: {path} has no function {', '.join(missing)}\n  hint: ENGINE_FUNCTIONS of {__file__}")
        spans = {name: spans[name] for name in ENGINE_FUNCTIONS}
    found = []
    for body, end in spans.values():
        for old, new in OPERATORS:
            at = code.find(old, body, end)
            while at >= 0:
                found.append((at, at + len(old), new))
                at = code.find(old, at + 1, end)
        for m in NUMBER.finditer(code, body, end):
            if "." in m.group(1):
                found.append((m.start(), m.end(), f"({m.group(1)} * 1.5)"))
                continue
            found.append((m.start(), m.end(), str(int(m.group(1)) + 1)))
            if int(m.group(1)) > 0:
                found.append((m.start(), m.end(), str(int(m.group(1)) - 1)))
        for m in re.compile(r"(?<![\w)\]])!(?=[\w(*])").finditer(code, body, end):
            found.append((m.start(), m.end(), ""))
        for m in re.compile(r"\bif (?=\()").finditer(code, body, end):
            to = closing(code, m.end()) + 1
            found.append((m.end(), to, f"(!{text[m.end():to]})"))
        at = body
        for line in code[body:end].split("\n"):
            m = STATEMENT.match(line.replace("\x01", '"'))
            if m and not KEYWORD.match(line) and line.count("(") == line.count(")"):
                found.append((at + len(m.group(1)), at + line.rindex(";"), ""))
            if line.strip() in ("break;", "continue;"):
                found.append((at + line.index(line.strip()), at + line.rindex(";"), ""))
            at += len(line) + 1
    contracts = contract_spans(code)
    found = sorted({m for m in found if not any(a <= m[0] <= b for a, b in contracts)})
    return text, found


def describe(text, mutant):
    """Its line before and after, without indentation: what survivors.txt knows it by."""
    begin, end, new = mutant
    first = text.rfind("\n", 0, begin) + 1
    last = text.find("\n", end)
    before, after = text[first:last], text[first:begin] + new + text[end:last]
    return tuple(" ".join(re.sub(r"\s*//.*", "", s).split()) for s in (before, after))


# ---- Trying one ----

def limits():
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def call(command, cwd, seconds):
    """0: success; else how it failed, as a word."""
    environment = dict(os.environ, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive", BUILD="build/mutate/runs",
                       TMPDIR=os.path.join(WORK, "tmp"), ASAN_OPTIONS="max_allocation_size_mb=4096")
    try:
        p = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                           env=environment, timeout=seconds, check=False, preexec_fn=limits)
    except subprocess.TimeoutExpired:
        return "too slow"
    if p.returncode == 0:
        return None
    failed = re.findall(rb"^FAIL (\w+)", p.stdout, re.M)
    if failed:
        return failed[0].decode()
    return "a sanitizer" if b"Sanitizer" in p.stdout or b"runtime error" in p.stdout else f"exit code {p.returncode}"


class Bench:
    """Compiles and runs the tests of a file, in a copy of the sources."""

    def __init__(self, cc):
        self.cc = cc
        self.slowest = {}                                # seconds that the tests of a group may take; "0": whole runs
        os.makedirs(os.path.join(WORK, "tmp"), exist_ok=True)
        shutil.rmtree(TREE, ignore_errors=True)
        os.makedirs(os.path.join(WORK, "runs"), exist_ok=True)
        shutil.copytree(os.path.join(ROOT, "dev"), os.path.join(TREE, "dev"),
                        ignore=shutil.ignore_patterns("golden", "emu"))
        for name in ("train_gpt.c", "test_gpt.c"):
            shutil.copy(os.path.join(ROOT, name), TREE)

    def compile(self, *arguments):
        return call([self.cc] + FLAGS + list(arguments), TREE, 300)

    def must(self, error, what):
        if error:
            sys.exit(f"error: {what}: {error}\n  hint: the tests must pass before anything is changed: make test")

    def prepare(self):
        """What no mutant changes, and how long the tests take when nothing is wrong."""
        out = os.path.join(WORK, "engine.o")
        self.must(self.compile("-O2", "-DENGINE_ONLY", "-c", "train_gpt.c", "-o", out), "cannot compile train_gpt.c")
        out = os.path.join(WORK, "engine_tests.o")
        self.must(self.compile("-O1", "-DGROUP=3", "-c", "dev/mutate/tests.c", "-o", out),
                  "cannot compile dev/mutate/tests.c")
        env = dict(os.environ, MAKEFLAGS="")
        make = ["make", "-s", f"CC={self.cc}", "B=build/mutate/runs", "EMULATE=0", "CFLAGS=-O1 -g",
                "build/mutate/runs/data_bytes", "build/mutate/runs/test_gpt"]
        self.must(subprocess.call(make, cwd=ROOT, env=env, stdout=subprocess.DEVNULL), "make fails")
        for group, stage in [(g, 1) for g in FILES.values()] + [(0, 2)]:
            begin = time.monotonic()
            self.must(self.try_stage(group, stage, 600), f"nothing is changed, group {group}")
            self.slowest[str(group * (stage == 1))] = 10 + 10 * (time.monotonic() - begin)

    def try_stage(self, group, stage, seconds):
        program = os.path.join(WORK, f"tests_{group}")
        if stage == 2:
            program = os.path.join(WORK, "runs", "train_gpt")
            if self.compile("-O1", "train_gpt.c", "-o", program, *LIBS):
                return "compiler"
            return call(["build/mutate/runs/test_gpt"] + WHOLE_RUNS, ROOT, seconds)
        if group == 3:
            engine = os.path.join(WORK, "mutant.o")
            if self.compile("-O1", "-DENGINE_ONLY", "-c", "train_gpt.c", "-o", engine):
                return "compiler"
            objects = [os.path.join(WORK, "engine_tests.o"), engine]
            self.compile(*objects, "-o", program, *LIBS)
            return call([program] + ENGINE_TESTS, ROOT, seconds)
        if self.compile("-O0", *SANITIZERS, f"-DGROUP={group}", "dev/mutate/tests.c", os.path.join(WORK, "engine.o"),
                        "-o", program, *LIBS):
            return "compiler"
        return call([program], ROOT, seconds)

    def attempt(self, path, text, mutant, stages):
        """What caught it; "compiler" if it is no program at all; "" if nothing did."""
        begin, end, new = mutant
        place = os.path.join(TREE, path)
        with open(place, "w", encoding="utf-8") as f:
            f.write(text[:begin] + new + text[end:])
        os.makedirs(os.path.join(WORK, "tmp"), exist_ok=True)
        caught = ""
        for stage in stages:
            caught = self.try_stage(FILES[path], stage, self.slowest[str(FILES[path] * (stage == 1))]) or ""
            if caught:
                break
        shutil.rmtree(os.path.join(WORK, "tmp"), ignore_errors=True)
        with open(place, "w", encoding="utf-8") as f:
            f.write(text)
        return caught


# ---- All of it ----

def read_reasons():
    """(file, before, after) -> reason, from survivors.txt: blocks of four lines."""
    reasons = {}
    if os.path.exists(SURVIVORS):
        with open(SURVIVORS, encoding="utf-8") as f:
            lines = [line.strip() for line in f if line.strip() and not line.startswith("#")]
        for i in range(0, len(lines) - 3, 4):
            reasons[lines[i], lines[i + 1].lstrip("- "), lines[i + 2].lstrip("+ ")] = lines[i + 3]
    return reasons


def inputs_hash():
    """Results hold for these sources and tests only."""
    digest = hashlib.sha256()
    names = list(FILES) + ["dev/trainer.h"]
    names += [f"dev/test/test_{n}.h" for n in ("drop_path", "checkpoint", "engine", "trainer")]
    for name in names:
        with open(os.path.join(ROOT, name), "rb") as f:
            digest.update(name.encode() + f.read())
    return digest.hexdigest()


def choose(sample, seed):
    everything = []
    for path in FILES:
        text, mutants = mutants_of(path)
        everything += [(path, text, m) for m in mutants]
    chosen = everything[:]
    random.Random(seed).shuffle(chosen)
    return everything, chosen[:sample] if sample else chosen


def report(chosen, results):
    reasons = read_reasons()
    total = {}
    survived = []
    for path, text, mutant in chosen:
        caught = results.get(f"{path}:{mutant[0]}:{mutant[1]}:{mutant[2]}")
        if caught is None:
            continue
        row = total.setdefault(path, [0, 0, 0])
        row[0 if caught and caught != "compiler" else 2 if caught else 1] += 1
        if not caught:
            survived.append((path, text.count("\n", 0, mutant[0]) + 1) + describe(text, mutant))
    for path, line, before, after in sorted(survived):
        reason = reasons.get((path, before, after))
        print(f"\nsurvived: {path}:{line}\n  - {before}\n  + {after}\n"
              f"  {reason or 'NO REASON in dev/mutate/survivors.txt'}")
    print(f"\n{'file':20} {'caught':>8} {'survived':>9} {'did not compile':>16}")
    for path, row in total.items():
        print(f"{path:20} {row[0]:8} {row[1]:9} {row[2]:16}")
    caught, alive = (sum(row[i] for row in total.values()) for i in (0, 1))
    share = 100.0 * caught / (caught + alive) if caught + alive else 0.0
    unknown = sum(1 for s in survived if (s[0], s[2], s[3]) not in reasons)
    print(f"{share:.1f}% of {caught + alive} caught; {unknown} of {alive} survivors without a reason")
    return share >= LEAST


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="mutants to draw; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; the next call goes on")
    parser.add_argument("--quick", action="store_true", help="no whole runs")
    parser.add_argument("--file", help="of those drawn, the ones of this file only: " + " ".join(FILES))
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--list", action="store_true")
    o = parser.parse_args()
    everything, chosen = choose(o.sample, o.seed)
    chosen = [c for c in chosen if o.file in (None, c[0])]
    if o.list:
        for path, text, mutant in everything:
            print(f"{path}:{text.count(chr(10), 0, mutant[0]) + 1}: {' -> '.join(describe(text, mutant))}")
        return 0
    os.makedirs(WORK, exist_ok=True)
    lock = open(os.path.join(WORK, "lock"), "w", encoding="ascii")       # goes with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"error: another mutate.py is at work in {WORK}")
    store = os.path.join(WORK, "results.json")
    state = {"inputs": inputs_hash(), "results": {}}
    if os.path.exists(store):
        with open(store, encoding="utf-8") as f:
            old = json.load(f)
        state = old if old["inputs"] == state["inputs"] else state
    results, first = state["results"], state.setdefault("first", [])    # first: survived all but whole runs
    begin, bench = time.monotonic(), None
    for n, (path, text, mutant) in enumerate(chosen):
        key = f"{path}:{mutant[0]}:{mutant[1]}:{mutant[2]}"
        if key in results or (o.quick and key in first):
            continue
        if o.seconds and time.monotonic() - begin > o.seconds:
            print(f"{n} of {len(chosen)} tried so far: call again")
            break
        if not bench:
            bench = Bench(o.cc)
            bench.slowest = state.get("slowest", {})
            if not bench.slowest:
                bench.prepare()
                state["slowest"] = bench.slowest
        caught = bench.attempt(path, text, mutant, (2,) if key in first else (1,) if o.quick else (1, 2))
        if o.quick and not caught:
            first.append(key)
        else:
            results[key] = caught
        with open(store, "w", encoding="utf-8") as f:
            json.dump(state, f)
        line = text.count("\n", 0, mutant[0]) + 1
        print(f"{n + 1}/{len(chosen)} {path}:{line}: {caught or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} of {len(everything)} mutants, drawn by seed {o.seed}")
    return 0 if report(chosen, dict(dict.fromkeys(first, ""), **results)) else 1


if __name__ == "__main__":
    sys.exit(main())
