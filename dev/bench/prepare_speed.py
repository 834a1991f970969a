#!/usr/bin/env python3
"""Speed of data/prepare.py, end to end, beside tiktoken's own encode_batch on the same documents and as many threads.

    dev/bench/prepare_speed.py --tokenizer gpt2                              a made-up text of 64 MB
    dev/bench/prepare_speed.py --tokenizer DIR --rounds 5 a.jsonl            DIR: GPT-2's encoder.json and vocab.bpe

prepare.py's time is that of its whole process: starting, reading the JSON lines, hashing every document for its side,
encoding, writing the shards, their sums and the manifest. tiktoken's is that of encode_ordinary_batch alone, its
documents being in memory. They take turns; the ratio is the median of the rounds' ratios. The tokens must be the same.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "data")
sys.path.insert(0, DATA)

import vocabulary                       # noqa: E402
from shards import read_shard           # noqa: E402


def made_up(path, size):
    """JSON lines of documents of some 3 KB: words drawn by Zipf's law from 50,000 that letters were drawn for."""
    r = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(r.choices(letters, weights=range(26, 0, -1), k=r.randint(2, 9))) for _ in range(50000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    total = 0
    with open(path, "w", encoding="utf-8") as file:
        while total < size:
            drawn = r.choices(words, weights, k=r.randint(50, 1000))
            text = "".join(w + r.choice([" ", " ", " ", " ", ", ", ". ", "\n"]) for w in drawn)
            total += len(text)
            file.write(json.dumps({"text": text}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="JSONL", nargs="?", help="documents (default: a made-up text)")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, or a folder with its files (default gpt2)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="and threads (default: one a core)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=64, help="of the made-up text (default 64)")
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
        print(f"{len(documents):,} documents, {size / 1e6:.1f} MB, {options.processes} processes and threads")
        print("round    prepare.py      tiktoken     ratio")
        ratios, speeds = [], []
        for i in range(options.rounds):
            start = time.perf_counter()
            out = os.path.join(folder, f"out{i}")
            subprocess.run([sys.executable, os.path.join(DATA, "prepare.py"), "--out", out, "--tokenizer",
                            options.tokenizer, "--val", "0", "--processes", str(options.processes), text], check=True,
                           stdout=subprocess.DEVNULL)
            ours = size / 1e6 / (time.perf_counter() - start)
            start = time.perf_counter()
            coded = gpt2.encoding.encode_ordinary_batch(documents, num_threads=options.processes)
            theirs = size / 1e6 / (time.perf_counter() - start)
            ratios.append(ours / theirs)
            speeds.append((ours, theirs))
            print(f"{i + 1:5} {ours:8.2f} MB/s {theirs:8.2f} MB/s {ours / theirs:8.1%}", flush=True)
            if i == 0:
                got = [read_shard(os.path.join(out, n)) for n in sorted(os.listdir(out)) if n.startswith("train")]
                want = [t for c in coded if c for t in c + [50256]]
                if [t for shard in got for t in shard.tolist()] != want:
                    sys.exit("error: the tokens differ")
                del got, want
            del coded
        ours, theirs = (statistics.median(s[i] for s in speeds) for i in (0, 1))
        print(f"median {ours:7.2f} MB/s {theirs:8.2f} MB/s {statistics.median(ratios):8.1%}")


if __name__ == "__main__":
    main()
