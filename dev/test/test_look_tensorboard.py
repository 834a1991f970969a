"""Tests of scripts/tensorboard.py: what TensorBoard itself reads from the event files of real
runs."""
import glob
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import real_runs

SCRIPT = "scripts/tensorboard.py"


def records(run):
    with open(run + "/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_events(folder):
    """{tag: [(step, value)]} as TensorBoard has them after purging."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


@unittest.skipUnless(real_runs.have("tensorboard"), "tensorboard is missing")
class TensorBoard(unittest.TestCase):
    def setUp(self):
        self.run = os.path.join(tempfile.mkdtemp(dir=real_runs.folder()), "run")

    def copy(self):
        shutil.copytree(real_runs.trained("followed", "--drop-path", "0.5", "--save-every", "20"),
                        self.run,
                        symlinks=True)

    def cut(self, size):
        """Leaves so many lines, and half of the next."""
        with open(self.run + "/metrics.jsonl", "rb") as file:
            lines = file.readlines()
        with open(self.run + "/metrics.jsonl", "wb") as file:
            file.write(b"".join(lines[:size]) + lines[size][:40])
        return lines

    def append(self, data):
        with open(self.run + "/metrics.jsonl", "ab") as file:
            file.write(data)

    def once(self, *options, **more):
        return real_runs.run(SCRIPT, "--once", self.run, *options, **more)

    def expect_events(self, folder=None):
        """Every number of every step once, and none else."""
        events, written = read_events(folder or self.run), records(self.run)
        for key, tag in (("loss", "loss/train"), ("val_loss", "loss/validation"),
                         ("kept_mlp", "drop_path/kept_mlp")):
            want = [(r["step"], r[key]) for r in written if key in r]
            self.assertEqual([step for step, _ in events[tag]], [step for step, _ in want], tag)
            for (_, got), (step, value) in zip(events[tag], want):
                self.assertTrue(math.isclose(got, value, rel_tol=1e-6),
                                f"{tag}, step {step}: {got}, not {value}")

    def test_finished_run(self):
        self.copy()
        self.assertIn("40 new steps, 40 in total", self.once())
        self.expect_events()

    def test_again_without_doubles(self):
        self.copy()
        self.once()
        self.assertIn("0 new steps, 40 in total", self.once())
        self.assertEqual(len(glob.glob(self.run + "/events*")), 1)
        self.expect_events()

    def test_goes_on_after_a_half_line(self):
        self.copy()
        lines = self.cut(15)
        self.assertIn("15 new steps", self.once())
        self.append(lines[15][40:] + b"".join(lines[16:]))
        self.assertIn("25 new steps, 40 in total", self.once())
        self.expect_events()

    def test_events_beyond_the_state_are_purged(self):
        self.copy()
        lines = self.cut(15)
        self.once()
        shutil.copy(self.run + "/followed.json", self.run + "/before")
        self.append(lines[15][40:] + b"".join(lines[16:]))
        self.once()                                     # as if killed after the events, before the
                                                        # state
        os.replace(self.run + "/before", self.run + "/followed.json")
        self.assertIn("25 new steps", self.once())
        self.expect_events()

    def test_resumed_run_gives_way(self):
        """Steps 21 to 30 are done again by another seed; the lines of the first time have given
        way."""
        self.copy()
        self.once()
        shutil.rmtree(self.run + "/step_00000040")
        real_runs.train(self.run, "--resume", self.run + "/step_00000020", "--drop-path", "0.5",
                        "--seed", "5",
                        "--steps", "30")
        self.assertEqual(len(records(self.run)), 30)
        self.assertIn("was rewritten", self.once())
        self.expect_events()

    def test_another_run_in_its_place(self):
        """Longer than what was read of the first, so that only the checksum tells."""
        self.copy()
        self.cut(15)
        self.once()
        shutil.copy(real_runs.trained("base_s2", "--seed", "2") + "/metrics.jsonl", self.run)
        self.assertIn("was rewritten", self.once())
        self.expect_events()

    def test_other_folder(self):
        self.copy()
        logdir = os.path.join(os.path.dirname(self.run), "log")
        self.once("--logdir", logdir)
        self.expect_events(os.path.join(logdir, "run"))
        self.assertEqual(glob.glob(self.run + "/events*"), [])

    def test_live(self):
        """Started before the run, on the folder of runs; interrupted by Ctrl-C."""
        folder = os.path.dirname(self.run)
        follower = subprocess.Popen(real_runs.command_of(SCRIPT, folder, "--every", "0.1"),
                                    stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, text=True)
        try:
            real_runs.train(self.run)
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    with open(self.run + "/followed.json", encoding="utf-8") as file:
                        if json.load(file)["step"] == 40:
                            break
                except OSError:
                    pass
                time.sleep(0.1)
            self.expect_events()
            self.assertIn("is already being followed", self.once(expect=1))
        finally:
            follower.send_signal(signal.SIGINT)
            text, _ = follower.communicate(timeout=60)
        self.assertEqual(follower.returncode, 0, text)
        self.assertIn("run the same command again to continue", text)
        self.assertNotIn("Traceback", text)

    def test_refusals(self):
        self.assertIn("does not exist", self.once(expect=1))
        self.copy()
        with open(self.run + "/followed.json", "w", encoding="utf-8") as file:
            file.write("{")
        self.assertIn("hint: remove it", self.once(expect=1))

    @unittest.skipUnless(real_runs.have("wandb"), "wandb is missing")
    def test_wandb_offline(self):
        self.copy()
        lines = self.cut(15)
        self.once("--wandb", "droppath-test", env={"WANDB_MODE": "offline"})
        self.append(lines[15][40:] + b"".join(lines[16:]))
        self.once("--wandb", "droppath-test", env={"WANDB_MODE": "offline"})
        steps = []
        for path in sorted(glob.glob(self.run + "/wandb/offline-run-*/*.wandb")):
            steps += wandb_steps(path)
        self.assertEqual(sorted(steps), list(range(1, 41)))
        self.expect_events()


def wandb_steps(path):
    """The steps in the file of an offline run: 7 bytes, then protobufs in LevelDB's log format
    (doc/log_format.md)."""
    from wandb.proto import wandb_internal_pb2
    with open(path, "rb") as file:
        data = file.read()
    at, whole, steps = 7, b"", []
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:                      # no header fits: the block's rest is
                                                        # padding
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):                              # a full record, or the last part of one
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.HasField("history"):
                steps.append(record.history.step.num)
    return steps


@unittest.skipIf(real_runs.have("tensorboard"), "tensorboard is there")
class Missing(unittest.TestCase):
    def test_message(self):
        text = real_runs.run(SCRIPT, "--once", real_runs.trained("base_s1", "--seed", "1"),
                             expect=1)
        self.assertIn("tensorboard is missing: python3 -m pip install tensorboard", text)


if __name__ == "__main__":
    unittest.main()
