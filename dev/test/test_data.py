#!/usr/bin/env python3
"""Tests of data/prepare.py, data/choices.py and data/fetch.py: make test-data. Needs their
libraries.

GPT-2's tokenizer is tested where GPT2_FILES names a folder with its encoder.json and vocab.bpe, or
where it can be downloaded; data/bytes.c's program, in the folder BUILD, is compared with the same
in Python.
"""
import bz2
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DATA = os.path.join(ROOT, "data")
BUILD = os.path.join(ROOT, os.environ.get("BUILD", "build"))
sys.path.insert(0, DATA)

import numpy as np          # noqa: E402
import pyarrow as pa        # noqa: E402
import pyarrow.parquet as pq    # noqa: E402
import choices              # noqa: E402
import corpus               # noqa: E402
import prepare              # noqa: E402
import vocabulary           # noqa: E402
from shards import read_shard   # noqa: E402

WORDS = ("the cat sat on a mat and slept; it's 12 o'clock,  naïve café — 日本語 \U0001F600 "
         "isn't\tHOW").split(" ")


def some_text(seed, words):
    """Words with white space of every kind between them."""
    r = random.Random(seed)
    return "".join(r.choice(WORDS) + r.choice([" ", " ", " ", "  ", "\n", "\n\n", " \n", "\r\n",
                                               "\u3000"])
                   for _ in range(words))


def gpt2():
    """GPT-2's vocabulary and the --tokenizer that names it, or None."""
    folder = os.environ.get("GPT2_FILES")
    try:
        return vocabulary.load(folder or "gpt2"), folder or "gpt2"
    except vocabulary.Problem:
        return None


GPT2 = gpt2()


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="droppath_data_")
        self.addCleanup(shutil.rmtree, self.dir)
        self.runs = 0

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def write(self, name, data):
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        return path

    def prepare(self, *arguments, out=None, act=None):
        """Runs prepare.py in this process; returns its folder. What it printed is in self.said."""
        self.runs += 1
        out = out or self.path(f"out{self.runs}")
        if "--processes" not in arguments:
            arguments += ("--processes", "1")
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                prepare.main([*arguments, "--out", out], act)
            finally:
                self.said = text.getvalue()
        return out

    def refused(self, part, *arguments, **more):
        with self.assertRaises(SystemExit) as caught:
            self.prepare(*arguments, **more)
        self.assertIn(part, str(caught.exception))
        self.assertLessEqual(str(caught.exception).count("\n"), 1)      # a line and a hint
        self.assertTrue(str(caught.exception).startswith("error: "))

    def manifest(self, out):
        with open(os.path.join(out, "manifest.json"), encoding="utf-8") as file:
            return json.load(file)

    def tokens(self, out, side):
        """All of a side's tokens, after the files were checked against the manifest."""
        m, parts = self.manifest(out), [np.empty(0, np.uint16)]
        for shard in m["splits"][side]["shards"]:
            path = os.path.join(out, shard["file"])
            with open(path, "rb") as file:
                self.assertEqual(hashlib.sha256(file.read()).hexdigest(), shard["sha256"])
            self.assertEqual(os.path.getsize(path), shard["file_bytes"])
            parts.append(read_shard(path))
            self.assertEqual(len(parts[-1]), shard["tokens"])
        self.assertEqual(sum(map(len, parts)), m["splits"][side]["tokens"])
        names = {n for n in os.listdir(out) if n.startswith(side)}
        self.assertEqual(names, {s["file"] for s in m["splits"][side]["shards"]})
        return np.concatenate(parts)

    def table(self, out):
        """The bytes of each token, from tokenizer.bin, and end-of-text."""
        with open(os.path.join(out, "tokenizer.bin"), "rb") as file:
            data = file.read()
        magic, version, size, end = struct.unpack("<4i", data[:16])
        self.assertEqual((magic, version), (20240328, 2))
        self.assertEqual(hashlib.sha256(data).hexdigest(),
                         self.manifest(out)["tokenizer"]["sha256"])
        at, table = 1024, []
        while at < len(data):
            table.append(data[at + 1:at + 1 + data[at]])
            at += 1 + data[at]
        self.assertEqual((len(table), at), (size, len(data)))
        return table, end

    def documents(self, out, side):
        """The documents back from the tokens."""
        table, end = self.table(out)
        found, now = [], []
        for token in self.tokens(out, side):
            if token == end:
                found.append(b"".join(now))
                now = []
            else:
                now.append(table[token])
        self.assertEqual(now, [])
        split = self.manifest(out)["splits"][side]
        self.assertEqual((len(found), sum(map(len, found))), (split["documents"], split["bytes"]))
        return found

    def bits(self, out):
        """The sums of all files of a folder."""
        names = sorted(os.listdir(out))
        return [(n, hashlib.sha256(vocabulary.read(os.path.join(out, n))).hexdigest())
                for n in names]


