"""Tokenizers: convert documents to token ids, and write the files that convert them back.

A vocabulary has `name`, `size`, `end_of_text` (a token id), `encode` (documents -> arrays of
tokens), `token_bytes` (the bytes of every token, for tokenizer.bin) and `json` (a tokenizer.json,
or None). It can be pickled: every worker process gets a copy.
"""
import hashlib
import json
import os
import re
import secrets
import struct
import sys

try:
    import numpy as np
except ImportError:
    sys.exit("error: the Python library numpy is missing\n  hint: python3 -m venv build/venv && . "
             "build/venv/bin/activate && python3 -m pip install -r data/requirements.txt")

END_OF_TEXT = "<|endoftext|>"
MOST_TOKENS = 1 << 24                   # the limit of dev/files/tokenizer.h
# Other tokenizers' names for it; the first one in a tokenizer.json is used.
END_OF_TEXT_NAMES = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end|>", "[EOS]",
                     "[SEP]"]
# GPT-2's files as published by OpenAI; Hugging Face has the same bytes as vocab.json and
# merges.txt.
GPT2_SHA256 = {"encoder": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
               "merges": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"}


class Problem(Exception):
    """An error for the user to fix: shown as one line, with a hint after a newline."""


def unexpected(error):
    """The message for an unforeseen exception: one line, with its location, and a hint."""
    import traceback
    where = traceback.extract_tb(error.__traceback__)
    place = f", {os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else ""
    what = " ".join(str(error).split())[:200]
    return (f"error: unexpected {type(error).__name__}{': ' if what else ''}{what}{place}\n"
            "  hint: DROPPATH_DEBUG=1 shows the traceback; please include it in a report")


def refuse_pointer(path, data=None):
    """Refuses a Git LFS pointer in place of a file. data: the file's first bytes, if known."""
    if data is None:
        with open(path, "rb") as file:
            data = file.read(64)
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise Problem(
            f"{path}: a Git LFS pointer, not the file itself\n  hint: git lfs pull fetches the "
            f"content")


def library(name):
    """Imports a library, or tells how to install it."""
    import importlib
    try:
        return importlib.import_module(name)
    except ImportError as e:
        if getattr(e, "name", None) != name.split(".")[0]:
            raise Problem(
                f"the Python library {name} cannot be loaded: {' '.join(str(e).split())[:200]}\n"
                          "  hint: reinstall it in a virtual environment: data/README.md")
        raise Problem(
            f"the Python library {name} is missing\n  hint: in a virtual environment "
            f"(data/README.md): "
                      "python3 -m pip install -r data/requirements.txt")


def decoded(document):
    """The text of a document, and whether some of its bytes were not UTF-8 (each becomes
    U+FFFD)."""
    try:
        return document.decode("utf-8"), False
    except UnicodeDecodeError:
        return document.decode("utf-8", "replace"), True


class ByteVocabulary:
    """Token b is byte b, as in build/data_bytes."""
    name, size, end_of_text, json, width = "bytes", 257, 256, None, 2

    def encode(self, documents):
        """For each document (bytes): a list of tokens, bytes of text, and whether it had invalid
        bytes."""
        return [(np.frombuffer(d, dtype=np.uint8).astype(np.uint16), len(d), False)
                for d in documents]

    def token_bytes(self):
        return [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]


class Gpt2Vocabulary:
    """GPT-2's tokenizer, by tiktoken. "<|endoftext|>" in a document is ordinary text."""
    name, size, end_of_text, json, width = "gpt2", 50257, 50256, None, 2

    def __init__(self, encoding):
        self.encoding = encoding

    def tokens(self, text):
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # GPT-2's pattern fails on about 100,000 consecutive white-space characters. It takes
            # all but the last of them as one piece, so cutting there changes no token.
            cuts = [m.end() - 1 for m in re.finditer(r"\s{1000,}", text)]
            if not cuts:
                raise
            ends = cuts + [len(text)]
            return np.concatenate([self.encoding.encode_to_numpy(text[a:b], disallowed_special=())
                                   for a, b in zip([0] + cuts, ends)])

    def encode(self, documents):
        result = []
        for document in documents:
            text, bad = decoded(document)
            size = len(text.encode()) if bad else len(document)
            result.append((self.tokens(text).astype(np.uint16), size, bad))
        return result

    def token_bytes(self):
        return [self.encoding.decode_single_token_bytes(i) for i in range(self.size)]


def merged(pair, prefix):
    """The result of a merge in a tokenizer.json; pairs are "a b" or ["a", "b"]."""
    a, b = pair.split(" ") if isinstance(pair, str) else pair
    return a, b, a + (b[len(prefix):] if prefix and b.startswith(prefix) else b)


def without_names(state, end_of_text):
    """A tokenizer.json that encodes as `state` does, except that no text encodes to the end-of-text
    token, the unknown token or a special token: they keep their ids and get random names. Unmarking
    them would not suffice: not every file marks what ends a document, and a model finds in a text
    whatever its vocabulary has."""
    model, added = state["model"], state.get("added_tokens") or []
    names = {end_of_text, *(t["content"] for t in added if t.get("special"))}
    vocab, unigram = model["vocab"], isinstance(model["vocab"], list)
    if model.get("unk_token"):
        names.add(model["unk_token"])
    if unigram and model.get("unk_id") is not None:
        names.add(vocab[model["unk_id"]][0])
    new = {name: f"<{secrets.token_hex(24)}>" for name in names}
    if unigram:
        model["vocab"] = [[new.get(name, name), *rest] for name, *rest in vocab]
    else:
        model["vocab"] = {new.get(name, name): number for name, number in vocab.items()}
    if model.get("unk_token"):
        model["unk_token"] = new[model["unk_token"]]
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix")
        model["merges"] = [m for m in model["merges"] if names.isdisjoint(merged(m, prefix))]
    for token in added:
        if token["content"] in new:
            token.update(content=new[token["content"]], special=True)
    state["post_processor"] = None      # it adds tokens by name, which are not wanted here
    return state


class JsonVocabulary:
    """Any tokenizer.json, by tokenizers. Special tokens are never found in a document: there their
    names are text."""

    def __init__(self, name, text, end_of_text=None):
        tokenizer = library("tokenizers").Tokenizer.from_str(text)
        self.name, self.json = name, text
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        self.width = 2 if self.size <= 1 << 16 else 4
        known = [end_of_text] if end_of_text else END_OF_TEXT_NAMES
        found = [n for n in known if n in vocabulary]
        if not found:
            wanted = (f"no token {end_of_text}" if end_of_text else
                      "no end-of-text token with a usual name")
            special = ", ".join(t.content for t in tokenizer.get_added_tokens_decoder().values())
            raise Problem(
                f"{name} has {wanted}\n  hint: --end-of-text TOKEN; its special tokens: "
                f"{special or 'none'}")
        self.end_of_text, self.end_name = vocabulary[found[0]], found[0]
        self.start()

    def start(self):
        state = without_names(json.loads(self.json), self.end_name)
        self.tokenizer = library("tokenizers").Tokenizer.from_str(json.dumps(state))
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "tokenizer"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.start()

    def encode(self, documents):
        pairs = [decoded(document) for document in documents]
        coded = self.tokenizer.encode_batch_fast([text for text, bad in pairs],
                                                 add_special_tokens=False)
        kind = np.uint16 if self.width == 2 else np.uint32
        if any(self.end_of_text in c.ids for c in coded):
            raise Problem(
                f"{self.name} encodes unknown characters as {self.end_name}, which ends a "
                          "document\n  hint: choose another token with --end-of-text")
        return [(np.array(c.ids, dtype=kind), len(text.encode()) if bad else len(d), bad)
                for c, (text, bad), d in zip(coded, pairs, documents)]

    def token_bytes(self):
        """None if a token's bytes depend on the tokens around it, as with WordPiece."""
        state = json.loads(self.json)
        kinds = component_types(state.get("pre_tokenizer")) | component_types(state.get("decoder"))
        if "ByteLevel" in kinds:
            written = gpt2_written
        elif kinds & {"ByteFallback", "Metaspace"}:
            written = sentencepiece_written
        else:
            return None                 # as with WordPiece
        special = {t["id"] for t in state.get("added_tokens", [])}
        table = [f"<|unused {i}|>".encode() for i in range(self.size)]
        # with its original names
        tokenizer = library("tokenizers").Tokenizer.from_str(self.json)
        for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
            table[i] = token.encode() if i in special else written(token)
        # A token that decodes to nothing never occurs in text; the file requires at least one byte.
        return [t or f"<|empty {i}|>".encode() for i, t in enumerate(table)]


def component_types(part):
    """The types of a component of a tokenizer.json and of its parts."""
    if isinstance(part, dict):
        return {part.get("type")}.union(*(component_types(v) for v in part.values()))
    return set().union(*(component_types(v) for v in part)) if isinstance(part, list) else set()


def gpt2_alphabet():
    """Character -> byte in GPT-2's alphabet (bytes_to_unicode in its encoder.py)."""
    prints = [b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)]
    others = [b for b in range(256) if b not in prints]
    return {**{chr(b): b for b in prints}, **{chr(256 + i): b for i, b in enumerate(others)}}


