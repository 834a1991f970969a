#!/usr/bin/env python3
"""Speed of data/prepare.py, end to end, compared with tiktoken's own encode_batch on the same
documents with as many threads.

    dev/bench/prepare_speed.py --tokenizer gpt2                      a synthetic text of 64 MB
    dev/bench/prepare_speed.py --tokenizer DIR --rounds 5 a.jsonl    DIR: GPT-2's encoder.json and
                                                                     vocab.bpe

prepare.py's time is that of its whole process: startup, reading the JSON lines, hashing every
document for the split, encoding, writing the shards, their checksums and the manifest. tiktoken's
is that of encode_ordinary_batch alone, with its documents in memory. They alternate; the ratios are
medians over the rounds. CPU time, of all processes and threads, is reported beside elapsed time: it
is more meaningful on a machine with other work. The tokens must be the same.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "data")
sys.path.insert(0, DATA)
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback

import vocabulary                       # noqa: E402
from shards import read_shard           # noqa: E402


def made_up(path, size):
    """JSON lines of documents of about 3 KB, with words drawn by Zipf's law from 50,000 random
    words."""
    r = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(r.choices(letters, weights=range(26, 0, -1), k=r.randint(2, 9)))
             for _ in range(50000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    total = 0
    with open(path, "w", encoding="utf-8") as file:
        while total < size:
            drawn = r.choices(words, weights, k=r.randint(50, 1000))
            text = "".join(w + r.choice([" ", " ", " ", " ", ", ", ". ", "\n"]) for w in drawn)
            total += len(text)
            file.write(json.dumps({"text": text}) + "\n")


def spent(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def timed(who, function):
    """The function's result, its seconds and its CPU seconds."""
    start, cpu = time.perf_counter(), spent(who)
    result = function()
    return result, time.perf_counter() - start, spent(who) - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="JSONL", nargs="?",
                        help="documents (default: synthetic text)")
    parser.add_argument("--tokenizer", default="gpt2",
                        help="gpt2, or a folder with its files (default gpt2)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="number of processes and threads (default: one per core)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=64,
                        help="size of the synthetic text (default 64)")
    options = parser.parse_args()
    try:
        gpt2 = vocabulary.load(options.tokenizer)
    except vocabulary.Problem as e:
        sys.exit(f"error: {e}")
    with tempfile.TemporaryDirectory(prefix="droppath_bench_") as folder:
        text = options.text or os.path.join(folder, "text.jsonl")
        if not options.text:
            made_up(text, options.megabytes * 10 ** 6)
        with open(text, encoding="utf-8") as file:
            documents = [json.loads(line)["text"] for line in file if line.strip()]
        size = sum(len(d.encode()) for d in documents)
        print(f"{len(documents):,} documents, {size / 1e6:.1f} MB, {options.processes} processes "
              f"and threads")
        print("round    prepare.py      tiktoken     ratio   CPU time: prepare.py, tiktoken "
              "  ratio", flush=True)
        by_clock, by_cpu = [], []
        for i in range(options.rounds):
            out = os.path.join(folder, f"out{i}")
            command = [sys.executable, os.path.join(DATA, "prepare.py"), "--out", out,
                       "--tokenizer", options.tokenizer,
                       "--val", "0", "--processes", str(options.processes), text]
            run = subprocess.run
            _, ours, our_cpu = timed(resource.RUSAGE_CHILDREN,
                                     lambda: run(command, check=True, stdout=subprocess.DEVNULL))
            coded, theirs, their_cpu = timed(resource.RUSAGE_SELF,
                                             lambda: gpt2.encoding.encode_ordinary_batch(
                documents, num_threads=options.processes))
            by_clock.append(theirs / ours)
            by_cpu.append(their_cpu / our_cpu)
            print(f"{i + 1:5} {size / 1e6 / ours:8.2f} MB/s {size / 1e6 / theirs:8.2f} MB/s "
                  f"{by_clock[-1]:8.1%}"
                  f" {our_cpu:20.1f} s {their_cpu:8.1f} s {by_cpu[-1]:8.1%}", flush=True)
            if i == 0:
                got = [t for n in sorted(os.listdir(out)) if n.startswith("train")
                       for t in read_shard(os.path.join(out, n)).tolist()]
                if got != [t for c in coded if c for t in c + [50256]]:
                    sys.exit("error: the tokens differ")
                del got
            del coded
        print(f"medians: {statistics.median(by_clock):.1%} by the clock, "
              f"{statistics.median(by_cpu):.1%} by CPU time")


if __name__ == "__main__":
    main()
