"""What test_look_*.py share: real runs of the built train_gpt, tiny and short, made once. BUILD
names its folder."""
import atexit
import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
BUILD = os.path.join(ROOT, os.environ.get("BUILD", "build"))
sys.path.append(os.path.join(ROOT, "scripts"))         # last, since tensorboard.py there is not the
                                                       # library

# Two layers of 16 channels on rows of 16 bytes; two micro-batches of 5 rows make a step.
MODEL = ("--layers 2 --heads 2 --channels 16 --seq-len 16 --batch 5 --total-batch 160 "
         "--eval-tokens 500 --threads 1 "
         "--eval-every 10 --log-every 1000").split()


def have(package):
    """Whether a package is installed; a file of its name is not enough."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def command_of(program, *arguments):
    """A Python script runs on the Python of the tests."""
    start = [sys.executable, os.path.join(ROOT, program)] if program.endswith(".py") else [program]
    return [*start, *arguments]


def run(*command, expect=0, env=None):
    """Runs it; returns what it printed."""
    done = subprocess.run(command_of(*command), capture_output=True, text=True,
                          env={**os.environ, **(env or {})})
    text = done.stdout + done.stderr
    if done.returncode != expect:
        raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}, not "
                             f"{expect}:\n{text}")
    return text


@functools.lru_cache(maxsize=None)
def folder():
    path = tempfile.mkdtemp(prefix="droppath_test_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.lru_cache(maxsize=None)
def data():
    text = os.path.join(folder(), "text")
    with open(text, "w", encoding="utf-8") as file:
        file.write("".join(f"the cat {i % 7} sat on mat {i % 5}, and slept.\n"
                           for i in range(1000)))
    run(os.path.join(BUILD, "data_bytes"), "--out", os.path.join(folder(), "data"), text)
    return os.path.join(folder(), "data")


def train(out, *options):
    """Trains into that folder, 40 steps unless options say otherwise."""
    run(os.path.join(BUILD, "train_gpt"), "--train", data() + "/train_*.bin", "--val",
        data() + "/val_*.bin",
        "--out", out, *MODEL, "--steps", "40", *options)


@functools.lru_cache(maxsize=None)
def trained(name, *options):
    """A run's folder, made once. Tests leave it as it is: they work on copies."""
    out = os.path.join(folder(), "runs", name)
    train(out, *options)
    return out
