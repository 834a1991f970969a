#!/usr/bin/env python3
"""What build/layers, build/prune --method replace and build/collapse cost at GPT-2's size: seconds
of processor and wall time and peak memory, beside the evaluations that they are made of. Random
weights, random tokens.

    dev/bench/analysis.py                           in full: hours on two cores
    dev/bench/analysis.py --tokens 1024 --calib 2048 --features 100000      scaled down: minutes

Bars, for gpt2 (124M) on two cores: scores cost what their evaluations cost plus 5%; ReplaceMe with
262,144 calibration tokens and all candidate starts takes at most 10 minutes and 3 GiB; collapse at
50,257 classes at most 4 GiB. Where the machine does other work, read processor time.
"""
import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from array import array

VOCABULARY = 50257


def write_shard(path, tokens, seed):
    """A shard of llm.c's format: a header of 256 words, then 16-bit tokens: each once, then random
    ones."""
    draw = random.Random(seed)
    header = array("i", [20240520, 1, tokens] + [0] * 253)
    words = array("H", (t if t < VOCABULARY else draw.randrange(VOCABULARY) for t in range(tokens)))
    with open(path, "wb") as file:
        file.write(header.tobytes() + words.tobytes())


def run(name, *arguments):
    """Runs a program of the build; returns processor seconds, wall seconds and its peak in MiB."""
    begin = time.time()
    pid = os.fork()
    if pid == 0:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.execv(os.path.join(OPTIONS.build, name), [name, *map(str, arguments)])
    _, status, usage = os.wait4(pid, 0)
    if status:
        with open(LOG, encoding="utf-8", errors="replace") as file:
            sys.exit(f"error: {name} {' '.join(map(str, arguments))}\n{file.read()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, time.time() - begin, usage.ru_maxrss / 1024


def model(folder, name, *sizes):
    """The weights that a run begins with, as a directory."""
    out = os.path.join(folder, name)
    run("train_gpt", "--train", DATA, "--out", out, "--steps", 1, "--lr", 0, "--batch", 1,
        "--seq-len", OPTIONS.seq_len, "--vocab-size", VOCABULARY, "--selfcheck", 0, *sizes)
    state = os.path.join(os.path.realpath(os.path.join(out, "latest")), "optimizer.safetensors")
    if os.path.exists(state):
        os.remove(state)
    return os.path.join(out, "latest")


def row(what, measured, note):
    cpu, wall, peak = measured
    print(f"| {what} | {cpu:.1f} | {wall:.1f} | {peak:,.0f} | {note} |", flush=True)


def layers(folder, checkpoint):
    """Scores beside their evaluations, whose cost is that of a layer and of the head: known from
    evaluations of one and of five times the tokens, and of five times without layers."""
    count, tokens = OPTIONS.layers, OPTIONS.tokens
    common = ("--val", DATA, "--seq-len", OPTIONS.seq_len, "--batch", 2)
    once = run("evaluate", checkpoint, *common, "--eval-tokens", tokens)
    five = run("evaluate", checkpoint, *common, "--eval-tokens", 5 * tokens)
    none = run("evaluate", checkpoint, *common, "--eval-tokens", 5 * tokens, "--keep-layers",
               "none")
    whole = (five[0] - once[0]) / 4                     # without opening the model
    head = (none[0] - five[0]) / 5                      # it runs full depth too
    one = (whole - head) / count
    row(f"evaluate, {5 * tokens:,} tokens", five,
        f"{tokens:,} tokens: {whole:.1f} s, the head alone {head:.1f}")
    got = run("layers", checkpoint, *common, "--tokens", tokens, "--branches", 0, "--greedy", 0)
    work = whole + count * (whole - one) + sum(head + n * one for n in range(1, count - 1))
    spent = got[0] - (once[0] - whole)
    row(f"layers, {tokens:,} tokens: scores, ablations, exits", got,
        f"its {2 * count - 1} evaluations {work:.1f} s; all but opening the model "
        f"{100 * (spent / work - 1):+.1f}% (bar 5%)")


def replace(folder, checkpoint):
    common = ("--val", DATA, "--tokens", 512, "--seq-len", 512, "--batch", 1, "--calib", DATA,
              "--n", 1, "--select", "replace", "--method", "replace", "--ridge", 1)
    measured = []
    for part in (1, 2):
        out = os.path.join(folder, f"pruned{part}")
        measured.append(run("prune", checkpoint, "--out", out, *common, "--calib-tokens",
                            part * OPTIONS.calib))
        shutil.rmtree(out)
        row(f"prune --select replace, {part * OPTIONS.calib:,} calibration tokens", measured[-1],
            "")
    each = (measured[1][0] - measured[0][0]) / OPTIONS.calib
    seconds = 262144 * each
    print(f"| of which each token | {1000 * each:.2f} ms | | | 262,144 tokens: "
          f"{seconds:.0f} s of processor time, {seconds / 120:.1f} min on two free cores (bar 10); memory's bar 3,072 |", flush=True)


def collapse(folder):
    """One layer suffices: the classes are what costs, not the features."""
    checkpoint = model(folder, "shallow", "--preset", "gpt2", "--layers", 1)
    row(f"collapse, {OPTIONS.features:,} tokens, {VOCABULARY:,} classes at most, one layer",
        run("collapse", checkpoint, "--train", DATA, "--val", DATA, "--tokens", OPTIONS.features,
            "--val-tokens", 2048, "--seq-len", 64, "--batch", 64, "--min-count", 1),
        "memory's bar 4,096")


def main():
    with tempfile.TemporaryDirectory(dir=OPTIONS.folder) as folder:
        global DATA, LOG
        LOG = os.path.join(folder, "log.txt")
        DATA = os.path.join(folder, "tokens.bin")
        write_shard(DATA, max(2 * OPTIONS.calib, OPTIONS.features, 5 * OPTIONS.tokens) + 4096, 1)
        print(f"load {os.getloadavg()[0]:.1f}; preset {OPTIONS.preset}\n")
        print("| | processor s | wall s | peak MiB | |\n|---|--:|--:|--:|---|", flush=True)
        checkpoint = model(folder, "model", "--preset", OPTIONS.preset)
        if "layers" in OPTIONS.only:
            layers(folder, checkpoint)
        if "replace" in OPTIONS.only:
            replace(folder, checkpoint)
        if "collapse" in OPTIONS.only:
            collapse(folder)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"\nload {os.getloadavg()[0]:.1f}; the largest of all, training's one step included: "
              f"{peak:,.0f} MiB")


PARSER = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--build", default="build", help="folder of the programs")
PARSER.add_argument("--folder", help="where temporary files go")
PARSER.add_argument("--preset", default="gpt2")
PARSER.add_argument("--layers", type=int, default=12, help="of the preset")
PARSER.add_argument("--seq-len", type=int, default=512)
PARSER.add_argument("--tokens", type=int, default=65536, help="of an evaluation")
PARSER.add_argument("--calib", type=int, default=131072,
                    help="calibration tokens, once and twice as many")
PARSER.add_argument("--features", type=int, default=2000000, help="tokens for class means")
PARSER.add_argument("--only", default="layers,replace,collapse")
OPTIONS = PARSER.parse_args()
DATA = LOG = None
if __name__ == "__main__":
    main()