class Tokenizers(Case):
    def texts(self):
        return [some_text(i, 50 + 40 * i).encode() for i in range(60)] + [b"<|endoftext|> is text",
            b" ", b"\n\n\n"]

    def jsonl(self, documents, name="in.jsonl"):
        return self.write(name, "".join(json.dumps({"text": d.decode()}) + "\n" for d in documents))

    def round_trip(self, *tokenizer):
        documents = self.texts()
        out = self.prepare(*tokenizer, "--val", "0.3", self.jsonl(documents))
        got = {side: self.documents(out, side) for side in ("train", "val")}
        for side in got:
            self.assertEqual(got[side], [d for d in documents if corpus.side_of(d, 0.3,
                1337) == side])
            self.assertTrue(got[side])
        return out

    def test_bytes(self):
        out = self.round_trip("--tokenizer", "bytes")
        self.assertEqual(self.manifest(out)["tokenizer"]["vocab_size"], 257)

    def test_bpe(self):
        out = self.round_trip("--tokenizer", "bpe", "--vocab-size", "300")
        m = self.manifest(out)["tokenizer"]
        self.assertEqual((m["vocab_size"], m["name"]), (300, "bpe"))
        again = self.round_trip("--tokenizer", os.path.join(out, "tokenizer.json"))
        for side in ("train", "val"):
            np.testing.assert_array_equal(self.tokens(out, side), self.tokens(again, side))
        import tokenizers
        reference = tokenizers.Tokenizer.from_file(os.path.join(out, "tokenizer.json"))
        want = []
        for d in self.texts()[:-3]:
            if corpus.side_of(d, 0.3, 1337) == "train":
                want += reference.encode(d.decode()).ids + [m["end_of_text"]]
        np.testing.assert_array_equal(self.tokens(out, "train")[:len(want)], want)

    def test_bpe_learns_the_same_twice_and_not_from_validation(self):
        path = self.jsonl(self.texts() + [b"qqqqzzzz " * 100] * 2)
        self.assertEqual(corpus.side_of(b"qqqqzzzz " * 100, 0.5, 7), "val")
        arguments = ("--tokenizer", "bpe", "--vocab-size", "280", "--val", "0.5", "--seed", "7",
                     path)
        a, b = self.prepare(*arguments), self.prepare(*arguments)
        self.assertEqual(self.bits(a), self.bits(b))
        self.assertNotIn(b"qq", self.table(a)[0])

    @unittest.skipUnless(GPT2, "GPT-2's files are not here: GPT2_FILES=DIR")
    def test_gpt2(self):
        out = self.round_trip("--tokenizer", GPT2[1])
        reference, want = GPT2[0].encoding, []
        for d in self.texts():
            if corpus.side_of(d, 0.3, 1337) == "train":
                want += reference.encode_ordinary(d.decode()) + [50256]
        np.testing.assert_array_equal(self.tokens(out, "train"), want)

    @unittest.skipUnless(GPT2, "GPT-2's files are not here: GPT2_FILES=DIR")
    def test_gpt2_takes_endless_white_space_and_words(self):
        for text in ("\n" * 400000 + "x", " " * 400000 + "x", "a\n\n" + "\t" * 300000 + " b" * 9,
                     "a" * 100000):
            found = GPT2[0].encode([text.encode()])[0][0]
            table = GPT2[0].token_bytes()
            self.assertEqual(b"".join(table[t] for t in found).decode(), text)
        short = "x" + "\n" * 3000 + " y" + " " * 2000 + "z"
        whole = GPT2[0].encoding.encode_ordinary(short)
        with mock.patch.object(GPT2[0], "encoding", Fragile(GPT2[0].encoding)):
            np.testing.assert_array_equal(GPT2[0].tokens(short), whole)

    def special_cases(self):
        """Tokenizers as (tokenizer.json, the end-of-text token's name and number), each with a way
        to spell it."""
        import tokenizers
        letters = [chr(i) for i in range(33, 127)] + ["\u0120"]
        end = "</s>"
        base = {c: i for i, c in enumerate(letters)}

        def bpe(vocabulary, merges, special=None, **more):
            t = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, **more))
            t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            if special is not None:
                t.add_tokens([tokenizers.AddedToken(end, special=special)])
            return t.to_str()

        yield "no mark", bpe({**base, end: 95}, [], special=False), 95
        yield "beyond the model", bpe(base, [], special=False), 95
        yield "marked", bpe(base, [], special=True), 95
        whole = {**base, "</": 95, "s>": 96, end: 97}
        yield "merges spell it", bpe(whole, [("<", "/"), ("s", ">"), ("</", "s>")]), 97
        yield "ignore_merges", bpe({**base, end: 95}, [], ignore_merges=True), 95
        pieces = [("<unk>", 0.0), ("<s>", 0.0), (end, 0.0)] + [(c, -5.0) for c in ["\u2581"] +
            letters[:-1]]
        t = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))
        t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        yield "unigram", t.to_str(), 2
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, end: 1, "x": 2},
            unk_token="?"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        yield "words", words.to_str(), 1

    def test_special_tokens_are_never_text(self):
        for what, text, end in self.special_cases():
            with self.subTest(what):
                v = vocabulary.JsonVocabulary("t", text)
                self.assertEqual(v.end_of_text, end)
                found = v.encode([b"x </s> x", b"</s>", b"x</s>"])
                for tokens, *_ in found:
                    self.assertNotIn(end, tokens)
                    self.assertTrue(len(tokens))
                if what not in ("words", "unigram"):
                    self.assertEqual(b"".join(v.token_bytes()[i] for i in found[0][0]), b"x </s> x")
                self.assertIn(b"</s>", v.token_bytes() or [b"</s>"])

    def changed(self, **parts):
        """A byte-level tokenizer.json of 257 tokens and two merges, with other parts; its
        tokenizer.bin's first words."""
        state = json.loads(vocabulary.train_bpe([b"ab abc abc"], 259))
        for name, value in parts.items():
            if name in state["model"]:
                state["model"][name] = value
            elif name == "added":
                state["added_tokens"] += value
            else:
                state[name] = value
        v = vocabulary.JsonVocabulary("t", json.dumps(state))
        return v, vocabulary.tokenizer_bin(v)

    def test_tokenizers_that_split_otherwise_say_so(self):
        """tokenizer.bin tells build/generate that it must not encode: dev/files/tokenizer.h does as
        GPT-2 does."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\S+|\\s+"},
                 "behavior": "Isolated", "invert": False}
        merges = json.loads(vocabulary.train_bpe([b"ab abc abc"], 259))["model"]["merges"]
        plain = self.changed()[1]
        self.assertEqual(struct.unpack("<5i", plain[:20])[1], 2)
        self.assertEqual(self.changed(pre_tokenizer={"type": "Sequence",
            "pretokenizers": [level]})[1], plain)
        for parts, why in (({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split,
            {**level, "use_regex": False}]}},
                            "splits text"), ({"pre_tokenizer": {**level, "add_prefix_space": True}},
                                             "splits text"),
                           ({"pre_tokenizer": {**level, "use_regex": False}}, "splits text"),
                           ({"normalizer": {"type": "NFC"}}, "normalizes"),
                           ({"ignore_merges": True}, "ignore_merges"),
                           ({"merges": merges[::-1]}, "not in the order"),
                           ({"added": [{"id": 259, "content": "  ", "single_word": False,
                                        "lstrip": False,
                                        "rstrip": False, "normalized": False, "special": False}]},
                                        "added tokens")):
            with self.subTest(why):
                v, table = self.changed(**parts)
                self.assertIn(why, vocabulary.encodes_otherwise(v))
                self.assertEqual(struct.unpack("<5i", table[:20]),
                                 (20240328, 3, v.size, v.end_of_text, 1))
        t = self.write("t.json", v.json)
        self.prepare("--tokenizer", t, "--val", "0", self.write("a.txt", "ab"))
        self.assertIn("note: it has added tokens, which are matched in text first: build/generate "
                      "shows", self.said)

    def test_byte_order_mark_of_a_tokenizer(self):
        v, table = self.changed()
        marked = vocabulary.load(self.write("t.json", "\ufeff" + v.json))
        self.assertEqual(vocabulary.tokenizer_bin(marked), table)

    def test_long_tokens_keep_the_file(self):
        long = {"id": 259, "content": " " * 300, "single_word": False, "lstrip": False,
                "rstrip": False,
                "normalized": False, "special": False}
        v, table = self.changed(added=[long])
        self.assertTrue(table.endswith(struct.pack("<I", 300) + b" " * 300))
        self.assertEqual(len(table), 1024 + 4 * 260 + sum(map(len, v.token_bytes())))
        self.assertEqual(v.encode([b"ab" + b" " * 300])[0][0][-1], 259)
        out = self.prepare("--tokenizer", self.write("t.json", v.json), "--val", "0",
                           self.write("a.txt", "ab"))
        self.assertEqual(self.manifest(out)["tokenizer"]["file"], "tokenizer.bin")
        self.assertNotIn("no tokenizer.bin", self.said)

    def test_gpt2_without_a_network(self):
        tiktoken = vocabulary.library("tiktoken")
        with mock.patch.object(tiktoken, "get_encoding", side_effect=OSError("no route\nto host")):
            self.refused("hint: without a network: --tokenizer bytes, --tokenizer bpe, a "
                         "tokenizer.json, or a folder",
                         "--tokenizer", "gpt2", self.write("a.txt", "x"))

    def test_unknown_characters_do_not_end_a_document(self):
        import tokenizers
        t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "x": 1}, unk_token="</s>"))
        t.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        self.refused("encodes unknown characters as </s>", "--val", "0", "--tokenizer",
                     self.write("t.json", t.to_str()), self.write("a.txt", "x y"))

    def test_wide_tokens(self):
        import tokenizers
        words = {f"w{i}": i for i in range(70000)}
        t = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "</s>": 70000, "?": 70001},
            unk_token="?"))
        t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        t.add_special_tokens(["</s>"])
        out = self.prepare("--tokenizer", self.write("tokenizer.json", t.to_str()), "--val", "0",
                           "--separate", "line",
                           self.write("a.txt", "w0 w69999\nw65536"))
        self.assertEqual(list(self.tokens(out, "train")), [0, 69999, 70000, 65536, 70000])
        self.assertIn("no tokenizer.bin", self.said)
        self.assertEqual(self.manifest(out)["tokenizer"]["file"], "tokenizer.json")

    def test_refused(self):
        text = self.write("a.txt", "hello")
        self.refused("no such file", "--tokenizer", self.path("none.json"), text)
        self.refused("is not a tokenizer.json", "--tokenizer", self.write("b.json", "{}"), text)
        self.refused("neither encoder.json nor vocab.json", "--tokenizer", self.dir, text)
        for name in ("encoder.json", "vocab.bpe"):
            self.write(name, "{}")
        self.refused("is not GPT-2's", "--tokenizer", self.dir, text)
        self.refused("pairs for only 257 tokens", "--tokenizer", "bpe", "--val", "0",
                     "--vocab-size", "300",
                     self.write("c.txt", "a"))
        self.refused("from 257 to", "--tokenizer", "bpe", "--vocab-size", "256", text)
        import tokenizers
        nameless = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str()
        self.refused("no end-of-text token with a usual name", "--tokenizer",
                     self.write("d.json", nameless), text)
        self.refused("no token <x>", "--tokenizer", self.path("d.json"), "--end-of-text", "<x>",
                     text)
        self.assertFalse(os.path.exists(self.path("out1")))


class Fragile:
    """An encoding that gives up on long white space, as tiktoken's does on longer."""

    def __init__(self, encoding):
        self.encoding = encoding

    def encode_to_numpy(self, text, **more):
        if re.search(r"\s{1200,}\S", text):
            raise ValueError("too much")
        return self.encoding.encode_to_numpy(text, **more)


