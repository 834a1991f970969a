#!/usr/bin/env python3
"""Copies metrics.jsonl of runs to TensorBoard's event files while they train, and to Weights &
Biases on request.

    scripts/tensorboard.py runs                 all runs in a folder, even later ones; Ctrl-C stops
    scripts/tensorboard.py --once runs/drop     a finished run
    scripts/tensorboard.py runs --wandb gpt     also to the project gpt of Weights & Biases
    tensorboard --logdir runs                   displays them

Event files are written into each run's folder, or into a folder of its name in --logdir. The script
can be stopped and restarted at any time without writing anything twice. If a resumed run repeats
steps, the new values replace the old ones. Needs tensorboard; with --wandb also wandb 0.20 or
newer, with WANDB_MODE=offline if there is no network.
"""
import argparse
import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
import zlib

from runs import (fail, find_runs, is_number, metrics_path, note, parse_record, read_config,
                  run_names)

TAGS = {                                                # others appear under their own name
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "val_ppl": "loss/validation_perplexity",
    "val_bpb": "loss/validation_bits_per_byte",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "drop_p": "drop_path/rate_of_last_layer",
    "kept_attn": "drop_path/kept_attn",
    "kept_mlp": "drop_path/kept_mlp",
    "flops_fraction": "drop_path/flops_fraction",
    "flops": "speed/flops_per_step",
    "ms": "speed/ms_per_step",
    "tok_per_s": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "tokens": "progress/tokens",
    "peak_bytes": "memory/peak_bytes",
}
STATE = "followed.json"                                 # beside the event files: what they contain
stop = threading.Event()                                # set by Ctrl-C, checked between lines


def tagged(record):
    numbers = {key: float(v) for key, v in record.items() if key != "step" and is_number(v)}
    return {tag_of(key): v for key, v in numbers.items() if math.isfinite(v)}


def tag_of(key):
    """Losses by depth (--eval-depths) go to the other losses."""
    return TAGS.get(key, f"loss/{key}" if key.startswith(("val_prefix_", "val_even_")) else key)


# ---- Sinks ----

class Events:
    """TensorBoard's event files in a folder. From the purged step on, earlier contents no longer
    count."""

    def __init__(self, folder, purge_step, config):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.writer = EventFileWriter(folder, max_queue_size=1000)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.add_event(self.event(step=purge_step, wall_time=time.time(), session_log=start))
        if purge_step == 0 and config:
            self.add_text("config", "".join(f"    {name} = {value}\n" for name,
                                            value in config.items()))

    def add(self, record, wall_time):
        values = [self.summary.Value(tag=tag, simple_value=v) for tag, v in tagged(record).items()]
        summary = self.summary(value=values)
        self.writer.add_event(self.event(step=int(record["step"]), wall_time=wall_time,
                                         summary=summary))

    def add_text(self, tag, markdown):
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        plugin = summary_pb2.SummaryMetadata(plugin_data=summary_pb2.SummaryMetadata.PluginData(
            plugin_name="text"))
        shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(
            size=1)])
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[markdown.encode()],
                                        tensor_shape=shape)
        value = self.summary.Value(tag=tag, metadata=plugin, tensor=tensor)
        self.writer.add_event(self.event(step=0, wall_time=time.time(),
                                         summary=self.summary(value=[value])))

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    """A run in Weights & Biases. It cannot retract values: when old ones are superseded, a new run
    is started."""

    def __init__(self, project, folder, name, id_, config):
        import wandb
        self.run = wandb.init(project=project, dir=folder, name=name, id=id_, resume="allow" if id_
                              else None,
                              config=config, reinit="create_new",
                              settings=wandb.Settings(console="off", silent=True))
        self.id = self.run.id

    def add(self, record, _):
        self.run.log(tagged(record), step=int(record["step"]))

    def close(self):
        self.run.finish()


# ---- One run: what is new in its metrics.jsonl ----

