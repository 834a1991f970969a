"""Token shards in llm.c's format, a run's progress, and the manifest, as described in
data/README.md."""
import hashlib
import json
import os
import struct

import numpy as np

from vocabulary import Problem

HEADER = 1024
FORMATS = {2: (20240520, 1), 4: (20240801, 7)}      # bytes per token: magic, version
MOST = 2 ** 31 - 1                                  # the header counts tokens in 31 bits


def write_whole(path, data):
    """Replaces a file atomically."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)        # it could be mistaken for output
        raise


def write_json(path, value):
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Writes DIR/SIDE_000000.bin, ...: each under a temporary name until it is complete."""

    def __init__(self, folder, side, width, limit, state=None):
        self.folder, self.side, self.width = folder, side, width
        self.limit = min(limit or MOST, MOST)
        self.shards, self.count, self.file = [], 0, None
        self.tokens = self.text_bytes = self.documents = 0
        if state:
            self.resume(state)

    def name(self):
        return f"{self.side}_{len(self.shards):06d}.bin"

    def path(self):
        return os.path.join(self.folder, self.name() + ".tmp")

    def state(self):
        """The state for resume(), after syncing the open shard to disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"shards": self.shards, "open": self.count, "tokens": self.tokens,
                "bytes": self.text_bytes,
                "documents": self.documents}

    def resume(self, state):
        self.shards, self.count = state["shards"], state["open"]
        self.tokens, self.text_bytes = state["tokens"], state["bytes"]
        self.documents = state["documents"]
        for shard in self.shards:
            path = os.path.join(self.folder, shard["file"])
            if not os.path.exists(path) or os.path.getsize(path) != shard["file_bytes"]:
                raise Problem(f"{path} is missing or has changed since the run was interrupted\n"
                              f"  hint: remove {self.folder} to start over")
        if self.count:
            end = HEADER + self.count * self.width
            final = os.path.join(self.folder, self.name())
            if os.path.exists(final) and not os.path.exists(self.path()):
                os.replace(final, self.path())  # it was finished after the last save
            if not os.path.exists(self.path()) or os.path.getsize(self.path()) < end:
                raise Problem(f"{self.path()} is missing or was truncated\n"
                              f"  hint: remove {self.folder} to start over")
            self.file = open(self.path(), "r+b")
            self.file.truncate(end)             # what was written after the last save is repeated
            self.file.seek(end)

    def append(self, tokens):
        """Appends an array of tokens of the writer's width."""
        while len(tokens):
            if not self.file:
                self.file = open(self.path(), "wb")
                self.file.write(bytes(HEADER))
            n = min(len(tokens), self.limit - self.count)
            self.file.write(tokens[:n].astype(f"<u{self.width}", copy=False).tobytes())
            self.count += n
            self.tokens += n
            tokens = tokens[n:]
            if self.count == self.limit:
                self.finish()

    def finish(self):
        """Writes the open shard's header and gives it its final name."""
        if not self.file:
            return
        magic, version = FORMATS[self.width]
        self.file.seek(0)
        self.file.write(struct.pack("<3i", magic, version, self.count))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        temporary, name = self.path(), self.name()
        entry = {"file": name, "tokens": self.count, "file_bytes": HEADER + self.count * self.width,
                 "sha256": sha256_file(temporary)}
        os.replace(temporary, os.path.join(self.folder, name))
        self.shards, self.count, self.file = self.shards + [entry], 0, None

    def summary(self):
        return {"tokens": self.tokens, "bytes": self.text_bytes, "documents": self.documents,
                "shards": self.shards}


def read_shard(path):
    """The tokens of a shard, as an array; for tests and inspection."""
    with open(path, "rb") as file:
        magic, version, count = struct.unpack("<3i", file.read(12))
        width = {v: k for k, v in FORMATS.items()}[magic, version]
        file.seek(HEADER)
        tokens = np.frombuffer(file.read(), dtype=f"<u{width}")
    assert len(tokens) == count, f"{path}: {len(tokens)} tokens, its header says {count}"
    return tokens
