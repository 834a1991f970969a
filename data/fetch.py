#!/usr/bin/env python3
"""Downloads a well-known text and prepares it: one command from nothing to shards.

    data/fetch.py tinyshakespeare --tokenizer bytes      1.1 MB of Shakespeare
    data/fetch.py tinystories                            TinyStories (Eldan and Li 2023), with its
                                                         own validation split
    data/fetch.py fineweb --sample 10BT                  FineWeb's sample of 10 billion GPT-2
                                                         tokens, about 28 GB
    data/fetch.py fineweb --edu --files 1                the first file of FineWeb-Edu's sample
    data/fetch.py hellaswag                              HellaSwag's 10042 validation questions, for
                                                         build/evaluate

If interrupted, the same command continues; every file is checked by size and SHA-256. Without a
network, --source takes the files from a folder laid out as on the hub. Options for tokens and
shards are those of data/prepare.py.
"""
import argparse
import fnmatch
import hashlib
import os
import re
import shutil
import sys
import urllib.request
from collections import namedtuple

import choices
import prepare
from shards import sha256_file, write_json
from vocabulary import Problem, library, load

HERE = os.path.dirname(os.path.abspath(__file__))
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
               "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# A dataset on the Hugging Face hub: its training and validation files (None: use a fraction of the
# documents) in a folder, on a branch (None: main)
Hub = namedtuple("Hub", "repo folder train val branch")
# The hub keeps a Parquet copy of every dataset on this branch.
HELLASWAG = Hub("Rowan/hellaswag", "default/validation", None, "*.parquet", "refs/convert/parquet")


def of_hub(options):
    if options.dataset == "tinystories":
        return Hub("roneneldan/TinyStories", "data", "train-*.parquet", "validation-*.parquet",
                   None)
    if options.dataset == "hellaswag":
        return HELLASWAG
    return Hub("HuggingFaceFW/fineweb-edu" if options.edu else "HuggingFaceFW/fineweb",
               f"sample/{options.sample}",
               "*.parquet", None, None)


# ---- Files on the hub ----

