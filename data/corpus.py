"""Where documents come from: files, folders, JSON lines, Parquet, standard input.

Inputs become sources, and a source gives units, each about a megabyte of text. Units are cut by position alone, so they
are the same for any number of processes, and a run that was interrupted goes on at one of them.
"""
import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
from collections import namedtuple

from vocabulary import Problem, library

UNIT = 1 << 20                          # bytes of text in a unit
PART = 8 << 20                          # longer documents are encoded in parts, cut where no tokenizer looks across
RECORD = 256 << 20                      # the longest line of JSON
SPLIT_BYTES = 1 << 20                   # what of a document decides on its side
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")

# kind: "text", "json", "parquet", or "files": small ones, of which each is a document; side: None, or "train" or "val"
# for all of it; size: bytes on the disk; cut: where the end of a sole document begins, on which to validate
Source = namedtuple("Source", "kind paths side size cut")
# kind: "files" (data: paths), "documents" (a list of bytes), "json" (lines), "arrow" (a record batch), or "part" of a
# document (bytes; side: its side; last: whether end-of-text follows). where: for messages. advance: bytes of the input
Unit = namedtuple("Unit", "kind data where advance side last")


# ---- The sides ----

def side_of(document, val, seed):
    """Which side a document belongs to: a function of its content, so that equal ones never come to both."""
    key = b"droppath split %d" % seed
    digest = hashlib.blake2b(document[:SPLIT_BYTES], digest_size=8, key=key).digest()
    return "val" if int.from_bytes(digest, "big") < val * 2.0 ** 64 else "train"


# ---- Inputs -> sources ----

def endings(path):
    """The kind of a file by its name, and whether it is compressed."""
    stem, last = os.path.splitext(path.lower())
    packed = last in COMPRESSED
    if packed:
        last = os.path.splitext(stem)[1]
    return "json" if last in JSON_ENDINGS else "parquet" if last == ".parquet" else "text", packed


def walk(folder, extensions):
    """The files below a folder in the order of their names, without links and hidden ones."""
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as e:
        raise Problem(f"cannot read {folder}: {e.strerror}")
    for entry in entries:
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            yield from walk(entry.path, extensions)
        elif entry.is_file() and (not extensions or entry.name.endswith(extensions)):
            yield entry.path


def is_binary(path):
    """Text has no zero byte; one in the first 8 KiB tells."""
    try:
        with open(path, "rb") as file:
            return b"\0" in file.read(8192)
    except OSError as e:
        raise Problem(f"cannot read {path}: {e.strerror}")


class Corpus:
    """The sources of some inputs, and what was left out."""

    def __init__(self, options):
        self.options = options
        self.sources, self.listing = [], []     # listing: (path, size, time) of every file
        self.binary = self.empty = 0
        for inputs, side in ((options.inputs, "train" if options.val_inputs else None), (options.val_inputs, "val")):
            self.add(inputs, side)
        if not self.sources:
            raise Problem(f"no text was found (left out: {self.binary} binary files, {self.empty} empty ones)")
        self.cut_sole_document()

    def add(self, inputs, side):
        group, group_size = [], 0               # small files wait here until they are a unit

        def flush():
            nonlocal group, group_size
            if group:
                self.sources.append(Source("files", group, side, group_size, None))
            group, group_size = [], 0

        for path in self.files(inputs):
            kind, packed = ("text", False) if path == "-" else endings(path)
            kind = kind if self.options.format == "auto" else self.options.format
            size = 0 if path == "-" else self.size_of(path)
            if path != "-" and kind == "text" and not packed and size and is_binary(path):
                self.binary += 1
                continue
            if path != "-" and not size:
                self.empty += 1
                continue
            small = path != "-" and kind == "text" and not packed and self.options.separate == "file" and size <= UNIT
            if small:
                if group_size + size > UNIT:
                    flush()
                group.append(path)
                group_size += size
                continue
            flush()
            if path == "-" and kind == "parquet":
                raise Problem("Parquet cannot be read from standard input\n  hint: save it to a file")
            self.sources.append(Source(kind, [path], side, size, None))
        flush()

    def files(self, inputs):
        for path in inputs:
            if path == "-":
                yield path
            elif os.path.isdir(path):
                yield from walk(path, self.options.extensions)
            else:
                yield path

    def size_of(self, path):
        try:
            stat = os.stat(path)
        except OSError as e:
            raise Problem(f"cannot read {path}: {e.strerror}")
        self.listing.append((path, stat.st_size, stat.st_mtime_ns))
        return stat.st_size

    def cut_sole_document(self):
        """One file that is one document is cut like nanoGPT's: its end is to validate on."""
        o = self.options
        sole = len(self.sources) == 1 and len(self.sources[0].paths) == 1 and self.sources[0].kind in ("text", "files")
        if not sole or o.separate != "file" or o.val == 0 or self.sources[0].side:
            return
        source = self.sources[0]
        path = source.paths[0]
        if path == "-" or endings(path)[1]:
            name = "standard input" if path == "-" else path
            raise Problem(f"{name} is a single document, of which none can be kept to validate on\n"
                          "  hint: --separate line (or another separator), or --val 0")
        cut = int((1 - o.val) * source.size)
        with open(path, "rb") as file:
            file.seek(max(0, cut - 3))
            before = file.read(min(3, cut))
            after = file.read(1)
        while cut and before and after and 0x80 <= after[0] < 0xC0:   # not within a character of UTF-8
            cut, after, before = cut - 1, before[-1:], before[:-1]
        self.sources[0] = source._replace(cut=cut)

    @property
    def size(self):
        return sum(source.size for source in self.sources)

    @property
    def from_stdin(self):
        return any("-" in source.paths for source in self.sources)

    def units(self, source):
        """The units of a source, in order. Their side is None where each document has its own."""
        o = self.options
        if source.kind == "parquet":
            return parquet_units(source, o.field)
        if source.cut is not None:
            return cut_units(source)
        if source.kind == "files":
            return iter([Unit("files", source.paths, source.paths[0], source.size, source.side, True)])
        units = stream_units(source, b"\n" if source.kind == "json" else separator_of(o.separate), o.val, o.seed)
        return drop_carriage_returns(units) if o.separate == "line" and source.kind == "text" else units


