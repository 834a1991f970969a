#!/usr/bin/env python3
"""Converts text of any size to token shards, a tokenizer file and a manifest, in bounded memory.

    data/prepare.py --out data/mine ~/texts notes.txt
        files and folders, each file a document
    data/prepare.py --out data/web --val 0.001 crawl/*.jsonl.gz
        lines of JSON, using their field "text"
    data/prepare.py --out data/small --tokenizer bpe --vocab-size 8192 books/
        with a byte-pair encoding trained on the text
    zcat all.txt.gz | data/prepare.py --out data/all --tokenizer bytes --separate '\\n\\n' -
        standard input, documents separated by blank lines

Tokenizers: gpt2 (tiktoken), bytes, bpe (trained on the text), a tokenizer.json (tokenizers), or a
folder with one or with GPT-2's encoder.json and vocab.bpe. If interrupted, the same command
continues. Details: data/README.md.
"""
import argparse
import decimal
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import vocabulary as vocabularies       # first: it reports a missing numpy
import corpus as corpora
import numpy as np
from shards import MOST, ShardWriter, sha256_file, write_json, write_whole
from vocabulary import Problem

SAVE_SECONDS = 20                       # bounds the work repeated after an interruption
SIDES = ("train", "val")
# Settings that determine the output. --skip-bad does not: it lets a run continue where it stopped
# without it, after the same tokens.
SETTINGS = ("format", "field", "separate", "val", "seed", "shard_tokens")


# ---- A worker process: units -> tokens ----

worker = None                           # (vocabulary, options) of this process


def start_worker(vocabulary, options):
    global worker
    worker = vocabulary, options
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def start_worker_process(vocabulary, options):
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the main process ends the run
    start_worker(vocabulary, options)


def pieces_of(document):
    """The document, or the parts of a long one, which bounds the memory used at a time."""
    while len(document) > corpora.PART:
        cut = corpora.safe_cut(document, corpora.PART)
        yield document[:cut]
        document = document[cut:]
    yield document


def encode_unit(unit):
    """The tokens of each side, and the counters."""
    vocabulary, options = worker
    counts, pieces, of = Counter(), [], []          # of: (side, whether it ends a document) for
                                                    # each piece
    if unit.kind == "part":
        pieces, of = [unit.data], [(unit.side, unit.last)]
        counts[unit.side, "documents"] += unit.last
    else:
        for document in corpora.documents(unit, options, counts):
            side = unit.side or corpora.side_of(document, options.val, options.seed)
            counts[side, "documents"] += 1
            for piece in pieces_of(document):
                pieces.append(piece)
                of.append((side, False))
            of[-1] = side, True
    kind = np.uint16 if vocabulary.width == 2 else np.uint32
    end, parts = np.array([vocabulary.end_of_text], dtype=kind), {side: [] for side in SIDES}
    for (tokens, size, bad), (side, last) in zip(vocabulary.encode(pieces), of):
        counts[side, "bytes"] += size
        counts["invalid"] += bad
        parts[side].append(tokens)
        if last:
            parts[side].append(end)
    return {side: np.concatenate(p) if p else np.empty(0, dtype=kind) for side,
            p in parts.items()}, counts


class Done:
    """A completed future."""

    def __init__(self, value):
        self.value = value

    def result(self):
        return self.value


class Here:
    """Replaces ProcessPoolExecutor for a single process."""

    def submit(self, function, argument):
        return Done(function(argument))

    def shutdown(self, **_):
        pass


# ---- The main process ----