def reason(error):
    """The first line of an exception's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def listing(hub, downloads):
    """Paths, sizes and SHA-256 of the wanted files, all at the commit of the first listing."""
    path = os.path.join(downloads, "listing.json")
    if os.path.exists(path):
        return prepare.read_json(path)
    library("huggingface_hub")
    from huggingface_hub import HfApi, constants
    try:
        commit = HfApi().dataset_info(hub.repo, revision=hub.branch).sha
        files = [{"path": f.path, "size": f.size, "sha256": f.lfs.sha256 if f.lfs else None}
                 for f in HfApi().list_repo_tree(hub.repo, hub.folder, repo_type="dataset",
                                                 revision=commit)
                 if hasattr(f, "size")]
    except Exception as e:              # the HTTP library's exceptions differ by version
        raise Problem(
            f"cannot list {hub.repo} at {constants.ENDPOINT}: {reason(e)}\n  hint: without a "
            f"network, "
                      "--source DIR takes the files from a folder; HF_ENDPOINT selects another hub "
                      "address")
    found = {"repo": hub.repo, "commit": commit, "files": sorted(files, key=lambda f: f["path"])}
    os.makedirs(downloads, exist_ok=True)
    write_json(path, found)
    return found


def wanted(files, pattern, most):
    chosen = [f for f in files if fnmatch.fnmatch(os.path.basename(f["path"]), pattern)]
    return chosen[:most] if most else chosen


def download(found, files, downloads):
    """Downloads the files, resuming if interrupted, and verifies each once. Returns their paths."""
    library("huggingface_hub")
    from huggingface_hub import hf_hub_download
    checked_path = os.path.join(downloads, "checked.json")
    checked = prepare.read_json(checked_path) if os.path.exists(checked_path) else {}
    paths = [os.path.join(downloads, f["path"]) for f in files]

    def stamp(path):
        return [os.path.getsize(path), os.stat(path).st_mtime_ns] if os.path.exists(path) else None

    missing = [(f, p) for f, p in zip(files, paths) if not stamp(p)
               or checked.get(f["path"]) != stamp(p)]
    need = sum(f["size"] for f, p in missing if not os.path.exists(p))
    free = shutil.disk_usage(downloads).free
    if need > free:
        raise Problem(
            f"{need / 1e9:.1f} GB are needed in {downloads}, which has {free / 1e9:.1f} GB free\n"
                      "  hint: --files N takes only the first N; --downloads DIR puts them "
                      "elsewhere")
    for f, path in missing:
        if not os.path.exists(path):
            try:
                hf_hub_download(found["repo"], f["path"], repo_type="dataset",
                                revision=found["commit"],
                                local_dir=downloads)
            except Exception as e:      # from the HTTP library
                raise Problem(f"cannot download {f['path']}: {type(e).__name__}: {reason(e)}\n"
                              "  hint: run the same command again to continue")
        size = os.path.getsize(path)
        if size != f["size"] or (f["sha256"] and sha256_file(path) != f["sha256"]):
            os.remove(path)
            by = "size" if size != f["size"] else "SHA-256"
            raise Problem(f"{path} does not match the {by} listed by {found['repo']}: removed"
                          "\n  hint: run the same command again to download it")
        checked[f["path"]] = stamp(path)
        write_json(checked_path, checked)
    return paths


def from_folder(source, folder, pattern, most):
    """The files of a folder that stands in for the hub, below `folder` or directly in it."""
    inside = os.path.join(source, folder)
    inside = inside if os.path.isdir(inside) else source
    try:
        names = sorted(os.listdir(inside))
    except OSError as e:
        raise Problem(f"cannot read {inside}: {e.strerror}")
    return [os.path.join(inside, f["path"]) for f in wanted([{"path": n} for n in names], pattern,
        most)]


def hub_inputs(o):
    hub, sides = of_hub(o), []
    if hub == HELLASWAG and o.source and os.path.isfile(o.source):
        return [], [o.source]           # the authors' hellaswag_val.jsonl
    downloads = o.downloads or os.path.join(HERE, "downloads", hub.repo.replace("/", "_"), o.sample
                                            or "all")
    found = None if o.source else listing(hub, downloads)
    for pattern in (hub.train, hub.val):
        if not pattern:
            sides.append([])
            continue
        most = o.files if pattern == hub.train else 0
        if o.source:
            paths = from_folder(o.source, hub.folder, pattern, most)
        else:
            paths = download(found, wanted(found["files"], pattern, most), downloads)
        if not paths:
            where = o.source or f"{hub.repo} of {hub.folder}"
            raise Problem(
                f"{where} has no file {pattern}\n  hint: it should hold {hub.repo}'s "
                f"{hub.folder}/{pattern}")
        sides.append(paths)
    return sides


# ---- tinyshakespeare: a single file from the web ----

def shakespeare(o):
    """The path of the text; shared with data/get_text.sh."""
    path = o.source or os.path.join(o.downloads or os.path.join(HERE, "tinyshakespeare"),
                                    "input.txt")
    if os.path.isdir(path):
        path = os.path.join(path, "input.txt")
    if o.source and "://" in o.source:
        path, url = os.path.join(o.downloads or os.path.join(HERE, "tinyshakespeare"),
                                 "input.txt"), o.source
    else:
        url = SHAKESPEARE
        if o.source and not os.path.exists(path):
            raise Problem(
                f"{path} does not exist\n  hint: --source FILE is tinyshakespeare's input.txt")
    if os.path.exists(path):
        if sha256_file(path) == SHAKESPEARE_SHA256:
            return path
        raise Problem(
            f"{path} is not tinyshakespeare (wrong SHA-256)\n  hint: remove it to download it "
            f"again; "
                      "for other texts use data/prepare.py")
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read(1 << 24)
    except (OSError, ValueError) as e:
        raise Problem(f"cannot download {url}: {reason(getattr(e, 'reason', e))}\n"
                      "  hint: --source FILE uses a local input.txt")
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise Problem(f"{url} returned something other than tinyshakespeare (wrong SHA-256)")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    prepare.write_whole(path, data)
    return path


# ---- Options ----

def parser():
    p = prepare.Parser(prog="fetch.py", description=__doc__,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = p.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name in ("tinyshakespeare", "tinystories", "fineweb"):
        s = sets.add_parser(name, help=f"{name} --help lists its options")
        s.add_argument("--out", metavar="DIR",
                       help=f"output directory (default data/{name}_TOKENIZER)")
        s.add_argument("--source", metavar="PATH",
                       help="instead of the network, take the files from this folder "
                       "(tinyshakespeare: file or URL)")
        s.add_argument("--downloads", metavar="DIR",
                       help="where downloaded files are kept (default below data/)")
        if name == "fineweb":
            s.add_argument("--edu", action="store_true", help="FineWeb-Edu instead of FineWeb")
            s.add_argument("--sample", choices=("10BT", "100BT", "350BT"), default="10BT",
                           help="(default 10BT)")
        else:
            s.set_defaults(edu=False, sample=None)
        if name != "tinyshakespeare":
            s.add_argument("--files", type=prepare.whole(0, 10 ** 6), default=0, metavar="N",
                           help="only the first N training files; 0: all")
        if name != "tinystories":
            part = 0.1 if name == "tinyshakespeare" else 0.01
            s.add_argument("--val", type=prepare.fraction, default=part, metavar="F",
                           help="fraction for validation (default %(default)s)")
        prepare.add_run_options(s)
    s = sets.add_parser("hellaswag", help="hellaswag --help lists its options")
    s.add_argument("--out", metavar="FILE",
                   help="the output file (default data/hellaswag_TOKENIZER/validation.bin)")
    s.add_argument("--source", metavar="PATH",
                   help="instead of the network, take hellaswag_val.jsonl, or the files "
                   "from this folder")
    s.add_argument("--downloads", metavar="DIR",
                   help="where downloaded files are kept (default below data/)")
    s.set_defaults(edu=False, sample=None, files=0)
    choices.add_choices_options(s)
    return p


def hellaswag(o):
    """Questions instead of text: a file for build/evaluate."""
    o.out = o.out or os.path.join(HERE, f"hellaswag_{short_name(o.tokenizer)}", "validation.bin")
    choices.check(o)
    o.inputs = hub_inputs(o)[1]
    choices.convert(o)


def short_name(tokenizer):
    return re.sub(r"\W+", "-", os.path.basename(os.path.normpath(tokenizer)))


def act(arguments):
    o = parser().parse_args(arguments)
    if o.dataset == "hellaswag":
        hellaswag(o)
        return
    if o.tokenizer != "bpe":
        load(o.tokenizer, o.end_of_text)    # bad options fail before a download
    inputs, val_inputs = ([shakespeare(o)], []) if o.dataset == "tinyshakespeare" else hub_inputs(o)
    out = o.out or os.path.join(HERE,
                                f"{o.dataset}{'_edu' if o.edu else ''}_{short_name(o.tokenizer)}")
    chosen = prepare.check(prepare.parser().parse_args(["--out", out, *inputs]))
    for name, value in vars(o).items():
        if hasattr(chosen, name) and name != "out":
            setattr(chosen, name, value)
    chosen.val_inputs = val_inputs
    prepare.prepare(chosen)


if __name__ == "__main__":
    prepare.main(sys.argv[1:], act)
