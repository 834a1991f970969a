#!/usr/bin/env python3
"""A long run of a tiny model that is stopped, killed and resumed at random, beside an undisturbed
one.

    make soak                            an hour
    make soak SECONDS=120                two minutes
    dev/torture/soak.py --seed 7         other times and signals

The undisturbed run's memory must not grow. The other one gets signals at random times, other
numbers of threads and other save intervals, and is resumed each time; at the end it must have every
step once in metrics.jsonl, with the same values, and the same weights and moments, byte for byte.
Exit code 1 if anything differs; the files are then kept.
"""
import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback

STEADY = """--layers 2 --heads 2 --channels 16 --seq-len 16 --batch 4 --total-batch 128 --drop-path
0.3 --drop-unit row
    --eval-every 50 --eval-tokens 500 --log-every 1000 --keep 3""".split()
TIMES = {"ms", "tok_per_s", "mfu", "peak_bytes"}         # differs between runs with the same bits
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGSTOP]
MAY_GROW = 1 << 20                                       # bytes, for buffers of libc and OpenMP
problems = []


def problem(text):
    print(f"FAIL: {text}", flush=True)
    problems.append(text)


class Run:
    """A train_gpt process; its messages go to a file."""

    def __init__(self, o, out, steps, *options):
        self.log = out + ".log"
        command = [os.path.join(o.build, "train_gpt"), "--train", os.path.join(o.out, "data",
            "train_*.bin"), "--val",
                   os.path.join(o.out, "data", "val_*.bin"), "--steps", str(steps), "--out", out]
        command += STEADY + list(options)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL,
                                            env=dict(os.environ, OMP_WAIT_POLICY="passive"))
        self.rss = []

    def wait(self, seconds):
        """Waits until it ends or the time has passed, watching its memory. Returns whether it has
        ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            seen = resident_bytes(self.process.pid)
            if seen:
                self.rss.append(seen)
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))
        return self.process.poll() is not None

    def last_words(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return " | ".join(f.read().splitlines()[-3:])


def resident_bytes(pid):
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as f:
            return next((1024 * int(line.split()[1]) for line in f if line.startswith("VmRSS")), 0)
    except OSError:                                      # no /proc here, or it has just ended
        return 0


def make_data(o):
    text = os.path.join(o.out, "text")
    words = ["the ", "cat ", "sat ", "on ", "a ", "mat, ", "and ", "slept.\n"]
    order = random.Random(1)
    with open(text, "w", encoding="ascii") as f:
        for i in range(20000):
            f.write(words[i % 8 if order.random() < 0.7 else order.randrange(8)])
    subprocess.run([os.path.join(o.build, "data_bytes"), "--out", os.path.join(o.out, "data"),
                    text], check=True,
                   stdout=subprocess.DEVNULL)


def records(out):
    """metrics.jsonl without values that depend on time. A kill may leave an incomplete last
    line."""
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
        lines = f.read().split("\n")
    whole = lines[:-1]
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in whole]


def check_memory(rss, what):
    """Compares its second quarter with its last one: startup and the first evaluation are over by
    then."""
    n = len(rss)
    if n < 16:
        print(f"memory of {what}: {n} samples, too few to say", flush=True)
        return
    early, late = (sorted(part)[len(part) // 2] for part in (rss[n // 4:n // 2], rss[3 * n // 4:]))
    print(f"memory of {what}: {early / 1e6:.2f} MB, then {late / 1e6:.2f} MB ({n} samples)",
          flush=True)
    if late > early + MAY_GROW:
        problem(f"{what} grows: {early} to {late} bytes")


def run_alone(o, out, steps):
    run = Run(o, out, steps, "--threads", "1", "--save-every", "50")
    begin = time.monotonic()
    run.wait(1e9)
    if run.process.returncode:
        sys.exit(f"error: the undisturbed run ends with {run.process.returncode}: "
                 f"{run.last_words()}")
    return time.monotonic() - begin, run.rss


def disturb(run, draw):
    """Sends one signal; returns its name if the process has ended because of it or by itself."""
    sent = draw.choice(SIGNALS)
    run.process.send_signal(sent)
    if sent == signal.SIGSTOP:                           # a suspended machine: it continues as if
                                                         # nothing had happened
        time.sleep(0.2)
        run.process.send_signal(signal.SIGCONT)
        return sent.name
    if sent == signal.SIGUSR1 and not run.wait(0.5):     # saves at once and continues
        return sent.name
    if not run.wait(60):
        problem(f"it still runs a minute after {sent.name}")
        run.process.kill()
    if run.process.wait() not in (0, -sent):
        problem(f"after {sent.name} it ends with {run.process.returncode}: {run.last_words()}")
    return sent.name


def run_disturbed(o, out, steps, seconds):
    """Legs of random length until all steps are done. After the time limit it is left alone."""
    draw, begin, counts, rss = random.Random(o.seed), time.monotonic(), collections.Counter(), []
    while not problems:
        options = ["--threads", str(draw.randint(1, 3)), "--save-every",
                   str(draw.choice([7, 20, 50, 90])), "--resume"]
        run = Run(o, out, steps, *options)
        counts["starts"] += 1
        ended = run.wait(1e9 if time.monotonic() - begin > seconds else 0.1 +
                         draw.expovariate(1 / o.leg))
        while not ended and run.process.poll() is None:
            counts[disturb(run, draw)] += 1
            ended = run.wait(0.1 +
                             draw.expovariate(1 / o.leg)) if run.process.poll() is None else True
        rss += run.rss[1:]
        if run.process.returncode == 0 and os.path.isdir(os.path.join(out, f"step_{steps:08}")):
            return counts, rss
        if run.process.returncode > 0:
            problem(f"it ends with {run.process.returncode}: {run.last_words()}")
    return counts, rss


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def compare(alone, disturbed, steps):
    want, got = records(alone), records(disturbed)
    numbers = [int(r["step"]) for r in got]
    if numbers != list(range(1, steps + 1)):
        gaps = [n for n in range(1, steps + 1) if n not in set(numbers)]
        problem(f"metrics.jsonl has {len(numbers)} records for {steps} steps; {len(gaps)} are "
                f"missing: {gaps[:3]} ...")
    other = [r["step"] for r, w in zip(got, want) if r != w]
    if other:
        problem(f"metrics.jsonl: {len(other)} steps have other numbers, the first is {other[0]:g}")
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        sums = [sha256(os.path.join(out, "latest", name)) for out in (alone, disturbed)]
        print(f"{name}: {'same bytes' if sums[0] == sums[1] else 'OTHER BYTES'}", flush=True)
        if sums[0] != sums[1]:
            problem(f"{name} differs")
    if os.path.basename(os.path.realpath(os.path.join(disturbed, "latest"))) != f"step_{steps:08}":
        problem("latest is not the last step")
    kept = [n for n in os.listdir(disturbed) if n.startswith("step_")]
    if len(kept) > 3:
        problem(f"--keep 3 leaves {len(kept)} checkpoints")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build", help="folder with train_gpt and data_bytes")
    parser.add_argument("--seconds", type=float, default=3600,
                        help="approximate total for both runs")
    parser.add_argument("--leg", type=float, default=0,
                        help="mean seconds between signals; 0: the time / 80")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="build/soak",
                        help="this script's folder: its previous contents are removed")
    o = parser.parse_args()
    o.leg = o.leg or max(0.3, min(20.0, o.seconds / 80))
    if os.path.isdir(o.out) and os.listdir(o.out) and not os.path.exists(os.path.join(o.out,
        "text")):
        sys.exit(f"error: {o.out} is not a folder of this script\n  hint: choose another with "
                 f"--out")
    shutil.rmtree(o.out, ignore_errors=True)
    os.makedirs(o.out)
    make_data(o)
    trial, _ = run_alone(o, os.path.join(o.out, "trial"), 500)
    steps = max(500, int(0.3 * o.seconds / trial * 500))
    alone, disturbed = os.path.join(o.out, "alone"), os.path.join(o.out, "disturbed")
    print(f"{steps} steps of about {2 * trial:.2f} ms; a signal every {o.leg:.1f} s; seed {o.seed}",
          flush=True)
    took, rss = run_alone(o, alone, steps)
    check_memory(rss, f"the run left alone, {took:.0f} s")
    counts, rss = run_disturbed(o, disturbed, steps, max(0.5 * o.seconds, 0.8 * o.seconds - took))
    print("disturbed: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())),
          flush=True)
    if not problems:
        print(f"memory of the disturbed run: at most {max(rss, default=0) / 1e6:.2f} MB in any "
              f"process", flush=True)
        compare(alone, disturbed, steps)
    if problems:
        print(f"soak: {len(problems)} problems; {o.out} has both runs and what they said")
        return 1
    shutil.rmtree(o.out)
    starts = counts.pop("starts")
    signals = sum(counts.values())
    print(f"soak: {steps} steps, {signals} signals, {starts} starts: the same metrics, weights and "
          f"moments")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)   # background jobs of a shell ignore
                                                               # it
    sys.exit(main())
