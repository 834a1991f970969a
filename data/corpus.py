"""Where documents come from: files, folders, JSON lines, Parquet, standard input.

Inputs become sources, and a source yields units, each about a megabyte of text. Units are delimited
by position alone, so they are the same for any number of processes, and an interrupted run
continues at one of them.
"""
import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import stat
import sys
from collections import namedtuple

from vocabulary import Problem, decoded, library, refuse_pointer

UNIT = 1 << 20                          # bytes of text per unit
PART = 8 << 20                          # longer documents are encoded in parts, cut where no
                                        # tokenizer merges across
RECORD = 256 << 20                      # the longest line of JSON
SPLIT_BYTES = 1 << 20                   # how much of a document determines its side
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
PACKED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# kind: "text", "json", "parquet", or "files" (small ones, each a document); side: None, or "train"
# or "val" for all of it; size: bytes on disk; cut: for a single document, where its validation part
# begins
Source = namedtuple("Source", "kind paths side size cut")
# kind: "files" (data: paths), "documents" (a list of bytes), "json" (lines), "arrow" (a record
# batch), or "part" of a document (bytes; side: its side; last: whether end-of-text follows). where:
# for messages. advance: bytes of the input
Unit = namedtuple("Unit", "kind data where advance side last")


# ---- The sides ----

def side_of(document, val, seed):
    """The side of a document: a function of its content, so that duplicates never end up on both
    sides."""
    key = b"droppath split %d" % seed
    digest = hashlib.blake2b(document[:SPLIT_BYTES], digest_size=8, key=key).digest()
    return "val" if int.from_bytes(digest, "big") < val * 2.0 ** 64 else "train"


# ---- Inputs -> sources ----

def endings(path):
    """The kind of a file judging by its name, and whether it is compressed."""
    stem, last = os.path.splitext(path.lower())
    packed = last in COMPRESSED
    if packed:
        last = os.path.splitext(stem)[1]
    return "json" if last in JSON_ENDINGS else "parquet" if last == ".parquet" else "text", packed


def walk(folder, extensions):
    """The files below a folder, sorted by name, without links and hidden ones."""
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
    """Text has no zero byte; the first 8 KiB are checked."""
    try:
        with open(path, "rb") as file:
            return b"\0" in file.read(8192)
    except OSError as e:
        raise Problem(f"cannot read {path}: {e.strerror}")


def is_pipe(path):
    """Whether a path can be read only once and has no size: standard input, a named pipe, a shell's
    <(...)."""
    try:
        return path == "-" or stat.S_ISFIFO(os.stat(path).st_mode) or stat.S_ISSOCK(
            os.stat(path).st_mode)
    except OSError:
        return False                    # opening it will report the error


def title(path):
    return "standard input" if path == "-" else path


class Corpus:
    """The sources of some inputs, and what was skipped."""

    def __init__(self, options):
        self.options = options
        self.sources, self.listing = [], []     # listing: (path, size, time) of every file
        self.binary = self.empty = self.pipes = 0
        for inputs, side in ((options.inputs, "train" if options.val_inputs else None),
                             (options.val_inputs, "val")):
            self.add(inputs, side)
        if not self.sources:
            raise Problem(
                f"no text was found (skipped: {self.binary} binary files, {self.empty} empty ones)")
        self.cut_sole_document()

    def add(self, inputs, side):
        group, group_size = [], 0               # small files are collected into units

        def flush():
            nonlocal group, group_size
            if group:
                self.sources.append(Source("files", group, side, group_size, None))
            group, group_size = [], 0

        for path in self.files(inputs):
            pipe = is_pipe(path)
            kind, packed = ("text", False) if path == "-" else endings(path)
            kind = kind if self.options.format == "auto" else self.options.format
            size = 0 if pipe else self.size_of(path)
            if 0 < size < 1024:         # an LFS pointer is small
                refuse_pointer(path)
            if not pipe and kind == "text" and not packed and size and is_binary(path):
                self.binary += 1
                continue
            if not pipe and not size:
                self.empty += 1
                continue
            small = (not pipe and kind == "text" and not packed and size <= UNIT
                     and self.options.separate == "file")
            if small:
                if group_size + size > UNIT:
                    flush()
                group.append(path)
                group_size += size
                continue
            flush()
            if pipe and kind == "parquet":
                raise Problem(
                    f"{title(path)}: Parquet cannot be read from a pipe\n  hint: save it to a file")
            self.pipes += pipe
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
        """A single file that is a single document is split as in nanoGPT: its end is for
        validation."""
        o = self.options
        sole = len(self.sources) == 1 and len(
            self.sources[0].paths) == 1 and self.sources[0].kind in ("text", "files")
        if not sole or o.separate != "file" or o.val == 0 or self.sources[0].side:
            return
        source = self.sources[0]
        path = source.paths[0]
        if self.pipes or endings(path)[1]:
            raise Problem(
                f"{title(path)} is a single document, which cannot be split for validation\n"
                          "  hint: --separate line (or another separator), or --val 0")
        with open(path, "rb") as file:
            first = mark_length(file.read(3))
            cut = first + int((1 - o.val) * (source.size - first))
            file.seek(max(0, cut - 3))
            before = file.read(min(3, cut))
            after = file.read(1)
        while cut and before and after and 0x80 <= after[0] < 0xC0:   # not within a UTF-8 character
            cut, after, before = cut - 1, before[-1:], before[:-1]
        self.sources[0] = source._replace(cut=cut)

    @property
    def size(self):
        return sum(source.size for source in self.sources)

    @property
    def from_pipe(self):
        return self.pipes > 0

    def units(self, source):
        """The units of a source, in order. Their side is None if each document has its own."""
        o = self.options
        if source.kind == "parquet":
            return parquet_units(source, o.field)
        if source.cut is not None:
            return cut_units(source)
        if source.kind == "files":
            return iter([Unit("files", source.paths, source.paths[0], source.size, source.side,
                              True)])
        if source.kind == "json":
            return json_units(source)
        units = stream_units(source, separator_of(o.separate), o.val, o.seed)
        return drop_carriage_returns(units) if o.separate == "line" else units