ALPHABET = gpt2_alphabet()


def gpt2_written(token):
    return bytes(ALPHABET[c] for c in token) if all(c in ALPHABET
        for c in token) else token.encode()


def sentencepiece_written(token):
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


# ---- Finding one ----

def read(path):
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as e:
        raise Problem(f"cannot read {path}: {e.strerror}")
    refuse_pointer(path, data)
    return data


def load_gpt2(folder=None):
    """GPT-2's vocabulary from a folder with its two files, or downloaded and cached by tiktoken."""
    tiktoken = library("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    if folder is None:
        try:
            return Gpt2Vocabulary(tiktoken.get_encoding("gpt2"))
        except Exception as e:          # from requests, or from a bad file
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise Problem(
                f"cannot download GPT-2's tokenizer: {reason[:120]}\n  hint: without a network: "
                f"--tokenizer "
                          "bytes, --tokenizer bpe, a tokenizer.json, or a folder with GPT-2's "
                          "encoder.json and vocab.bpe")
    paths = {}
    for part, names in (("encoder", ("encoder.json", "vocab.json")),
                        ("merges", ("vocab.bpe", "merges.txt"))):
        found = [p for p in (os.path.join(folder, n) for n in names) if os.path.exists(p)]
        if not found:
            raise Problem(
                f"{folder} has neither {names[0]} nor {names[1]}\n  hint: --tokenizer takes gpt2, "
                f"bytes, "
                          "bpe, a tokenizer.json, or a folder with GPT-2's files")
        paths[part] = found[0]
        if hashlib.sha256(read(found[0])).hexdigest() != GPT2_SHA256[part]:
            raise Problem(
                f"{found[0]} is not GPT-2's (wrong SHA-256)\n  hint: for another tokenizer, give "
                f"its tokenizer.json")
    ranks = data_gym_to_mergeable_bpe_ranks(paths["merges"], paths["encoder"])
    return Gpt2Vocabulary(tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                            special_tokens={END_OF_TEXT: 50256},
                                            explicit_n_vocab=50257))