class Follower:
    """Records how much it has read: a number of bytes and their checksum. If they differ, the file
    was rewritten."""

    def __init__(self, run, name, options):
        self.path, self.name, self.options = metrics_path(run), name, options
        own = os.path.dirname(os.path.abspath(self.path))
        self.folder = os.path.join(options.logdir, name) if options.logdir else own
        os.makedirs(self.folder, exist_ok=True)
        self.state_path = os.path.join(self.folder, STATE)
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{self.folder} is already being followed by another tensorboard.py")
        except OSError:
            pass                                        # some network file systems have no locks
        self.sinks, self.file = [], None
        self.state = {"step": 0, "bytes": 0, "crc32": 0, "seconds": 0.0, "wandb": "", "begun": 0}
        try:
            with open(self.state_path, encoding="utf-8") as file:
                self.state.update(json.load(file))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as e:
            fail(f"cannot read {self.state_path}: {e}\n  hint: remove it; the event files will "
                 f"then be rewritten")
        if options.wandb and not self.state["wandb"]:   # it has nothing yet of what TensorBoard may
                                                        # have
            self.state.update(step=0, bytes=0, crc32=0, seconds=0.0)

    def open_sinks(self):
        config = read_config(self.path)
        try:
            self.sinks = [Events(self.folder, self.state["step"] + 1 if self.state["step"] else 0,
                                 config)]
            if self.options.wandb:
                name = self.name + (f" ({self.state['begun'] + 1})" if self.state["begun"] else "")
                self.sinks.append(Wandb(self.options.wandb, self.folder, name, self.state["wandb"]
                                        or None, config))
                self.state["wandb"] = self.sinks[-1].id
        except ImportError as e:
            fail(f"{e.name} is missing: python3 -m pip install {str(e.name).split('.')[0]}")

    def close(self):
        for sink in self.sinks:
            sink.close()
        if self.file:
            self.file.close()
        self.sinks, self.file = [], None

    def begin_anew(self):
        """Starts over when the file is not the one that was read: everything is written again, and
        old events are purged."""
        note(f"{self.path}: was rewritten by a resumed or another run; rewriting its events")
        self.close()
        self.state.update(step=0, bytes=0, crc32=0, seconds=0.0, wandb="",
                          begun=self.state["begun"] + 1)

    def is_new_file(self):
        """Whether metrics.jsonl is a different file from the open one, or has been truncated."""
        now, then = os.stat(self.path), os.fstat(self.file.fileno())
        return (now.st_ino, now.st_dev) != (then.st_ino,
                                            then.st_dev) or now.st_size < self.state["bytes"]

    def open_file(self):
        """Opens metrics.jsonl at the previous position; True if what was read of it is
        unchanged."""
        self.file = open(self.path, "rb")
        crc, left = 0, self.state["bytes"]
        while left:
            part = self.file.read(min(left, 1 << 20))
            if not part:
                return False
            crc, left = zlib.crc32(part, crc), left - len(part)
        return crc == self.state["crc32"]

    def lines(self):
        """Complete lines from the previous position on. An incomplete line is left for the next
        time."""
        while True:
            line = self.file.readline()
            if not line.endswith(b"\n"):
                self.file.seek(self.state["bytes"])
                return
            yield line
            self.state["crc32"] = zlib.crc32(line, self.state["crc32"])
            self.state["bytes"] += len(line)

    def poll(self):
        """Processes what is new; returns the number of steps."""
        try:
            if self.file and self.is_new_file():
                self.file.close()
                self.file = None
            if not self.file and not self.open_file():
                self.begin_anew()
                self.open_file()
        except FileNotFoundError:
            return 0                                    # the run has not started
        steps, start = 0, self.started()
        for line in self.lines():
            if stop.is_set():
                break
            try:
                record = parse_record(line)
            except ValueError as e:
                note(f"{self.path}: a line after step {self.state['step']} ignored: {e}")
                continue
            if record["step"] <= self.state["step"]:
                note(f"{self.path}: step {record['step']} after step {self.state['step']} ignored")
                continue
            if not self.sinks:
                self.open_sinks()
            self.state["seconds"] += record.get("ms",
                                                0) / 1000 if is_number(record.get("ms")) else 0
            for sink in self.sinks:
                sink.add(record, start + self.state["seconds"])
            self.state["step"] = int(record["step"])
            steps += 1
        if steps:
            self.save()
        return steps

    def started(self):
        """When the run started, so that TensorBoard's relative times are seconds of training."""
        try:
            return os.path.getmtime(os.path.join(os.path.dirname(self.path), "config.txt"))
        except OSError:
            return os.path.getmtime(self.path)

    def save(self):
        """Only after the events are on disk. Events written before a crash are purged at the next
        start."""
        self.sinks[0].flush()
        with open(self.state_path + ".part", "w", encoding="utf-8") as file:
            json.dump(self.state, file)
        os.replace(self.state_path + ".part", self.state_path)


# ---- All runs ----

def follow(options):
    followers = {}
    try:
        while not stop.is_set():
            found = find_runs(options.runs)
            for run, name in zip(found, run_names(found)):
                if options.once and not os.path.exists(metrics_path(run)):
                    fail(f"{metrics_path(run)} does not exist\n  hint: without --once, the script "
                         f"waits for it")
                if os.path.realpath(run) not in followers:
                    followers[os.path.realpath(run)] = Follower(run, name, options)
                    print(f"following {metrics_path(run)}", flush=True)
            if options.once and not followers:
                fail(f"{' '.join(options.runs)}: no run found")
            for f in followers.values():
                steps = f.poll()
                if options.once:
                    print(f"{f.folder}: {steps} new step{'s' * (steps != 1)}, {f.state['step']} in "
                          f"total")
            if options.once:
                return
            stop.wait(options.every)
        print("\nstopped: run the same command again to continue")
    except OSError as e:
        fail(f"{e.filename or 'the disk'}: {e.strerror}")
    finally:
        for f in followers.values():
            f.close()


def seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.05 to 3600")
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+",
                        help="a run's folder, its metrics.jsonl, or a folder of runs")
    parser.add_argument("--once", action="store_true", help="process what exists, then exit")
    parser.add_argument("--every", type=seconds, default=2.0, metavar="S",
                        help="polling interval in seconds (default 2)")
    parser.add_argument("--logdir", metavar="DIR", help="folder for the event files (default: each "
                        "run's own)")
    parser.add_argument("--wandb", metavar="PROJECT",
                        help="also log to this project of Weights & Biases")
    options = parser.parse_args()
    here = os.path.dirname(os.path.abspath(__file__))
    # tensorboard is the library, not this
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    try:
        import tensorboard.summary.writer.event_file_writer  # before anything is written
    except ImportError:
        fail("tensorboard is missing: python3 -m pip install tensorboard")
    if options.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            fail("wandb is missing: python3 -m pip install wandb")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    follow(options)


if __name__ == "__main__":
    main()