def mark_length(beginning):
    """The length of the byte-order mark at the start of a file, or 0. It is never part of the
    text."""
    return 3 if beginning.startswith(BYTE_ORDER_MARK) else 0


# ---- Sources -> units ----

def separator_of(separate):
    if separate == "file":
        return None
    if separate == "line":
        return b"\n"
    escapes = {"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\\\": "\\", "\\0": "\0"}
    return re.sub(r"\\[nrt0\\]", lambda m: escapes[m[0]], separate).encode("utf-8",
        "surrogateescape")


class Stream:
    """The decompressed blocks of a file, each of UNIT bytes except the last. A leading byte-order
    mark is removed."""

    def __init__(self, path):
        self.path, self.name = path, title(path)

    def open(self):
        ending = os.path.splitext(self.path.lower())[1]
        if self.path == "-":
            return sys.stdin.buffer, None
        raw = open(self.path, "rb")
        if is_pipe(self.path):
            return raw, None
        if ending == ".zst":
            return library("zstandard").ZstdDecompressor().stream_reader(raw,
                read_across_frames=True), raw
        return (COMPRESSED[ending](raw) if ending in COMPRESSED else raw), raw

    def __iter__(self):
        """Yields (block, bytes of the file consumed)."""
        try:
            file, raw = self.open()
            first, at = True, 0
            while True:
                block = bytearray()
                while len(block) < UNIT:        # reads from a pipe may be short
                    more = file.read(UNIT - len(block))
                    if not more:
                        break
                    block += more
                if not block:
                    break
                if first and not raw and block.startswith(PACKED_MAGIC):
                    raise Problem(
                        f"{self.name} is compressed\n  hint: decompress it first, as in zcat FILE "
                        f"| ...")
                if first:
                    del block[:mark_length(block)]
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
    """A position <= most at which to cut a document: before the space of a word, or after a line
    end, with no other white space next to it. GPT-2's pattern and its successors always split
    there, so the tokens stay the same. If there is none within 64 KiB, a position between two
    characters."""
    low = max(0, most - (1 << 16))
    best = 0
    for match in re.finditer(rb"[!-~]\n(?=[!-~])|[!-~](?= [!-~])", held[low:most]):
        best = low + match.end()
    if best:
        return best
    while most > 1 and 0x80 <= held[most] < 0xC0:
        most -= 1
    return most


def separators(separator):
    """A regular expression for the separator between documents, and the length of its longest
    match. A line end may be CR LF."""
    if not separator or separator == b"\n" or b"\n" not in separator or b"\r" in separator:
        return None, len(separator or b"")
    return re.compile(re.escape(separator).replace(b"\\\n",
        b"\r?\n")), len(separator) + separator.count(b"\n")


def stream_units(source, separator, val, seed, stream=None):
    """Whole documents as they arrive; one longer than PART in parts. A line of JSON cannot be
    cut."""
    stream, records = stream or Stream(source.paths[0]), source.kind == "json"
    pattern, longest = separators(separator)
    held, searched, long_side, offset, kind = bytearray(
        ), 0, None, 0, "json" if records else "documents"
    for block, advance in stream:
        held += block
        where = (stream.name, offset)
        if separator and (pattern.search(held, searched) if pattern else held.find(separator,
            searched) >= 0):
            pieces = pattern.split(held) if pattern else bytes(held).split(separator)
            pieces = [bytes(p) for p in pieces] if pattern else pieces
            rest = pieces.pop()
            if long_side:
                yield Unit("part", pieces.pop(0), where, 0, long_side, True)
                long_side = None
            yield Unit(kind, pieces, where, advance, source.side, True)
            offset += len(held) - len(rest)
            held, advance = bytearray(rest), 0
        if records and len(held) > RECORD:
            raise Problem(f"{stream.name}, byte {offset}: a line of more than {RECORD >> 20} MiB\n"
                          "  hint: is it JSON lines, with one document per line?")
        while not records and len(held) > PART:
            cut = safe_cut(held, PART - longest)
            long_side = long_side or source.side or side_of(bytes(held[:SPLIT_BYTES]), val, seed)
            yield Unit("part", bytes(held[:cut]), (stream.name, offset), advance, long_side, False)
            del held[:cut]
            offset, advance = offset + cut, 0
        searched = max(0, len(held) - longest + 1)
    if long_side:
        yield Unit("part", bytes(held), (stream.name, offset), 0, long_side, True)
    elif held:
        yield Unit(kind, [bytes(held)], (stream.name, offset), 0, source.side, True)


def json_units(source):
    """The records of a file: its lines, or the elements of the single array that it contains."""
    class Rest:                         # the stream, after its beginning was inspected
        def __init__(self, name, blocks):
            self.name, self.blocks = name, blocks

        def __iter__(self):
            return self.blocks

    stream = Stream(source.paths[0])
    blocks = iter(stream)
    first = next(blocks, (b"", 0))
    rest = Rest(stream.name, itertools.chain([first], blocks))
    return array_units(rest, source) if first[0].lstrip()[:1] == b"[" else stream_units(source,
        b"\n", 0, 0, rest)


def array_units(stream, source):
    """The elements of a JSON array, without holding all of it. Decoded as Latin-1, so that a
    character is a byte."""
    scan = json.JSONDecoder(strict=False, parse_int=len, parse_float=len).raw_decode
    held, offset, elements, size, taken, count = "", 0, [], 0, 0, 0
    blocks, ended, opened, closed, want = iter(stream), False, False, False, 0

    def wrong(at, what):
        return Problem(
            f"{stream.name}, byte {offset + at}: {what}\n  hint: is it one array, or one JSON "
            f"object per line?")

    while True:
        at = 0
        while len(held) > want or ended:
            at = skip_space(held, at)
            if at == len(held) and not ended:
                break
            if closed:
                if at < len(held):
                    raise wrong(at, "more follows the array")
                break
            if not opened:
                opened, at = True, at + 1
                continue
            if held[at:at + 1] == "]":
                closed, at = True, at + 1
                continue
            try:
                value, end = scan(held, at)
            except RecursionError:
                raise wrong(at, "nested too deeply")
            except ValueError:
                end = None
            after = skip_space(held, end) if end else len(held)
            if after == len(held):      # the element may be incomplete
                if ended or len(held) - at > RECORD:
                    raise wrong(at, "the array is cut short, or this is not JSON")
                want = at + 2 * (len(held) - at)
                break
            if held[after] not in ",]":
                raise wrong(after, "not JSON: a comma or ] is missing")
            elements.append(held[at:end].encode("latin-1"))
            size += end - at
            at, want = after + (held[after] == ","), 0
            if size >= UNIT:
                yield Unit("json", elements, (stream.name, count, "element"), taken, source.side,
                           True)
                elements, size, taken, count = [], 0, 0, count + len(elements)
        held, offset, want = held[at:], offset + at, max(0, want - at)
        if ended:
            break
        block, advance = next(blocks, (b"", 0))
        held, taken, ended = held + block.decode("latin-1"), taken + advance, not block
    if elements:
        yield Unit("json", elements, (stream.name, count, "element"), taken, source.side, True)


def skip_space(text, at):
    return re.compile(r"[ \t\r\n]*").match(text, at).end()


def drop_carriage_returns(units):
    for unit in units:
        if unit.kind == "documents":
            unit = unit._replace(data=[d[:-1] if d.endswith(b"\r") else d for d in unit.data])
        elif unit.last and unit.data.endswith(b"\r"):
            unit = unit._replace(data=unit.data[:-1])
        yield unit


def cut_units(source):
    """A single document's training part and validation part, both without end-of-text."""
    path = source.paths[0]
    try:
        with open(path, "rb") as file:
            file.seek(mark_length(file.read(3)))
            for side, end in (("train", source.cut), ("val", source.size)):
                while file.tell() < end:
                    at = file.tell()
                    block = file.read(min(PART, end - at))
                    if not block:
                        raise Problem(f"{path} was truncated while it was read")
                    if at + len(block) < end:
                        cut = safe_cut(block, len(block) - 1)
                        file.seek(at + cut)
                        block = block[:cut]
                    yield Unit("part", block, (path, at), len(block), side, False)
    except OSError as e:
        raise Problem(f"cannot read {path}: {e.strerror}")


def is_text(kind):
    """Whether a column of this Arrow type holds text, or only NULLs."""
    pa = library("pyarrow")
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    known = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view",
             "fixed_size_binary",
             "null")
    return any(getattr(pa.types, "is_" + name, lambda k: False)(kind) for name in known)