# ---- Sources -> units ----

def separator_of(separate):
    if separate == "file":
        return None
    if separate == "line":
        return b"\n"
    escapes = {"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\\\": "\\", "\\0": "\0"}
    return re.sub(r"\\[nrt0\\]", lambda m: escapes[m[0]], separate).encode()


class Stream:
    """The blocks of a file, unpacked, each of UNIT bytes but the last. A byte-order mark at its start is left out."""

    def __init__(self, path):
        self.path, self.name = path, "standard input" if path == "-" else path

    def open(self):
        ending = os.path.splitext(self.path.lower())[1]
        if self.path == "-":
            return sys.stdin.buffer, None
        raw = open(self.path, "rb")
        if ending == ".zst":
            return library("zstandard").ZstdDecompressor().stream_reader(raw, read_across_frames=True), raw
        return (COMPRESSED[ending](raw) if ending in COMPRESSED else raw), raw

    def __iter__(self):
        """Yields (block, bytes of the file that it took)."""
        try:
            file, raw = self.open()
            first, at = True, 0
            while True:
                block = bytearray()
                while len(block) < UNIT:        # a pipe gives less at a time
                    more = file.read(UNIT - len(block))
                    if not more:
                        break
                    block += more
                if not block:
                    break
                if first and block.startswith(b"\xef\xbb\xbf"):
                    del block[:3]
                first = False
                now = raw.tell() if raw else at + len(block)
                yield bytes(block), now - at
                at = now
            if raw:
                raw.close()
        except (OSError, EOFError, lzma.LZMAError) as e:
            raise Problem(f"cannot read {self.name}: {getattr(e, 'strerror', None) or e}")
        except Exception as e:
            if type(e).__name__ != "ZstdError":
                raise
            raise Problem(f"cannot read {self.name}: {e}")


def safe_cut(held, most):
    """A place <= most to cut a document: before a word's space, or after a line's end, with no other white space there.
    GPT-2's expression and its successors cut there in any case, so that the tokens stay the same. Where there is none
    within 64 KiB: between two characters."""
    low = max(0, most - (1 << 16))
    best = 0
    for match in re.finditer(rb"[!-~]\n(?=[!-~])|[!-~](?= [!-~])", held[low:most]):
        best = low + match.end()
    if best:
        return best
    while most > 1 and 0x80 <= held[most] < 0xC0:
        most -= 1
    return most


def stream_units(source, separator, val, seed):
    """Whole documents as they come; one longer than PART in parts. A line of JSON cannot be cut."""
    stream, records = Stream(source.paths[0]), source.kind == "json"
    held, searched, long_side, offset, kind = bytearray(), 0, None, 0, "json" if records else "documents"
    for block, advance in stream:
        held += block
        where = (stream.name, offset)
        if separator and held.find(separator, searched) >= 0:
            pieces = bytes(held).split(separator)
            rest = pieces.pop()
            if long_side:
                yield Unit("part", pieces.pop(0), where, 0, long_side, True)
                long_side = None
            yield Unit(kind, pieces, where, advance, source.side, True)
            offset += len(held) - len(rest)
            held, advance = bytearray(rest), 0
        if records and len(held) > RECORD:
            raise Problem(f"{stream.name}, byte {offset}: a line of more than {RECORD >> 20} MiB\n"
                          "  hint: is it JSON lines, one document a line?")
        while not records and len(held) > PART:
            cut = safe_cut(held, PART - len(separator or b""))
            long_side = long_side or source.side or side_of(bytes(held[:SPLIT_BYTES]), val, seed)
            yield Unit("part", bytes(held[:cut]), (stream.name, offset), advance, long_side, False)
            del held[:cut]
            offset, advance = offset + cut, 0
        searched = max(0, len(held) - len(separator or b"") + 1)
    if long_side:
        yield Unit("part", bytes(held), (stream.name, offset), 0, long_side, True)
    elif held:
        yield Unit(kind, [bytes(held)], (stream.name, offset), 0, source.side, True)


def drop_carriage_returns(units):
    for unit in units:
        if unit.kind == "documents":
            unit = unit._replace(data=[d[:-1] if d.endswith(b"\r") else d for d in unit.data])
        elif unit.last and unit.data.endswith(b"\r"):
            unit = unit._replace(data=unit.data[:-1])
        yield unit


def cut_units(source):
    """The sole document's beginning to train on and its end to validate on, both without end-of-text."""
    path = source.paths[0]
    try:
        with open(path, "rb") as file:
            for side, end in (("train", source.cut), ("val", source.size)):
                while file.tell() < end:
                    at = file.tell()
                    block = file.read(min(PART, end - at))
                    if not block:
                        raise Problem(f"{path} has become shorter while it was read")
                    if at + len(block) < end:
                        cut = safe_cut(block, len(block) - 1)
                        file.seek(at + cut)
                        block = block[:cut]
                    yield Unit("part", block, (path, at), len(block), side, False)
    except OSError as e:
        raise Problem(f"cannot read {path}: {e.strerror}")


def parquet_units(source, field):
    """The field's values, in record batches of about UNIT bytes."""
    path, side = source.paths[0], source.side
    pa, pq = library("pyarrow"), library("pyarrow.parquet")
    try:
        file = pq.ParquetFile(path)
        if field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise Problem(f"{path} has no column {field}\n  hint: --field NAME; it has {names}")
        kind = file.schema_arrow.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise Problem(f"{path}: the column {field} is of type {kind}, not text\n  hint: --field NAME")
        held, held_size, row = [], 0, 0
        share = source.size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
            held.append(batch.column(0))
            held_size += batch.nbytes
            if held_size >= UNIT:
                rows = sum(len(c) for c in held)
                yield Unit("arrow", packed_arrow(held), (path, row), rows * share, side, True)
                held, held_size, row = [], 0, row + rows
        if held:
            yield Unit("arrow", packed_arrow(held), (path, row), sum(len(c) for c in held) * share, side, True)
    except (OSError, pa.ArrowException) as e:
        raise Problem(f"cannot read {path}: {str(e).splitlines()[0]}")


def packed_arrow(columns):
    pa = library("pyarrow")
    batch = pa.record_batch([pa.concat_arrays(columns)], names=["text"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


# ---- Units -> documents, in a worker process ----

def documents(unit, options, counts):
    """The unit's documents (bytes), without empty ones."""
    if unit.kind == "files":
        found = (read_document(path) for path in unit.data)
    elif unit.kind == "json":
        found = json_documents(unit, options, counts)
    elif unit.kind == "arrow":
        reader = library("pyarrow").ipc.open_stream(unit.data)
        found = (None if v is None else v.encode() for batch in reader for v in batch.column(0).to_pylist())
    else:
        found = unit.data
    for document in found:
        if document:
            yield document
        else:
            counts["empty"] += 1


def read_document(path):
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as e:
        raise Problem(f"cannot read {path}: {e.strerror}")
    return data[3:] if data.startswith(b"\xef\xbb\xbf") else data


def json_documents(unit, options, counts):
    name, at = unit.where
    for line in unit.data:
        start, at = at, at + len(line) + 1
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            counts["invalid"] += 1
            record = loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            record = None
        text = record.get(options.field) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield text.encode("utf-8", "replace")
        elif options.skip_bad:
            counts["bad"] += 1
        elif not isinstance(record, dict):
            raise Problem(f"{name}, byte {start}: this line is no JSON object\n"
                          "  hint: --skip-bad leaves such lines out")
        elif options.field in record:
            raise Problem(f"{name}, byte {start}: \"{options.field}\" is no text\n"
                          "  hint: --skip-bad leaves such lines out")
        else:
            raise Problem(f"{name}, byte {start}: there is no \"{options.field}\"\n"
                          f"  hint: --field NAME; this line has {', '.join(map(str, record))[:200]}")


def loads(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