class Run:
    """One preparation: from a corpus and a vocabulary to the files in a folder."""

    def __init__(self, options, corpus):
        self.options, self.corpus, self.out = options, corpus, options.out
        self.progress_path = os.path.join(self.out, "progress.json")
        self.manifest_path = os.path.join(self.out, "manifest.json")
        # at: source, and unit within it
        self.at, self.counts, self.saved = (0, 0), Counter(), time.monotonic()
        self.settings, self.within_a_unit = self.hash_settings(), False

    def hash_settings(self):
        """Everything that determines the output except the tokenizer's files."""
        o = self.options
        chosen = {name: getattr(o, name) for name in SETTINGS}
        chosen["tokenizer"] = [o.tokenizer, o.end_of_text]
        if o.tokenizer == "bpe":
            chosen["tokenizer"] += [o.vocab_size, o.train_bytes]
        chosen["files"] = self.corpus.listing
        chosen["inputs"] = [[s.kind, s.paths, s.side] for s in self.corpus.sources]
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def look(self):
        """What an earlier run left: True if it is complete, its progress if it can be continued, or
        None. Refuses foreign data."""
        if os.path.exists(self.manifest_path):
            manifest = read_json(self.manifest_path)
            as_strict = self.options.skip_bad or not manifest.get("left_out", {}).get("bad_records")
            if not self.corpus.from_pipe and manifest.get(
                "settings") == self.settings and as_strict:
                return True
            raise Problem(
                f"{self.out} holds other data already\n  hint: choose another --out, or remove it")
        if os.path.exists(self.progress_path):
            progress = read_json(self.progress_path)
            as_strict = self.options.skip_bad or not progress.get("counts", {}).get("bad")
            same = progress.get("settings") == self.settings and as_strict
            if progress.get("failed") and (self.corpus.from_pipe or not same):
                say(f"{self.out} held the output of a failed run with other options or input: "
                    f"removed")
                self.discard(progress["tokenizer"])
                return None
            if self.corpus.from_pipe:
                raise Problem(
                    f"{self.out} holds an interrupted run, and a pipe cannot be continued\n"
                              f"  hint: remove {self.out} to start over")
            if not same:
                raise Problem(
                    f"{self.out} holds an interrupted run with other options, or its input has "
                    f"changed\n"
                              f"  hint: use the same options and input, or remove {self.out} to "
                              f"start over")
            return progress
        names = sorted(os.listdir(self.out)) if os.path.isdir(self.out) else []
        foreign = [n for n in names if n.endswith(".bin") and n != "tokenizer.bin"]
        if foreign:
            raise Problem(
                f"{self.out} holds {foreign[0]}, which belongs to other data\n  hint: choose "
                f"another --out")
        return None

    def discard(self, tokenizer):
        """Removes what this preparation has made, progress.json last, so that the folder is free
        for another one."""
        names = sorted(os.listdir(self.out))
        made = [n for n in names if re.fullmatch(r"(train|val)_\d{6,}\.bin(\.tmp)?", n)]
        for name, digest in tokenizer["files"].items():
            if name in names and sha256_file(os.path.join(self.out, name)) == digest:
                made.append(name)
        for name in made + ["progress.json"]:
            os.remove(os.path.join(self.out, name))

    def open_vocabulary(self, progress):
        """The vocabulary. Its files are written before any shard, and after progress.json, which
        records them."""
        o = self.options
        path = os.path.join(self.out, "tokenizer.json")
        if o.tokenizer != "bpe":
            vocabulary = vocabularies.load(o.tokenizer, o.end_of_text)
        elif progress and os.path.exists(path):
            vocabulary = vocabularies.load_json(path)
        else:
            text = vocabularies.train_bpe(self.sample(), o.vocab_size)
            vocabulary = vocabularies.JsonVocabulary("tokenizer.json", text)
        if o.tokenizer == "bpe":
            vocabulary.name = "bpe"
        os.makedirs(self.out, exist_ok=True)
        files, table, self.tokenizer_files = {}, vocabularies.tokenizer_bin(vocabulary), []
        for name, data in (("tokenizer.bin", table), ("tokenizer.json", vocabulary.json
            and vocabulary.json.encode())):
            if data:
                files[name] = hashlib.sha256(data).hexdigest()
                self.tokenizer_files.append((os.path.join(self.out, name), data))
        if not table:
            say("warning: this tokenizer's tokens have no fixed bytes: generate gets no "
                "tokenizer.bin")
        elif vocabularies.encodes_otherwise(vocabulary):
            say(f"note: {vocabularies.encodes_otherwise(vocabulary)}: build/generate shows its "
                f"text, but cannot encode a "
                "prompt")
        main = "tokenizer.bin" if table else "tokenizer.json"
        self.tokenizer = {"name": vocabulary.name, "vocab_size": vocabulary.size,
                          "end_of_text": vocabulary.end_of_text,
                          "file": main, "sha256": files[main], "files": files}
        if progress and progress["tokenizer"] != self.tokenizer:
            raise Problem(f"{self.out} holds an interrupted run with another tokenizer\n"
                          f"  hint: use the same tokenizer, or remove {self.out} to start over")
        for path, data in self.tokenizer_files:
            if os.path.exists(path) and vocabularies.read(path) != data:
                raise Problem(f"{path} belongs to another tokenizer\n  hint: choose another --out")
        self.vocabulary = vocabulary

    def write_tokenizer(self):
        for path, data in self.tokenizer_files:
            if not os.path.exists(path):
                write_whole(path, data)

    def sample(self):
        """Documents to train a tokenizer on: from the training side, about train_bytes of them,
        chosen by the hash of their content."""
        o = self.options
        if self.corpus.from_pipe:
            raise Problem("--tokenizer bpe reads its text twice, which a pipe does not allow\n"
                          "  hint: save it to a file")
        share = o.train_bytes / max(1, self.corpus.size)
        say(f"training a tokenizer of {o.vocab_size} tokens on "
            f"{'all' if share >= 1 else f'{share:.1%}'} of the text")
        for source in self.corpus.sources:
            for unit in self.corpus.units(source):
                if unit.kind == "part":
                    found = [unit.data] if unit.side == "train" else []
                else:
                    found = (d for d in corpora.documents(unit, o, Counter())
                             if (unit.side or corpora.side_of(d, o.val, o.seed)) == "train")
                for document in found:
                    if share >= 1 or corpora.side_of(document, share, o.seed + 1) == "val":
                        yield from pieces_of(document)

    def save(self, failed=False):
        """failed: by an error that other options may avoid, not by an interruption."""
        write_json(self.progress_path, {
            "settings": self.settings, "failed": failed, "tokenizer": self.tokenizer,
            "source": self.at[0], "unit": self.at[1],
            "counts": {k: self.counts[k] for k in ("empty", "invalid", "bad")},
            **{side: self.writers[side].state() for side in SIDES}})
        self.saved = time.monotonic()

    def units(self):
        """The units from the current position on, each with the position that follows it."""
        source, unit = self.at
        for i in range(source, len(self.corpus.sources)):
            for j, found in enumerate(self.corpus.units(self.corpus.sources[i])):
                yield (i, j + 1), found, i == source and j < unit
            unit = 0

    def take(self, place, result):
        arrays, counts = result
        self.within_a_unit = True
        for side in SIDES:
            writer = self.writers[side]
            writer.append(arrays[side])
            writer.text_bytes += counts[side, "bytes"]
            writer.documents += counts[side, "documents"]
        for key in ("empty", "invalid", "bad"):
            self.counts[key] += counts[key]
        self.at = place
        self.within_a_unit = False
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def encode(self):
        """Sends units to the processes and yields their tokens in order; only a few units are in
        flight at a time."""
        o = self.options
        if o.processes == 1:
            start_worker(self.vocabulary, o)
            pool = Here()
        else:
            pool = ProcessPoolExecutor(o.processes, multiprocessing.get_context("spawn"),
                                       start_worker_process,
                                       (self.vocabulary, o))
        waiting = deque()
        try:
            with progress_bar(self.corpus.size) as bar:
                for place, unit, done in self.units():
                    bar.update(unit.advance)
                    if done:
                        continue
                    waiting.append((place, pool.submit(encode_unit, unit)))
                    while len(waiting) > 2 * o.processes or (waiting and o.processes == 1):
                        first, future = waiting.popleft()
                        self.take(first, future.result())
                for first, future in waiting:
                    self.take(first, future.result())
        except BrokenProcessPool:
            raise Problem(
                "a worker process was killed, perhaps for lack of memory\n  hint: use fewer "
                "--processes")
        finally:
            pool.shutdown(cancel_futures=True)

    def run(self):
        progress = self.look()
        if progress is True:
            say(f"{self.out} is already complete: nothing to do")
            return
        self.open_vocabulary(progress)
        o, state = self.options, progress or {}
        self.writers = {side: ShardWriter(self.out, side, self.vocabulary.width, o.shard_tokens,
                                          state.get(side))
                        for side in SIDES}
        if progress:
            self.at = progress["source"], progress["unit"]
            self.counts.update(progress["counts"])
            say(f"continuing where {self.out} was interrupted")
        elif self.corpus.sources[0].cut is not None:
            for side in SIDES:
                self.writers[side].documents = 1
        try:
            self.save()
            self.write_tokenizer()
            self.encode()
            self.refuse_nothing()
        except BaseException as e:
            failed = isinstance(e, Exception)
            if failed and not any(self.writers[side].tokens for side in SIDES):
                self.discard(self.tokenizer)    # nothing is lost, and the folder is free for other
                                                # options
            elif not self.within_a_unit:        # otherwise the previous save remains valid
                self.save(failed)
            raise
        self.finish()

    def refuse_nothing(self):
        """A folder without any document is an error."""
        if not any(self.writers[side].tokens for side in SIDES):
            raise Problem(
                f"no document was left ({self.counts['bad']} bad records, {self.counts['empty']} "
                f"empty "
                          "documents were skipped): nothing is written\n  hint: --field, --format, "
                          "--separate specify "
                          "where the text is")

    def finish(self):
        for side in SIDES:
            self.writers[side].finish()
        left = {"binary_files": self.corpus.binary, "empty_files": self.corpus.empty,
                "empty_documents": self.counts["empty"], "bad_records": self.counts["bad"]}
        write_json(self.manifest_path, {
            "format": "droppath.c token shards 1", "settings": self.settings,
            "tokenizer": self.tokenizer,
            "val": None if self.options.val_inputs else self.options.val, "seed": self.options.seed,
            "left_out": left,
            "invalid_utf8": self.counts["invalid"], "splits": {s: self.writers[s].summary()
                for s in SIDES}})
        os.remove(self.progress_path)
        sole = self.corpus.sources[0].cut is not None
        documents = 1 if sole else sum(self.writers[s].documents for s in SIDES)
        size = sum(self.writers[s].text_bytes for s in SIDES)
        print(f"{documents:,} document{'s' * (documents != 1)}, {size:,} bytes "
              f"(skipped: {left['binary_files']} binary files, {left['empty_files']} empty ones, "
              f"{left['empty_documents']} empty documents, {left['bad_records']} bad records)")
        if self.counts["invalid"]:
            say(f"warning: {self.counts['invalid']} documents had bytes that are not UTF-8, or "
                f"halves of "
                "surrogate pairs; they became U+FFFD")
        for side in SIDES:
            w = self.writers[side]
            print(f"  {side:5} {w.tokens:14,} tokens in {len(w.shards)} "
                  f"shard{'s' * (len(w.shards) != 1)}: "
                  f"{self.out}/{side}_*.bin")
        print(f"  tokenizer {self.tokenizer['name']} of {self.tokenizer['vocab_size']} tokens: "
              f"{self.out}/{self.tokenizer['file']}")
        for side, share in (("train", 1), ("val", self.options.val)):
            if not self.writers[side].tokens and share:
                say(f"warning: no document was assigned to {side}: {documents} are too few for "
                    f"--val {self.options.val:g}\n"
                    "  hint: try another --val or --seed, or --val-inputs")