def parquet_units(source, field):
    """The field's values, in record batches of about UNIT bytes."""
    path, side = source.paths[0], source.side
    pa, pq = library("pyarrow"), library("pyarrow.parquet")
    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        if field not in columns:
            names = ", ".join(columns)
            raise Problem(f"{path} has no column {field}\n  hint: --field NAME; it has {names}")
        if columns.count(field) > 1:
            raise Problem(f"{path} has {columns.count(field)} columns {field}\n"
                          "  hint: rename one: it is unclear which holds the text")
        kind = file.schema_arrow.field(field).type
        if not is_text(kind):
            raise Problem(
                f"{path}: the column {field} is of type {kind}, not text\n  hint: --field NAME")
        held, held_size, row = [], 0, 0
        share = source.size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
            held.append(as_bytes(batch.column(0)))
            held_size += held[-1].nbytes
            if held_size >= UNIT:
                rows = sum(len(c) for c in held)
                yield Unit("arrow", packed_arrow(held), (path, row), rows * share, side, True)
                held, held_size, row = [], 0, row + rows
        if held:
            yield Unit("arrow", packed_arrow(held), (path, row), sum(len(c) for c in held) * share,
                       side, True)
    except (OSError, pa.ArrowException) as e:
        raise Problem(f"cannot read {path}: {str(e).splitlines()[0]}")