def load_json(path, end_of_text=None):
    data = read(path)
    # for use in JSON
    name = os.fsencode(os.path.basename(os.path.abspath(path))).decode("utf-8", "replace")
    try:
        return JsonVocabulary(name, data.decode("utf-8-sig"), end_of_text)
    except Problem:
        raise
    except Exception as e:              # tokenizers raises plain Exception
        raise Problem(f"{path} is not a tokenizer.json: {str(e).splitlines()[0][:200]}")


def load(name, end_of_text=None):
    """Loads gpt2, bytes, a tokenizer.json, or a folder with one or with GPT-2's files."""
    if name == "bytes":
        return ByteVocabulary()
    if name == "gpt2":
        return load_gpt2()
    if os.path.isdir(name):
        inside = os.path.join(name, "tokenizer.json")
        return load_json(inside, end_of_text) if os.path.exists(inside) else load_gpt2(name)
    if not os.path.exists(name):
        raise Problem(
            f"--tokenizer {name}: no such file\n  hint: gpt2, bytes, bpe, a tokenizer.json, or a "
                      "folder with GPT-2's encoder.json and vocab.bpe")
    return load_json(name, end_of_text)


def train_bpe(documents, size):
    """Trains a byte-level BPE of `size` tokens with GPT-2's pre-tokenization on documents (bytes);
    returns its tokenizer.json."""
    tokenizers = library("tokenizers")
    least = 257
    if not least <= size <= MOST_TOKENS:
        raise Problem(
            f"--vocab-size {size}: at least {least} tokens are needed (256 bytes and end-of-text), "
            f"at most {MOST_TOKENS}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT],
                                             show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((decoded(d)[0] for d in documents), trainer)
    got = tokenizer.get_vocab_size()
    if got < size:
        raise Problem(f"--vocab-size {size}: the training text has pairs for only {got} tokens\n"
                      f"  hint: --vocab-size {got}, or more text")
    return tokenizer.to_str()


# ---- tokenizer.bin ----

def differs_from_gpt2(state):
    """Why dev/files/tokenizer.h, which encodes as GPT-2 does, would not reproduce this
    tokenizer.json's tokens; or None."""
    model, splits = state["model"], state.get("pre_tokenizer")
    while isinstance(splits,
                     dict) and splits.get("type") == "Sequence" and len(
                         splits["pretokenizers"]) == 1:
        splits = splits["pretokenizers"][0]
    if model.get("type", "BPE") != "BPE" or isinstance(model["vocab"], list):
        return f"its model is {model.get('type', 'unknown')}, not byte-pair encoding"
    normalizer = state.get("normalizer")
    if normalizer and normalizer.get("normalizers") != []:
        return "it normalizes text"
    if not splits or splits.get("type") != "ByteLevel" or splits.get("add_prefix_space", True) or \
            not splits.get("use_regex", True):
        return "it splits text differently"
    odd = [k for k in ("dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix",
                       "end_of_word_suffix")
           if model.get(k)]
    if odd:
        return f"its model has {odd[0]}"
    last = -1
    for pair in model["merges"]:        # the rank of a merge must be the id of its result
        number = model["vocab"][merged(pair, None)[2]]
        if number <= last:
            return "its merges are not in the order of its tokens"
        last = number
    return None


def encodes_otherwise(vocabulary):
    if not vocabulary.json:
        return None
    state = json.loads(vocabulary.json)
    found = [t for t in state.get("added_tokens") or [] if not t.get("special")
             and t["id"] != vocabulary.end_of_text]
    return differs_from_gpt2(state) or ("it has added tokens, which are matched in text first"
                                        if found else None)


def tokenizer_bin(vocabulary):
    """llm.c's format, version 2 (see dev/files/tokenizer.h); our version 3 if a token has more than
    255 bytes or text is encoded differently from GPT-2; or None if tokens have no fixed bytes."""
    table = vocabulary.token_bytes()
    if table is None:
        return None
    otherwise = encodes_otherwise(vocabulary) is not None
    version, length = (3, "<I") if otherwise or max(map(len, table)) > 255 else (2, "B")
    header = struct.pack("<256i", 20240328, version, vocabulary.size, vocabulary.end_of_text,
                         otherwise, *[0] * 251)
    return header + b"".join(struct.pack(length, len(t)) + t for t in table)
