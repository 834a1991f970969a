#!/usr/bin/env python3
"""Converts multiple-choice questions to a file for build/evaluate --choices, with a tokenizer.

    data/choices.py --out data/hellaswag/val.bin --tokenizer gpt2 hellaswag_val.jsonl
    data/choices.py --out data/quiz.bin --tokenizer data/small/tokenizer.json quiz.jsonl

Questions are lines of JSON (.jsonl, also compressed) or Parquet: HellaSwag's records (ctx, endings,
label), or plain ones: {"context": "The sky is", "choices": ["blue.", "made of cheese."],
"answer": 0}. Details: data/README.md.
"""
import argparse
import hashlib
import os
import re
import struct
import sys
from collections import namedtuple

import corpus as corpora
import prepare
import vocabulary as vocabularies
from shards import HEADER, write_whole
from vocabulary import Problem, library, refuse_pointer

MAGIC = 20240522                        # the format: dev/files/choices.h
SUM_WORD = 8                            # header word where the tokenizer's SHA-256 starts
STYLES = ("harness", "llmc")

# choices: continuations, including leading space; apart: encoded without the context
Question = namedtuple("Question", "context choices answer apart")


# ---- Questions ----

def harness_text(text):
    """Cleans a HellaSwag text as EleutherAI's harness does (preprocess in its
    tasks/hellaswag/utils.py): removes WikiHow's bracketed markers, [title] becoming a full stop."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(record, style):
    """style: the prompts of EleutherAI's harness, or the raw texts as in llm.c's
    dev/data/hellaswag.py."""
    if style == "llmc":
        return Question(record["ctx"], [" " + e for e in record["endings"]], int(record["label"]),
                        True)
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Question(harness_text(context), [" " + harness_text(e) for e in record["endings"]],
                    int(record["label"]),
                    False)


def plain(record):
    """Inserts a space between context and choice if neither has white space there."""
    context = record["context"]
    choices = [c if c[:1].isspace() or context[-1:].isspace() else " " + c
               for c in record["choices"]]
    return Question(context, choices, record["answer"], False)


def question(record, style):
    """The question of a record; raises ValueError with what is wrong."""
    try:
        if "endings" in record:
            if record["label"] in ("", -1, "-1"):
                raise ValueError(
                    "it has no label: HellaSwag does not publish those of its test set")
            found = hellaswag(record, style)
        elif "choices" in record:
            found = plain(record)
        else:
            raise ValueError('it has neither "endings" (HellaSwag) nor "choices"')
    except KeyError as e:
        raise ValueError(f"it has no {e.args[0]!r}")
    except (TypeError, AttributeError):
        raise ValueError("a field has the wrong type")
    if not isinstance(found.context, str) or type(found.answer) is not int:
        raise ValueError("its context must be a text, and its answer a whole number")
    if len(found.choices) < 2 or not all(c.strip() for c in found.choices):
        raise ValueError("it needs at least two non-empty choices")
    if not 0 <= found.answer < len(found.choices):
        raise ValueError(
            f"its answer is {found.answer}, and it has {len(found.choices)} choices, counted from "
            f"0")
    return found


def records(path):
    """The records of a file, each with its location, as prepare.py reads them (corpus.py)."""
    pipe = corpora.is_pipe(path)
    kind = "json" if pipe else corpora.endings(path)[0]
    if not pipe:
        refuse_pointer(path)
    if kind == "parquet":
        for i, row in enumerate(parquet_rows(path)):
            yield f"{path}, row {i + 1}", row
        return
    if kind != "json":
        raise Problem(
            f"{path}: questions are lines of JSON, or Parquet\n  hint: name it .jsonl or .parquet")
    i = 0
    for unit in corpora.json_units(corpora.Source("json", [path], None, 0, None)):
        for line in unit.data:
            i += 1
            if not line.strip():
                continue
            record, bad = corpora.json_value(line)
            where = f"{corpora.title(path)}, {'element' if len(unit.where) > 2 else 'line'} {i}"
            if not isinstance(record, dict) or bad:
                raise Problem(f"{where}: not a JSON object")
            if isinstance(record, corpora.Twice):
                raise Problem(f"{where}: it has {', '.join(sorted(record.names))} twice")
            yield where, record


def parquet_rows(path):
    library("pyarrow")
    import pyarrow.parquet as pq
    try:
        names = pq.ParquetFile(path).schema_arrow.names
        twice = {n for n in names if names.count(n) > 1}
        if not twice:
            return pq.read_table(path).to_pylist()
    except Exception as e:              # pyarrow raises many types
        raise Problem(f"{path} is not a readable Parquet file: {str(e).splitlines()[0][:200]}")
    raise Problem(f"{path} has duplicate columns {', '.join(sorted(twice))}\n  hint: rename one")


# ---- Tokens ----

def tokens_of(vocabulary, found):
    """The context's tokens, and those of each choice. Unless they are encoded apart, the joint text
    is encoded and split where the context's tokens end, before any token that spans both. White
    space at the context's end moves to the choices, as in the harness. An empty context becomes
    end-of-text."""
    if found.apart:
        texts = [found.context, *found.choices]
    else:
        texts = [found.context.rstrip()] + [found.context + c for c in found.choices]
    context, *choices = [row.tolist() for row, size,
                         bad in vocabulary.encode([corpora.utf8(t)[0] for t in texts])]
    if not found.apart:
        context = os.path.commonprefix([context, *choices])
        choices = [row[len(context):] for row in choices]
    return context or [vocabulary.end_of_text], choices


def example_words(index, found, tokens):
    context, choices = tokens
    words = [0, 0, index, found.answer, len(choices), len(context), *context]
    for choice in choices:
        words += [len(choice), *choice]
    return words


def encoded(examples, tokenizer_sha256):
    """The file's bytes: words of 16 bits, llm.c's version 1, or of 32 if some value needs them."""
    largest = max(max(w) for w in examples)
    wide = largest >= 0xFFFF or max(map(len, examples)) * 2 > 0xFFFF or len(examples) > 0xFFFF
    width, mark, code = (4, 0xFFFFFFFF, "I") if wide else (2, 0xFFFF, "H")
    for words in examples:
        words[0], words[1] = mark, len(words) * width
    header = bytearray(HEADER)
    struct.pack_into("<4I", header, 0, MAGIC, 2 if wide else 1, len(examples),
                     max(w[1] for w in examples))
    header[4 * SUM_WORD:4 * SUM_WORD + 32] = bytes.fromhex(tokenizer_sha256)
    return bytes(header) + b"".join(struct.pack(f"<{len(w)}{code}", *w) for w in examples)


def check(options):
    """Fails early, before a download, on bad options. Returns the vocabulary."""
    if os.path.exists(options.out):
        raise Problem(f"{options.out} exists already\n  hint: choose another --out, or remove it")
    if options.tokenizer == "bpe":
        raise Problem(
            "--tokenizer bpe: the questions need the model's tokenizer\n  hint: the tokenizer.json "
            "that "
                      "prepare.py wrote beside the shards")
    return vocabularies.load(options.tokenizer, options.end_of_text)


def convert(options):
    vocabulary = check(options)
    table = vocabularies.tokenizer_bin(vocabulary)
    main = table or vocabulary.json.encode()        # the file that prepare.py's manifest names, too
    examples = []
    for path in options.inputs:
        for where, record in records(path):
            try:
                found = question(record, options.style)
            except ValueError as e:
                raise Problem(f"{where}: {e}")
            context, choices = tokens_of(vocabulary, found)
            if not all(choices):
                raise Problem(f"{where}: a choice adds no token to the context")
            examples.append(example_words(len(examples), found, (context, choices)))
    if not examples:
        raise Problem(f"no question was found in {', '.join(options.inputs)}")
    data = encoded(examples, hashlib.sha256(main).hexdigest())
    os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
    write_whole(options.out, data)
    print(f"{len(examples):,} examples, {len(data):,} bytes, tokens of {vocabulary.name}: "
          f"{options.out}")


# ---- Options ----

def add_choices_options(p):
    """Options shared with data/fetch.py."""
    p.add_argument("--tokenizer", metavar="T", default="gpt2",
                   help="the model's: gpt2, bytes, a tokenizer.json, or a "
                   "folder with one or with GPT-2's encoder.json and vocab.bpe (default gpt2)")
    p.add_argument("--end-of-text", metavar="TOKEN",
                   help="for a tokenizer.json: the token that ends a document, if it does not have "
                   "a usual name")
    p.add_argument("--style", choices=STYLES, default="harness",
                   help="for HellaSwag: prompts as in EleutherAI's harness "
                   "or as in llm.c (default %(default)s)")


def parser():
    p = prepare.Parser(prog="choices.py", description=__doc__,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", metavar="INPUT", nargs="+",
                   help="a .jsonl or .parquet file of questions, or - for standard input")
    p.add_argument("--out", required=True, metavar="FILE", help="the output file")
    add_choices_options(p)
    return p


def act(arguments):
    convert(parser().parse_args(arguments))


if __name__ == "__main__":
    prepare.main(sys.argv[1:], act)