def as_bytes(column):
    """A text column of any type as bytes, UTF-8 or not."""
    pa = library("pyarrow")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type) or pa.types.is_fixed_size_binary(column.type):
        return pa.array(column.to_pylist(), pa.large_binary())
    return column.cast(pa.large_binary())


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
        found = (v for batch in reader for v in batch.column(0).to_pylist())
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
    return data[mark_length(data):]


def json_value(line):
    """The value of a line (bytes), or None if it is not JSON, and whether some of its bytes were
    not UTF-8."""
    text, bad = decoded(line[mark_length(line):])
    for whole in (int, lambda digits: int(digits) if len(digits) < 4000 else float(digits)):
        try:
            return json.loads(text, parse_int=whole, object_pairs_hook=pairs_once), bad
        except json.JSONDecodeError:
            break
        except ValueError:              # more digits than Python converts to a number
            continue
        except RecursionError:
            break
    return None, bad


class Twice(dict):
    """An object with duplicate names, which are `names`."""
    names = ()


def pairs_once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        found = Twice(found)
        seen = set()
        found.names = {n for n, value in pairs if n in seen or seen.add(n)}
    return found


def utf8(text):
    """The bytes of a text, and whether it had unpaired surrogates, each of which becomes U+FFFD."""
    try:
        return text.encode(), False
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode(), True


def json_documents(unit, options, counts):
    name, at, *element = unit.where
    for line in unit.data:
        start, at = at, at + (1 if element else len(line) + 1)
        if not line.strip():
            continue
        record, bad = json_value(line)
        text = record.get(options.field) if isinstance(record, dict) else None
        twice = isinstance(record, Twice) and options.field in record.names
        where = f"{name}, element {start + 1}" if element else f"{name}, byte {start}"
        what = "element" if element else "line"
        if isinstance(text, str) and not twice:
            document, halves = utf8(text)
            counts["invalid"] += bad or halves
            yield document
        elif isinstance(record, dict) and options.field in record and text is None and not twice:
            yield b""                   # NULL is not text: counted as an empty document
        elif options.skip_bad:
            counts["bad"] += 1
        elif not isinstance(record, dict):
            raise Problem(f"{where}: this {what} is not a JSON object\n"
                          "  hint: --skip-bad skips such lines")
        elif twice:
            raise Problem(f"{where}: this {what} has \"{options.field}\" twice\n"
                          "  hint: --skip-bad skips such lines")
        elif options.field in record:
            raise Problem(f"{where}: \"{options.field}\" is not text\n"
                          "  hint: --skip-bad skips such lines")
        else:
            raise Problem(f"{where}: there is no \"{options.field}\"\n"
                          f"  hint: --field NAME; this {what} has "
                          f"{', '.join(map(str, record))[:200]}")