def progress_bar(total):
    """A progress bar by tqdm, if on a terminal."""
    tqdm = vocabularies.library("tqdm")
    return tqdm.tqdm(total=total or None, unit="B", unit_scale=True, disable=None, desc="encoding")


def read_json(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as e:
        raise Problem(f"cannot read {path}: {e}")
    if not isinstance(found, dict):
        raise Problem(
            f"cannot read {path}: it is not a JSON object\n  hint: remove it to start over")
    return found


def say(message):
    print(message, file=sys.stderr, flush=True)


# ---- Options ----

def whole(least, most):
    def convert(text):
        """Parses 1000, or 1e3 and 2.5e6 if exact, like whole_read in dev/run/program.h."""
        form = re.fullmatch(r"[+-]?(\d+|(\d+\.?\d*|\.\d+)[eE][+-]?\d{1,9})", text, re.ASCII)
        value = decimal.Decimal(text) if form else None
        if value is None or not least <= value <= most or value != int(value):
            raise argparse.ArgumentTypeError(
                f"{text}: a whole number from {least} to {most} is needed")
        return int(value)
    return convert


def fraction(text):
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"{text}: a number from 0 to 0.5 is needed")
    return value


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(f"{message}\n  hint: --help lists the options")


def add_run_options(parser):
    """Options shared with data/fetch.py."""
    add = parser.add_argument
    add("--tokenizer", metavar="T", default="gpt2",
        help="gpt2, bytes, bpe, a tokenizer.json, or a folder with one or "
        "with GPT-2's encoder.json and vocab.bpe (default gpt2)")
    add("--vocab-size", type=whole(257, 1 << 24), default=8192, metavar="N",
        help="for --tokenizer bpe: number of tokens (default 8192)")
    add("--train-bytes", type=whole(1, 1 << 50), default=1 << 28, metavar="N",
        help="for --tokenizer bpe: train it on about that many bytes, sampled from the whole text "
        "(default 268435456)")
    add("--end-of-text", metavar="TOKEN",
        help="for a tokenizer.json: the token that ends a document, if it does not have a usual "
        "name")
    add("--shard-tokens", type=whole(1, MOST), default=10 ** 8, metavar="N",
        help="tokens per shard (default 1e8)")
    add("--seed", type=whole(0, 2 ** 63 - 1), default=1337, metavar="N",
        help="key of the split (default 1337)")
    add("--processes", type=whole(1, 4096), default=os.cpu_count() or 1, metavar="N",
        help="worker processes (default: one per core); the shards do not depend on it")