class Inputs(Case):
    def found(self, *arguments):
        return self.documents(self.prepare("--tokenizer", "bytes", "--val", "0", *arguments),
                              "train")

    def test_formats_agree(self):
        documents = [some_text(i, 30) for i in range(40)]
        for i, d in enumerate(documents):
            self.write(f"folder/{i // 10}/{i % 10}.txt", d.encode())
        lines = "".join(json.dumps({"id": i, "body": d}) + "\r\n" for i, d in enumerate(documents))
        joined = "<|endoftext|>".join(documents)
        table = pa.table({"body": pa.array(documents, pa.large_string())})
        pq.write_table(table, self.path("p.parquet"), row_group_size=7)
        cases = [[self.path("folder")], ["--field", "body", self.write("a.jsonl", lines)],
                 ["--field", "body", self.write("b.jsonl.gz", gzip.compress(lines.encode()))],
                 ["--field", "body", self.path("p.parquet")],
                 ["--separate", "<|endoftext|>", self.write("c.txt", joined)],
                 ["--separate", "<|endoftext|>", self.write("d.txt.bz2",
                                                            bz2.compress(joined.encode()))],
                 ["--field", "body", "--format", "json", self.write("e.data", lines)]]
        for case in cases:
            self.assertEqual(self.found(*case), [d.encode() for d in documents], case)

    def test_standard_input(self):
        for arguments, text, want in (
                (["--separate", "line"], b"one\r\ntwo\n\nthree", [b"one", b"two", b"three"]),
                (["--separate", "\\n\\n"], b"a\nb\n\n\nc", [b"a\nb", b"\nc"]),
                (["--format", "json"], b'{"text": "x\\ny"}\n', [b"x\ny"]),
                ([], b"all\nof it", [b"all\nof it"])):
            with mock.patch("sys.stdin", mock.Mock(buffer=io.BytesIO(text))):
                self.assertEqual(self.found(*arguments, "-"), want)
        with mock.patch("sys.stdin", mock.Mock(buffer=io.BytesIO(b"x"))):
            self.refused("standard input is a single document", "--tokenizer", "bytes", "-")
        self.refused("does not allow", "--tokenizer", "bpe", "--separate", "line", "-")

    def test_odd_bytes(self):
        self.assertEqual(self.found("--separate", "line",
                                    self.write("a.txt", b"\xef\xbb\xbfx\n\xff\xfe\ny\r\n")),
                         # the tokenizer of bytes keeps every byte
                         [b"x", b"\xff\xfe", b"y"])
        out = self.prepare("--tokenizer", "bpe", "--vocab-size", "257", "--val", "0", "--separate",
                           "line",
                           self.write("b.txt", b"ab\n\xffcd\xe6\x97\nok"))
        self.assertEqual(self.documents(out, "train"), [b"ab", "\ufffdcd\ufffd".encode(), b"ok"])
        self.assertEqual(self.manifest(out)["invalid_utf8"], 1)
        self.assertIn("1 documents had bytes that are not UTF-8", self.said)
        self.assertEqual(self.found(self.write("c.jsonl",
                                               b'{"text": "\xff"}\n{"text": "\\ud800!"}\n')),
                         ["\ufffd".encode(), "\ufffd!".encode()])

    def test_left_out(self):
        for name, data in (("a.txt", "text"), ("b.bin", b"x\0y"), ("empty.txt", ""),
                           (".hidden", "no"),
                           ("sub/.git/x", "no")):
            self.write("in/" + name, data)
        os.symlink(self.path("in/a.txt"), self.path("in/link.txt"))
        out = self.prepare("--tokenizer", "bytes", "--val", "0", self.path("in"))
        self.assertEqual(self.documents(out, "train"), [b"text"])
        self.assertEqual(self.manifest(out)["left_out"],
                         {"binary_files": 1, "empty_files": 1, "empty_documents": 0,
                          "bad_records": 0})
        self.assertEqual(self.found("--ext", ".txt", self.path("in")), [b"text"])
        self.refused("no text was found (skipped: 0 binary files, 1 empty ones)",
                     self.path("in/empty.txt"))
        out = self.prepare("--tokenizer", "bytes", "--val", "0",
                           self.write("d.jsonl", '{"text": ""}\n\n{"text": "x"}'))
        self.assertEqual(self.documents(out, "train"), [b"x"])
        self.assertEqual(self.manifest(out)["left_out"]["empty_documents"], 1)

    def test_huge_line(self):
        line = "word " * 2500000                                         # longer than PART
        for arguments in (["--separate", "line", self.write("a.txt", "x\n" + line + "\ny")],
                          [self.write("b.jsonl", "".join(json.dumps({"text": t}) + "\n"
                                                         for t in ("x", line, "y")))]):
            got = self.found(*arguments)
            self.assertEqual([len(d) for d in got], [1, len(line), 1])
            self.assertEqual(got[1], line.encode())
        with mock.patch.object(corpus, "RECORD", 1 << 20):
            self.refused("a line of more than 1 MiB", "--tokenizer", "bytes", self.path("b.jsonl"))

    def test_bad_records(self):
        good = '{"text": "ok"}\n'
        for bad, part in (("{broken\n", "byte 15: this line is not a JSON object"),
                          ("[1]\n", "byte 15: this line is not"),
                          ('{"text": 3}\n', 'byte 15: "text" is not text'),
                          ('{"body": "x"}\n', 'there is no "text"'),
                          ('{"text": "x", "text": "y"}\n', 'has "text" twice'),
                          ("[" * 100000 + "\n", "not a JSON object")):
            path = self.write("a.jsonl", good + bad + good)
            self.refused(part, "--tokenizer", "bytes", path)
            out = self.prepare("--tokenizer", "bytes", "--val", "0", "--skip-bad", path)
            self.assertEqual(self.documents(out, "train"), [b"ok", b"ok"])
            self.assertEqual(self.manifest(out)["left_out"]["bad_records"], 1)

    def test_lfs_pointers(self):
        """What Git LFS has left in place of a file is named as such by every reader."""
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
        tokenizer, folder = self.write("tokenizer.json",
                                       pointer), os.path.dirname(self.write("gpt2/encoder.json",
                                           pointer))
        self.write("gpt2/vocab.bpe", pointer)
        for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"):
            self.refused("a Git LFS pointer", "--tokenizer", "bytes", self.write(name, pointer))
            if name != "a.txt":
                with self.assertRaises(SystemExit) as caught:
                    prepare.main([self.path(name), "--tokenizer", "bytes", "--out",
                                  self.path("q.bin")], choices.act)
                self.assertIn("a Git LFS pointer", str(caught.exception))
        for given in (tokenizer, folder):
            self.refused("a Git LFS pointer", "--tokenizer", given, self.write("b.txt", "text"))

    def test_whole_numbers(self):
        """As dev/run/program.h reads them."""
        read = prepare.whole(0, 2 ** 63 - 1)
        for text, value in (("1e3", 1000), ("2.5e6", 2500000), ("1E+2", 100), ("2000e-3", 2),
                            (".5e1", 5),
                            ("9.223372036854775807e18", 2 ** 63 - 1),
                            ("9223372036854775807", 2 ** 63 - 1)):
            self.assertEqual(read(text), value)
        for text in ("1.5e0", "15e-1", "1.5", "5.0", "1e", "e1", "1e19", "1e999999999",
                     "1e-999999999", "1_0", "0x1", " 1", ""):
            self.assertRaises(prepare.argparse.ArgumentTypeError, read, text)

    def test_irregular_json(self):
        """The table in data/README.md, for lines and for one array."""
        huge = "9" * 5000
        values = ['{"text":"ok \\ud83d broken \\ude00 end"}', '{"text":"fine \\ud83d\\ude00"}',
                  '{"text":null}',
                  '{"text":"a","n":%s,"m":-%s}' % (huge, huge), '{"text":"b","n":1e999}']
        want = ["ok \ufffd broken \ufffd end", "fine \U0001F600", "a", "b"]
        for name, data in (("a.jsonl", "\n".join(values)),
                           ("b.jsonl", "\ufeff" + "\r\n".join(values) + "\r\n"),
                           ("c.json", "[" + ", ".join(values) + "]"),
                           ("d.json", "\ufeff [\r\n" + "\n,".join(values) + "\n]\n\n"),
                           ("e.json.gz", gzip.compress(("[" + ",".join(values) + "]").encode()))):
            with self.subTest(name), mock.patch.object(corpus, "UNIT", 64):
                path = self.write(name, data)
                out = self.prepare("--tokenizer", "bytes", "--val", "0", path)
                self.assertEqual(self.documents(out, "train"), [d.encode() for d in want])
                m = self.manifest(out)
                self.assertEqual((m["invalid_utf8"], m["left_out"]["empty_documents"]), (1, 1))
        self.assertEqual(self.found(self.write("f.json", "[]\n"),
                                    self.write("g.jsonl", '{"text": "x"}')), [b"x"])
        for bad, part in (('[{"text": "x"}', "the array is cut short"),
                          ('[{"text": "x"} {}]', "a comma or ] is missing"),
                          ('[{"text": "x"}] 1', "byte 16: more follows the array"),
                          ("[" * 100000, "nested too deeply"),
                          ('[{"text": "x"}, 3]', "element 2: this element is not a JSON object"),
                          ('[{"text": "x"}, {"story": ""}]', 'element 2: there is no "text"')):
            self.refused(part, "--tokenizer", "bytes", self.write("h.json", bad))

    def test_irregular_columns(self):
        texts = ["one", None, "two \u00e9", ""]
        kinds = [pa.array(texts).dictionary_encode(), pa.array(texts, pa.large_string()),
                 pa.array([t and t.encode() for t in texts], pa.binary())]
        if hasattr(pa, "string_view"):
            kinds.append(pa.array(texts, pa.string_view()))
        for column in kinds:
            with self.subTest(str(column.type)):
                pq.write_table(pa.table({"text": column}), self.path("a.parquet"))
                out = self.prepare("--tokenizer", "bytes", "--val", "0", self.path("a.parquet"))
                self.assertEqual(self.documents(out, "train"), [b"one", "two \u00e9".encode()])
                self.assertEqual(self.manifest(out)["left_out"]["empty_documents"], 2)
        pq.write_table(pa.table([["x"], ["y"], ["z"]], names=["text", "text", "n"]),
                       self.path("b.parquet"))
        self.refused("has 2 columns text", "--tokenizer", "bytes", self.path("b.parquet"))
        self.assertEqual(self.found("--field", "n", self.path("b.parquet")), [b"z"])
        pq.write_table(pa.table({"text": pa.array([b"ab\xff"], pa.binary())}),
                       self.path("c.parquet"))
        out = self.prepare("--tokenizer", "bpe", "--vocab-size", "257", "--val", "0",
                           self.path("c.parquet"))
        self.assertEqual((self.documents(out, "train"), self.manifest(out)["invalid_utf8"]),
                         (["ab\ufffd".encode()], 1))

    def test_line_ends_in_separators(self):
        text = "para one\nmore\n\npara two\n\npara three" * 3
        want = self.found("--separate", "\\n\\n", self.write("a.txt", text))
        for unit in (1 << 20, 1, 2, 3, 5, 7):
            with mock.patch.object(corpus, "UNIT", unit):
                got = self.found("--separate", "\\n\\n",
                                 self.write("b.txt", text.replace("\n", "\r\n")))
            self.assertEqual([d.replace(b"\r", b"") for d in got], want, unit)

    def test_byte_order_mark_of_a_sole_document(self):
        text = "some text\n" * 100
        a, b = (self.prepare("--tokenizer", "bytes", self.write(n, m + text)) for n,
                m in (("a", ""), ("b", "\ufeff")))
        for side in ("train", "val"):
            self.assertEqual(list(self.tokens(a, side)), list(self.tokens(b, side)))

    def test_pipes(self):
        def piped(data, *arguments):
            path = self.path(f"pipe{self.runs}")
            os.mkfifo(path)
            writer = threading.Thread(target=lambda: open(path, "wb").write(data))
            writer.start()
            try:
                return self.found(*arguments, path)
            finally:
                writer.join()
        self.assertEqual(piped(b"\xef\xbb\xbfone\ntwo\n", "--separate", "line"), [b"one", b"two"])
        self.assertEqual(piped(b'{"text": "x"}\n', "--format", "json"), [b"x"])
        with self.assertRaises(SystemExit) as caught:
            piped(gzip.compress(b"x"), "--separate", "line")
        self.assertIn("is compressed", str(caught.exception))

    def test_damaged_files(self):
        packed = gzip.compress(b'{"text": "some text to be cut"}\n' * 1000)
        self.refused("cannot read", "--tokenizer", "bytes", self.write("a.jsonl.gz", packed[:-20]))
        self.refused("cannot read", "--tokenizer", "bytes", self.write("b.jsonl.gz", b"plain"))
        self.refused("cannot read", "--tokenizer", "bytes", self.write("c.parquet", b"PAR1 no"))
        pq.write_table(pa.table({"body": ["x"], "n": [1]}), self.path("d.parquet"))
        self.refused("no column text\n  hint: --field NAME; it has body, n", "--tokenizer", "bytes",
                     self.path("d.parquet"))
        self.refused("is of type int64", "--tokenizer", "bytes", "--field", "n",
                     self.path("d.parquet"))
        self.refused("cannot read", "--tokenizer", "bytes", self.path("nowhere"))
        pq.write_table(pa.table({"text": ["x", None, "", "y"]}), self.path("e.parquet"))
        self.assertEqual(self.found(self.path("e.parquet")), [b"x", b"y"])

    def test_options(self):
        text = self.write("a.txt", "hello")
        self.refused("0 to 0.5", "--val", "0.6", text)
        self.refused("--shard-tokens", "--shard-tokens", "0", text)
        self.refused("unrecognized arguments: --vall", "--vall", "1", text)
        self.refused("--separate needs a string", "--separate", "", text)

    def test_sole_document_is_cut(self):
        text = some_text(3, 5000)
        out = self.prepare("--tokenizer", "bytes", self.write("a.txt", text))
        whole, cut = text.encode(), int(0.9 * len(text.encode()))
        while 0x80 <= whole[cut] < 0xC0:
            cut -= 1
        self.assertEqual(bytes(self.tokens(out, "train").astype(np.uint8)), whole[:cut])
        self.assertEqual(bytes(self.tokens(out, "val").astype(np.uint8)), whole[cut:])
        self.assertIn("1 document, ", self.said)

    def test_validation_inputs(self):
        train, val = self.write("t.txt", "train"), self.write("v.txt", "val")
        out = self.prepare("--tokenizer", "bytes", train, "--val-inputs", val)
        self.assertEqual((self.documents(out, "train"), self.documents(out, "val")),
                         ([b"train"], [b"val"]))

    @unittest.skipUnless(os.path.exists(os.path.join(BUILD, "data_bytes")),
                         "build/data_bytes is not built: make")
    def test_as_data_bytes(self):
        text = self.write("a.txt", ("plain ascii text\n" * 3000).encode())
        out = self.prepare("--tokenizer", "bytes", text)
        program = os.path.join(BUILD, "data_bytes")
        subprocess.run([program, "--out", self.path("c"), text], check=True, capture_output=True)
        names = sorted(os.listdir(self.path("c")))
        self.assertEqual(names, ["sources.txt", "tokenizer.bin", "train_000000.bin",
                                 "val_000000.bin"])
        for name in names[1:]:
            self.assertEqual(vocabulary.read(self.path("c", name)),
                             vocabulary.read(os.path.join(out, name)), name)

    def data_bytes(self, *arguments, text=None):
        """What data_bytes says and its exit code; its folder is self.path("c")."""
        done = subprocess.run([os.path.join(BUILD, "data_bytes"), "--out", self.path("c"),
                               *arguments], input=text,
                              capture_output=True)
        return done.returncode, done.stderr.decode()

    @unittest.skipUnless(os.path.exists(os.path.join(BUILD, "data_bytes")),
                         "build/data_bytes is not built: make")
    def test_data_bytes_keeps_the_rules(self):
        plain = ("plain text\n" * 300).encode()
        want = self.prepare("--tokenizer", "bytes", self.write("a.txt", plain))
        os.mkfifo(self.path("pipe"))
        writer = threading.Thread(target=lambda: open(self.path("pipe"), "wb").write(plain))
        writer.start()
        for arguments, text in (([self.write("b.txt", b"\xef\xbb\xbf" + plain)], None),
                                (["-"], plain),
                                ([self.path("pipe")], None)):
            self.assertEqual(self.data_bytes("--replace", *arguments, text=text), (0, ""))
            for name in ("train_000000.bin", "val_000000.bin"):
                self.assertEqual(vocabulary.read(self.path("c", name)),
                                 vocabulary.read(os.path.join(want, name)))
        writer.join()
        self.assertIn("is compressed", self.data_bytes("--replace",
            self.write("c.gz", gzip.compress(plain)))[1])

    @unittest.skipUnless(os.path.exists(os.path.join(BUILD, "data_bytes")),
                         "build/data_bytes is not built: make")
    def test_data_bytes_overwrites_no_other_data(self):
        a, b = self.write("a.txt", "some text " * 50), self.write("b.txt", "other text " * 50)
        self.assertEqual(self.data_bytes(a)[0], 0)
        before = self.bits(self.path("c"))
        code, said = self.data_bytes(b)
        self.assertEqual((code, self.bits(self.path("c"))), (1, before))
        self.assertIn("holds shards of another text\n  hint: choose another --out, or --replace "
                      "them", said)
        self.write("a.txt", "some text, changed " * 50)     # the same file may be prepared anew
        self.assertEqual(self.data_bytes(os.path.relpath(a))[0], 0)
        after = self.bits(self.path("c"))
        os.remove(self.path("c", "tokenizer.bin"))          # what an interrupted run leaves: the
                                                            # same one may go on
        self.assertEqual((self.data_bytes(a)[0], self.bits(self.path("c"))), (0, after))
        self.assertEqual(self.data_bytes("--replace", b)[0], 0)
        os.remove(self.path("c", "sources.txt"))
        self.assertIn("holds shards of another text", self.data_bytes(b)[1])
        shutil.rmtree(self.path("c"))
        self.prepare("--tokenizer", "bytes", a, out=self.path("c"))
        for arguments in ([a], ["--replace", a]):           # whose manifest would lie
            self.assertIn("holds data of data/prepare.py", self.data_bytes(*arguments)[1])