def parser():
    p = Parser(prog="prepare.py", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", metavar="INPUT", nargs="+",
                   help="a file, a folder, or - for standard input")
    p.add_argument("--out", required=True, metavar="DIR",
                   help="output directory; created if missing")
    p.add_argument("--val", type=fraction, default=0.1, metavar="F",
                   help="fraction of the documents for validation, "
                   "chosen by a hash of their content, 0 to 0.5 (default 0.1); of a single "
                   "document: its end")
    p.add_argument("--val-inputs", nargs="+", default=[], metavar="INPUT",
                   help="validate on these, and train on all of INPUT")
    add_run_options(p)
    p.add_argument("--format", choices=("auto", "text", "json", "parquet"), default="auto",
                   help="format of the inputs (default auto: by name; standard input is text)")
    p.add_argument("--separate", default="file", metavar="S",
                   help="for text, what separates documents: file (each "
                   "file is one), line (each line is one), or a string: '\\n\\n', '<|endoftext|>' "
                   "(default file)")
    p.add_argument("--field", default="text", metavar="NAME",
                   help="of JSON and Parquet: where the text is (default text)")
    p.add_argument("--ext", default="", metavar=".A,.B",
                   help="from folders, take only files with one of these endings")
    p.add_argument("--skip-bad", action="store_true",
                   help="skip and count lines that are not JSON or lack the text")
    return p


def check(o):
    o.extensions = tuple(e for e in o.ext.split(",") if e)
    if not o.separate:
        raise Problem("--separate needs a string\n  hint: file, line, '\\n\\n'")
    return o


def prepare(options):
    Run(options, corpora.Corpus(options)).run()


def main(arguments=None, act=None):
    """Runs a program; errors become one line and exit code 1."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")      # a path need not be UTF-8, nor the
                                                               # terminal
    try:
        act(arguments) if act else prepare(check(parser().parse_args(arguments)))
        sys.stdout.flush()
    except Problem as e:
        sys.exit(f"error: {e}")
    except BrokenPipeError:             # nobody reads the output, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:
        sys.exit(f"error: {e.filename or 'the disk'}: {e.strerror}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: run the same command again to continue")
    except Exception as e:              # a bug here or in a library: never print a traceback
        if os.environ.get("DROPPATH_DEBUG"):
            raise
        sys.exit(vocabularies.unexpected(e))


if __name__ == "__main__":
    main()