class Cuts(Case):
    def units_of(self, data, separator, kind="text"):
        source = corpus.Source(kind, [self.write("s", data)], None, len(data), None)
        return list(corpus.stream_units(source, separator, 0.5, 1))

    def test_stream_is_split_as_a_whole(self):
        r = random.Random(5)
        for separator in (b"\n", b"\n\n", b"ab", b"aba", None):
            for trial in range(150):
                data = bytes(r.choice(b"ab\n \xc3") for _ in range(r.randrange(200)))
                with mock.patch.multiple(corpus, UNIT=r.randrange(1, 30), PART=r.randrange(5, 40)):
                    units = self.units_of(data, separator)
                got, long = [], b""
                for u in units:
                    if u.kind == "documents":
                        self.assertEqual(long, b"")
                        got += u.data
                    else:
                        long += u.data
                        if u.last:
                            got, long = got + [long], b""
                want = data.split(separator) if separator else [data]
                self.assertEqual([d for d in got if d], [d for d in want if d], (data, separator))

    def test_long_documents_keep_their_tokens(self):
        """In parts of some hundred bytes, at word and line ends, as in one piece."""
        texts = [re.sub("[^ -~\n]", "", some_text(i, 3000)) for i in range(4)]
        for tokenizer in [("--tokenizer", "bpe", "--vocab-size", "300")] + ([("--tokenizer",
            GPT2[1])] if GPT2 else []):
            path = self.write("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
            whole = self.prepare(*tokenizer, "--val", "0", path)
            for i, t in enumerate(texts):
                self.write(f"folder/{i}.txt", t)
            same = ("--tokenizer",
                    os.path.join(whole, "tokenizer.json")) if "bpe" in tokenizer else tokenizer
            for source in (path, self.path("folder")):
                with mock.patch.multiple(corpus, UNIT=100, PART=300):
                    parts = self.prepare(*same, "--val", "0", source)
                np.testing.assert_array_equal(self.tokens(whole, "train"),
                                              self.tokens(parts, "train"))

    def test_sides(self):
        documents = [b"document %d" % i for i in range(20000)]
        val = [d for d in documents if corpus.side_of(d, 0.1, 1) == "val"]
        self.assertAlmostEqual(len(val), 2000, delta=5 * (20000 * 0.1 * 0.9) ** 0.5)
        more = {d for d in documents if corpus.side_of(d, 0.2, 1) == "val"}
        # a larger part keeps the smaller one
        self.assertLess(set(val), more)
        other = [d for d in val if corpus.side_of(d, 0.1, 2) == "val"]
        self.assertLess(len(other), 400)
        self.assertTrue(all(corpus.side_of(d, 0, 1) == "train" for d in documents))


class Runs(Case):
    def big(self):
        """About 6 MB in several formats."""
        documents = [some_text(i, 400) for i in range(1500)]
        third = len(documents) // 3
        self.write("in/a.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in documents[:third]))
        pq.write_table(pa.table({"text": documents[third:2 * third]}), self.path("in/b.parquet"),
                       row_group_size=100)
        for i, d in enumerate(documents[2 * third:]):
            self.write(f"in/c/{i:04d}.txt", d)
        return self.path("in")

    def test_processes_change_no_bit(self):
        text = self.big()
        arguments = ("--tokenizer", "bpe", "--vocab-size", "400", "--shard-tokens", "300000", text)
        one = self.prepare(*arguments, "--processes", "1")
        two = self.prepare(*arguments, "--processes", "2")
        three = self.prepare(*arguments, "--processes", "3")
        self.assertEqual(self.bits(one), self.bits(two))
        self.assertEqual(self.bits(one), self.bits(three))
        self.assertGreater(len(self.manifest(one)["splits"]["train"]["shards"]), 2)
        self.assertTrue(len(self.tokens(one, "val")))

    def test_shards_are_cut(self):
        text = self.write("a.txt", "x" * 1000)
        out = self.prepare("--tokenizer", "bytes", "--val", "0", "--shard-tokens", "300",
                           "--separate", "line", text)
        self.assertEqual([s["tokens"] for s in self.manifest(out)["splits"]["train"]["shards"]],
                         [300, 300, 300, 101])
        self.assertEqual(self.documents(out, "train"), [b"x" * 1000])

    def test_memory_does_not_grow_with_the_text(self):
        most = {}
        for processes in ("1", "2"):
            for megabytes in (60, 160):
                text = self.path("big.txt")
                with open(text, "wb") as file:
                    for _ in range(megabytes):  # in pieces: a child's peak begins with its parent's
                                                # memory
                        file.write((b"x" * 99 + b"\n") * 10000)
                code = (f"import resource, sys; sys.path.insert(0, {DATA!r}); import prepare\n"
                        "if __name__ == '__main__':\n    prepare.main(sys.argv[1:])\n"
                        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "
                        "file=sys.stderr)\n")
                for separate in ("file", "\\n\\n"):
                    out = self.path(f"m{processes}_{megabytes}_{separate.isalpha()}")
                    command = [sys.executable, self.write("memory.py", code), "--tokenizer",
                               "bytes", "--out", out,
                               "--processes", processes, "--separate", separate, text]
                    done = subprocess.run(command, capture_output=True, text=True)
                    self.assertEqual(done.returncode, 0, done.stderr)
                    most[megabytes, separate] = int(done.stderr.split()[-1])    # KiB
            for separate in ("file", "\\n\\n"):
                self.assertLess(most[160, separate], most[60, separate] + 60000,
                                f"{processes} processes, {separate}")

    def test_again_and_foreign(self):
        text = self.write("a.txt", "one\ntwo\nthree\n")
        arguments = ("--tokenizer", "bytes", "--val", "0", "--separate", "line", text)
        out = self.prepare(*arguments)
        before = self.bits(out)
        self.prepare(*arguments, out=out)
        self.assertIn("nothing to do", self.said)
        self.refused("holds other data already", *arguments, "--seed", "3", out=out)
        self.write("a.txt", "one\ntwo\nfour!\n")
        self.refused("holds other data already", *arguments, out=out)
        self.assertEqual(self.bits(out), before)
        self.write(os.path.join(out, "manifest.json"), "[]")
        self.refused("manifest.json: it is not a JSON object", *arguments, out=out)
        os.remove(os.path.join(out, "manifest.json"))
        self.refused("holds train_000000.bin, which belongs to other data", *arguments, out=out)
        self.write("other/tokenizer.bin", "x")
        self.refused("belongs to another tokenizer", *arguments, out=self.path("other"))

    def start(self, *arguments):
        """prepare.py in processes of its own, of units of 64 KiB, which saves after every one."""
        path = self.write("start.py", f"import os, sys\nsys.path.insert(0, {DATA!r})\nimport "
                          f"corpus, prepare\n"
                          "if __name__ == '__main__':\n    corpus.UNIT, prepare.SAVE_SECONDS = 1 "
                          "<< 16, 0\n"
                          "    def act(arguments):                 # from here on main() answers "
                          "to an interruption\n"
                          "        print('started', flush=True)\n"
                          "        args = prepare.parser().parse_args(arguments)\n"
                          "        prepare.prepare(prepare.check(args))\n"
                          "    prepare.main(sys.argv[1:], act)\n")
        process = subprocess.Popen([sys.executable, path, *arguments], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)
        process.stdout.readline()
        return process

    def tokens_done(self, out):
        """So many tokens an unfinished run would not make again."""
        try:
            progress = prepare.read_json(os.path.join(out, "progress.json"))
        except vocabulary.Problem:
            return 0
        return progress["train"]["tokens"] + progress["val"]["tokens"]

    def test_interrupted_runs_give_the_same_bits(self):
        text, r = self.big(), random.Random(11)
        arguments = ("--tokenizer", "bytes", "--shard-tokens", "50000", text)
        whole = self.path("whole")
        process = self.start(*arguments, "--out", whole)
        said = process.communicate()[0]
        self.assertEqual(process.returncode, 0, said)
        total = sum(split["tokens"] for split in self.manifest(whole)["splits"].values())
        for processes, end in (("1", signal.SIGKILL), ("1", signal.SIGINT), ("2", signal.SIGINT)):
            out, interrupted = self.path(f"out_{processes}_{int(end)}"), 0
            for stop in sorted(r.uniform(0, 0.8) for _ in range(4)) + [2]:
                process = self.start(*arguments, "--processes", processes, "--out", out)
                while process.poll() is None and self.tokens_done(out) <= stop * total:
                    time.sleep(0.001)
                if process.poll() is None:
                    os.killpg(process.pid, end)
                said = process.communicate()[0]
                interrupted += process.returncode != 0
                done = os.path.exists(os.path.join(out, "manifest.json"))
                if process.returncode and end == signal.SIGINT and not done:
                    self.assertIn("run the same command again to continue", said)
            self.assertEqual(process.returncode, 0, said)
            self.assertGreaterEqual(interrupted, 2)
            self.assertEqual(self.bits(out), self.bits(whole),
                             f"{processes} processes, {interrupted} times")

    def test_interrupted_run_refuses_other_options(self):
        path = self.write("a.txt", "line\n" * 10)
        arguments = ("--tokenizer", "bytes", "--val", "0", "--separate", "line", path)
        out = self.path("out")
        with mock.patch.object(prepare, "encode_unit", side_effect=KeyboardInterrupt):
            with self.assertRaises(SystemExit):
                self.prepare(*arguments, out=out)
        self.assertTrue(os.path.exists(os.path.join(out, "progress.json")))
        self.refused("interrupted run with other options", *arguments, "--seed", "2", out=out)
        self.write("a.txt", "line\n" * 11)
        self.refused("or its input has changed", *arguments, out=out)

    def test_an_error_does_not_block_the_next_run(self):
        """Neither one before the first token nor one after it, and whatever the person changes."""
        good, bad = '{"text": "x"}\n' * 10, "broken\n"
        for before in (0, 3):
            arguments = ("--tokenizer", "bytes", "--val", "0", "--shard-tokens", "15")
            path = self.write("a.jsonl", good * before + bad + good)
            with mock.patch.object(corpus, "UNIT", 32):
                for retry in (("--skip-bad",), ("--skip-bad", "--seed", "2"), ("input",),
                              ("--tokenizer", "bpe")):
                    with self.subTest(before=before, retry=retry):
                        self.write("a.jsonl", good * before + bad + good)
                        out = self.path(f"out_{before}_{'_'.join(retry)}")
                        self.refused("not a JSON object", *arguments, path, out=out)
                        self.assertEqual(os.path.exists(os.path.join(out, "progress.json")),
                                         before > 0)
                        want = good * before + good
                        if retry[0] == "input":
                            self.write("a.jsonl", want)
                        elif retry[0] == "--tokenizer":
                            retry += ("--vocab-size", "257", "--skip-bad")
                        self.prepare(*arguments, *(retry if retry[0] != "input" else ()), path,
                                     out=out)
                        self.assertEqual(self.documents(out, "train"), [b"x"] * want.count("\n"))
                        self.assertFalse([n for n in os.listdir(out) if n.endswith(".tmp")
                                          or n == "progress.json"])
        out = self.path("out_3_--skip-bad")     # finished, with a bad record left out
        self.write("a.jsonl", good * 3 + bad + good)
        self.refused("holds other data", *arguments, path, out=out)

    def test_no_document_is_no_data(self):
        for arguments in (("--skip-bad", self.write("a.jsonl", "no\nno\n")),
                          ("--separate", "line", self.write("a.txt", "\n\n")),
                          (self.write("b.jsonl", '{"text": null}\n'),)):
            out = self.path("out")
            self.refused("no document was left", "--tokenizer", "bytes", *arguments, out=out)
            self.assertEqual(os.listdir(out), [])
        self.prepare("--tokenizer", "bytes", "--val", "0", self.write("c.txt", "text"), out=out)
        self.assertEqual(self.documents(out, "train"), [b"text"])

    def test_names_that_are_no_utf8(self):
        state = vocabulary.train_bpe([b"ab abc abc"], 259)
        text, t = os.fsdecode(b"\xff.txt"), self.write(os.fsdecode(b"t\xff.json"), state)
        self.write(text, b"ab\xfecd")
        command = [sys.executable, os.path.join(DATA, "prepare.py"), "--processes", "1", "--val",
                   "0", "--tokenizer", t,
                   "--separate", os.fsdecode(b"\xfe"), "--out", self.path(os.fsdecode(b"o\xff")),
                   self.path(text)]
        for _ in range(2):
            done = subprocess.run(command, capture_output=True,
                                  env={**os.environ, "PYTHONUTF8": "1"})
            self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents(self.path(os.fsdecode(b"o\xff")), "train"), [b"ab", b"cd"])

    def test_no_exception_escapes(self):
        text = self.write("a.txt", "text")
        for fault, part in ((KeyError("x\ny"), "unexpected KeyError: 'x\\ny', "),
                            (RecursionError(), "unexpected Rec"),
                            (MemoryError(), "unexpected MemoryError, "),
                            (OSError(5, "It burns"), "It burns")):
            with mock.patch.object(vocabulary.ByteVocabulary, "encode", side_effect=fault):
                self.refused(part, "--tokenizer", "bytes", "--val", "0", text)
        with mock.patch.object(vocabulary.ByteVocabulary, "encode", side_effect=KeyError("x")):
            with mock.patch.dict(os.environ, DROPPATH_DEBUG="1"), self.assertRaises(KeyError):
                self.prepare("--tokenizer", "bytes", "--val", "0", text)
        scripts = os.path.join(ROOT, "scripts")
        code = f"import sys; sys.path.insert(0, {scripts!r}); import runs; {{}}['x']"
        for debug, lines in (("", 2), ("1", 3)):    # what plot.py and tensorboard.py share
            done = subprocess.run([sys.executable, "-c", code],
                                  env={**os.environ, "DROPPATH_DEBUG": debug},
                                  capture_output=True, text=True)
            self.assertEqual((done.returncode, "unexpected KeyError: 'x'" in done.stderr),
                             (1, not debug))
            self.assertEqual(len(done.stderr.splitlines()), lines, done.stderr)
        with mock.patch.dict(sys.modules, {"broken": None}):
            self.assertRaises(vocabulary.Problem, vocabulary.library, "broken")


# ---- fetch.py, with a hub on this machine ----

class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for: a data set's commit, a folder's
    files, their bytes."""
    files, commit, break_after, ranges = {}, "0123456789abcdef0123456789abcdef01234567", None, []

    def log_message(self, *_):
        pass

    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def serve(self, head):
        path = urllib.parse.unquote(self.path.split("?")[0])
        if "/resolve/" in path:
            data = self.files[path.split(self.commit + "/")[1]]
            start = int(re.match(r"bytes=(\d+)", self.headers.get("Range", "bytes=0"))[1])
            if start:
                self.ranges.append(start)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("ETag", '"%s"' % hashlib.sha256(data).hexdigest())
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - start))
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if not head:
                self.wfile.write(data[start:] if self.break_after is None
                                 else data[start:start + self.break_after])
                if self.break_after is not None:
                    self.close_connection = True
        elif "/tree/" in path:
            folder = path.split(self.commit + "/")[1]
            sums = {p: self.sums.get(p, hashlib.sha256(d).hexdigest()) for p,
                    d in self.files.items()}
            self.reply([{"type": "file", "path": p, "size": len(d), "oid": "0" * 40,
                         "lfs": {"oid": sums[p], "size": len(d), "pointerSize": 130}}
                        for p, d in self.files.items() if p.startswith(folder + "/")])
        else:
            self.reply({"id": "some/set", "sha": self.commit, "tags": [], "siblings": []})

    sums = {}

    def do_GET(self):
        self.serve(False)

    def do_HEAD(self):
        self.serve(True)


class Hub(Case):
    def parquet(self, documents):
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": documents, "n": list(range(len(documents)))}), sink,
                       compression="none")
        return sink.getvalue()

    def hub(self, files):
        """Serves files {path: bytes} as the hub; returns the environment in which fetch.py finds
        it."""
        handler = type("Handler", (HubHandler,), {"files": files, "ranges": [], "sums": {}})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        home = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
                "HF_HOME": self.path("home"),
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return handler, {**os.environ, **home}


class Fetch(Hub):
    def start_fetch(self, env, *arguments):
        command = [sys.executable, os.path.join(DATA, "fetch.py"), *arguments, "--downloads",
                   self.path("down"),
                   "--tokenizer", "bytes", "--processes", "1"]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def test_tinystories_from_a_hub(self):
        stories = [f"Story {i}. " + "Once upon a time. " * 6000 for i in range(250)]
        files = {"data/train-0.parquet": self.parquet(stories[:230]),
                 "data/train-1.parquet": self.parquet(stories[230:]),
                 "data/validation-0.parquet": self.parquet(["A last story."]),
                 "data/README.txt": b"no"}
        handler, env = self.hub(files)
        handler.break_after = 11 << 20          # connections break; the client keeps each 10 MiB
        done = self.start_fetch(env, "tinystories", "--out", self.path("out"))
        handler.break_after = None
        if done.returncode:
            self.assertIn("run the same command again to continue", done.stderr)
            done = self.start_fetch(env, "tinystories", "--out", self.path("out"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(handler.ranges, "nothing was resumed")
        self.assertEqual(self.documents(self.path("out"), "train"), [s.encode() for s in stories])
        self.assertEqual(self.documents(self.path("out"), "val"), [b"A last story."])
        # all is here: no network is needed
        gone = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = self.start_fetch(gone, "tinystories", "--out", self.path("out"))
        self.assertIn("nothing to do", done.stderr)

    def test_fineweb_from_a_hub_with_a_wrong_file(self):
        files = {f"sample/10BT/{i:03d}_00000.parquet": self.parquet([f"page {i} {k}"
            for k in range(50)])
                 for i in range(3)}
        handler, env = self.hub(files)
        handler.sums["sample/10BT/001_00000.parquet"] = "0" * 64
        done = self.start_fetch(env, "fineweb", "--out", self.path("out"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("001_00000.parquet does not match the SHA-256 listed by "
                      "HuggingFaceFW/fineweb", done.stderr)
        self.assertFalse(os.path.exists(self.path("down/sample/10BT/001_00000.parquet")))
        self.assertFalse(os.path.exists(self.path("out")))
        done = self.start_fetch(env, "fineweb", "--files", "1", "--val", "0.2", "--out",
                                self.path("out"))
        self.assertEqual(done.returncode, 0, done.stderr)
        got = self.documents(self.path("out"), "train") + self.documents(self.path("out"), "val")
        self.assertEqual(sorted(got), sorted(b"page 0 %d" % k for k in range(50)))

    def test_no_network(self):
        env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": self.path("home")}
        done = self.start_fetch(env, "fineweb", "--edu", "--out", self.path("out"))
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"^error: cannot list HuggingFaceFW/fineweb-edu at "
                         r"http://127.0.0.1:9: .*\n  hi")
        done = self.start_fetch(env, "tinyshakespeare", "--source", "http://127.0.0.1:9/x", "--out",
                                self.path("out"))
        self.assertRegex(done.stderr, r"^error: cannot download http://127.0.0.1:9/x: .*\n  hint: ")
        self.assertFalse(os.path.exists(self.path("out")))

    def test_from_a_folder(self):
        self.write("src/sample/10BT/000.parquet", self.parquet(["a", "b"]))
        self.write("flat/train-0.parquet", self.parquet(["a", "b"]))
        self.write("flat/validation-0.parquet", self.parquet(["c"]))
        env = os.environ
        done = self.start_fetch(env, "fineweb", "--source", self.path("src"), "--val", "0", "--out",
                                self.path("a"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents(self.path("a"), "train"), [b"a", b"b"])
        done = self.start_fetch(env, "tinystories", "--source", self.path("flat"), "--out",
                                self.path("b"))
        self.assertEqual(self.documents(self.path("b"), "val"), [b"c"])
        done = self.start_fetch(env, "tinystories", "--source", self.path("src"), "--out",
                                self.path("c"))
        self.assertIn("has no file train-*.parquet", done.stderr)
        text = self.write("x.txt", "no")
        done = self.start_fetch(env, "tinyshakespeare", "--source", text, "--out", self.path("c"))
        self.assertIn("is not tinyshakespeare (wrong SHA-256)", done.stderr)


# ---- Multiple-choice questions ----

ROOF = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he", "split": "val", "label": 3,
        "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                    "is holding a rubik's cube.", "starts pulling up roofing on a roof."]}


class Twos:
    """A tokenizer of whose tokens each is two characters, or the last one."""
    name, size, end_of_text, json, width = "twos", 1 << 24, 9, None, 4

    def encode(self, documents):
        texts = [d.decode() for d in documents]
        return [(np.array([int.from_bytes(t[i:i + 2].encode(), "big") for i in range(0, len(t), 2)],
                          np.uint32),
                 len(t), False) for t in texts]


class Choices(Hub):
    def convert(self, *arguments, out=None):
        out = out or self.path("q.bin")
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            prepare.main([*arguments, "--out", out], choices.act)
        with open(out, "rb") as file:
            return file.read()

    def questions(self, *records):
        return self.write("q.jsonl", "".join(json.dumps(r) + "\n" for r in records))

    def words(self, data, code="H"):
        return list(struct.unpack(f"<{(len(data) - 1024) // struct.calcsize(code)}{code}",
                                  data[1024:]))

    def test_bytes_of_the_file(self):
        path = self.questions({"context": "Sky:", "choices": ["blue", "\nred"], "answer": 1},
                              {"context": "", "choices": ["a", "bc", "d"], "answer": 0})
        data = self.convert(path, "--tokenizer", "bytes")
        table = struct.pack("<256i", 20240328, 2, 257, 256, *[0] * 252)
        table += b"".join(bytes([1, b]) for b in range(256)) + b"\x0d<|endoftext|>"
        head = struct.pack("<8I", 20240522, 1, 2, 2 * 21, 0, 0, 0,
                           0) + hashlib.sha256(table).digest()
        self.assertEqual(data[:1024], head + bytes(1024 - len(head)))
        self.assertEqual(self.words(data), [
            65535, 42, 0, 1, 2, 4, *b"Sky:", 5, *b" blue", 4, *b"\nred",
            65535, 34, 1, 0, 3, 1, 256, 2, *b" a", 3, *b" bc", 2, *b" d"])

    def test_hellaswag_as_the_harness_asks(self):
        wikihow = {"activity_label": "Health", "ctx_a": " How to sleep [header] Relax. [title] Lie "
                   "down.", "ctx_b": "",
                   "ctx": "raw", "label": "1", "endings": ["[step] Well.  Yes. ",
                                                           "No [substeps] way."]}
        words = self.words(self.convert(self.questions(ROOF, wikihow), "--tokenizer", "bytes"))
        context = b"Roof shingle removal: A man is sitting on a roof. He"
        self.assertEqual(words[2:6 + len(context)], [0, 3, 4, len(context), *context])
        second = words[words[1] // 2:]
        context = b"Health: How to sleep Relax.. Lie down."
        first, other = b"  Well. Yes.", b" No way."
        self.assertEqual(second[2:], [1, 1, 2, len(context), *context, len(first), *first,
                                      len(other), *other])

    def test_hellaswag_as_llmc_asks(self):
        for tokenizer, context, last in (("bytes", list(b"A man is sitting on a roof. he"),
                                          list(b" starts pulling up roofing on a roof.")),
                                         (GPT2 and GPT2[1], [32, 582, 318, 5586, 319, 257, 9753, 13,
                                             339],
                                          [4940, 10427, 510, 9753, 278, 319, 257, 9753, 13])):
            if not tokenizer:
                continue
            words = self.words(self.convert(self.questions(ROOF), "--tokenizer", tokenizer,
                                            "--style", "llmc",
                                            out=self.path(f"{len(context)}.bin")))
            self.assertEqual(words[2:6 + len(context)], [0, 3, 4, len(context), *context])
            self.assertEqual(words[-len(last) - 1:], [len(last), *last])

    def test_tokens_that_span_context_and_choice(self):
        found = choices.plain({"context": "abc", "choices": ["x", "yz"], "answer": 0})
        context, rows = choices.tokens_of(Twos(), found)
        self.assertEqual([struct.pack(">H", t) for t in context], [b"ab"])
        self.assertEqual(rows, [[0x6320, 0x78], [0x6320, 0x797A]])
        context, rows = choices.tokens_of(Twos(),
                                          choices.plain({"context": "ab ", "choices": ["x", "y"],
                                                         "answer": 0}))
        # the space goes to the choice
        self.assertEqual((context, rows), ([0x6162], [[0x2078], [0x2079]]))

    def test_words_of_32_bits(self):
        sums = "00" * 31 + "07"
        for token, width in ((65534, 2), (65535, 4), (1 << 24, 4)):
            data = choices.encoded([[0, 0, 0, 1, 2, 1, token, 1, 5, 1, 6]], sums)
            self.assertEqual(struct.unpack("<4I", data[:16]), (20240522, width // 2, 1, 11 * width))
            self.assertEqual(data[32:64], bytes.fromhex(sums))
            mark = (1 << 8 * width) - 1
            self.assertEqual(self.words(data, "H" if width == 2 else "I"),
                             [mark, 11 * width, 0, 1, 2, 1, token, 1, 5, 1, 6])
        # more bytes than 16 bits count
        long = {"context": "x" * 33000, "choices": ["a", "b"], "answer": 0}
        data = self.convert(self.questions(long), "--tokenizer", "bytes")
        self.assertEqual(struct.unpack("<4I", data[:16])[1:], (2, 1, 4 * (6 + 33000 + 6)))

    def test_questions_that_are_refused(self):
        def refused(part, *arguments, name="q.jsonl", text=None):
            path = self.write(name, text) if text is not None else self.path(name)
            with self.assertRaises(SystemExit) as caught:
                self.convert(path, "--tokenizer", "bytes", *arguments)
            self.assertIn(part, str(caught.exception))
            self.assertTrue(str(caught.exception).startswith("error: "))
            self.assertFalse(os.path.exists(self.path("q.bin")))
        good = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 0}) + "\n"
        refused("line 2: not a JSON object", text=good + "{")
        refused("element 1: not a JSON object", text="[1]\n")
        refused("line 1: not a JSON object", text=b'{"context": "\xff"}\n')
        for record, part in (({"context": "a"}, 'neither "endings" (HellaSwag) nor "choices"'),
                             ({"choices": ["b", "c"], "answer": 0}, "it has no 'context'"),
                             ({"context": "a", "choices": ["b", "c"]}, "it has no 'answer'"),
                             ({"context": "a", "choices": ["b", "c"], "answer": 2},
                              "its answer is 2, and it has 2"),
                             ({"context": "a", "choices": ["b", "c"], "answer": -1},
                              "its answer is -1"),
                             ({"context": "a", "choices": ["b", "c"], "answer": "0"},
                              "its answer a whole number"),
                             ({"context": "a", "choices": ["b"], "answer": 0},
                              "at least two non-empty choices"),
                             ({"context": "a", "choices": ["b", ""], "answer": 0},
                              "at least two non-empty choices"),
                             ({"context": "a", "choices": ["b", 3], "answer": 0},
                              "has the wrong type"),
                             ({"context": 7, "choices": ["b", "c"], "answer": 0},
                              "has the wrong type"),
                             ({**ROOF, "label": ""}, "it has no label"),
                             ({**ROOF, "label": "x"}, "invalid literal"),
                             ({**ROOF, "ctx_b": None}, "has the wrong type")):
            refused(part, text=good + json.dumps(record))
            self.assertRaisesRegex(ValueError, re.escape(part), choices.question, record, "harness")
        refused("no question was found", text="\n\n")
        refused("questions are lines of JSON", name="q.txt", text="x")
        refused("is not a readable Parquet file", name="q.parquet", text="x")
        refused("No such file", name="none.jsonl")
        refused("need the model's tokenizer", "--tokenizer", "bpe", text=good)
        kept = self.write("kept.bin", "x")
        with self.assertRaises(SystemExit) as caught:
            self.convert(self.questions(ROOF), "--tokenizer", "bytes", out=kept)
        self.assertIn("exists already", str(caught.exception))

    def test_irregular_questions(self):
        """They are read as prepare.py reads documents: data/README.md."""
        good = '{"context": "a\\ud83d", "choices": ["b", "c"], "answer": 0, "n": %s}' % ("9" * 5000)
        want = self.convert(self.write("q.jsonl", good), "--tokenizer", "bytes",
                            out=self.path("0.bin"))
        self.assertIn(bytes(b for c in "a\ufffd".encode() for b in (c, 0)), want)
        for i, data in enumerate(("\ufeff" + good + "\r\n", f"[{good}]", f"\ufeff[\n{good}\n]\n")):
            path = self.write("q.json", data)
            self.assertEqual(self.convert(path, "--tokenizer", "bytes",
                                          out=self.path(f"{i + 1}.bin")), want, data[:9])
        row = {"context": pa.array(["Sky:"]).dictionary_encode(), "choices": [["x", "y"]],
               "answer": [1]}
        pq.write_table(pa.table(row), self.path("q.parquet"))
        self.assertEqual(len(self.convert(self.path("q.parquet"), "--tokenizer", "bytes",
                                          out=self.path("p.bin"))),
                         1024 + 2 * 16)
        pq.write_table(pa.table([["x"], ["y"]], names=["context", "context"]),
                       self.path("q.parquet"))
        for part, name in (("has duplicate columns context", "q.parquet"),
                           ("has context twice", self.write("r.jsonl",
                                                            '{"context": "a", "context": "b"}'))):
            with self.assertRaises(SystemExit) as caught:
                self.convert(self.path(name), "--tokenizer", "bytes", out=self.path("z.bin"))
            self.assertIn(part, str(caught.exception))

    def test_hellaswag_from_a_hub(self):
        table = pa.table({k: [v, v] for k, v in {**ROOF, "label": "3"}.items()})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        handler, env = self.hub({"default/validation/0000.parquet": sink.getvalue(),
                                 "default/train/0000.parquet": b"no"})
        command = [sys.executable, os.path.join(DATA, "fetch.py"), "hellaswag", "--tokenizer",
                   "bytes", "--downloads",
                   self.path("down"), "--out", self.path("h", "v.bin")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = self.write("q.jsonl.gz",
                           gzip.compress((json.dumps(ROOF) + "\n" + json.dumps(ROOF)).encode()))
        with open(self.path("h", "v.bin"), "rb") as file:
            self.assertEqual(file.read(), self.convert(lines, "--tokenizer", "bytes"))
        self.assertIn("2 examples", done.stdout)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        self.assertIn("exists already", done.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)   # which a shell's background jobs
                                                               # ignore
    unittest.main()
