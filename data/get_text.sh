#!/bin/sh
# get_text.sh: finds a text to train on and prints its path. Messages go to stderr.
#
#     sh data/get_text.sh                   prints the first of these that exists:
#                                           1. $TEXT, a file or directory of your own
#                                           2. data/tinyshakespeare/input.txt, 1.1 MB, if already
#                                              downloaded
#                                           3. the same, downloaded from $TEXT_URL
#                                           4. the C headers in /usr/include (pass --ext .h to
#                                              build/data_bytes)
#     TEXT=book.txt sh data/get_text.sh     only 1: fails if there is no such file
#     TEXT_URL=file:///mnt/input.txt ...    where to download tinyshakespeare from; any URL that
#                                           curl or wget accepts
#
# The download may take 10 seconds to connect and 60 in total (wget: 10 without data); its SHA-256
# must match.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
file=$here/tinyshakespeare/input.txt
origin=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
url=${TEXT_URL:-$origin}
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
bytes=1115394

say() { echo "get_text.sh: $*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

# take PATH WHY: prints the path and exits.
take() {
    say "taking $1 ($2)"
    printf '%s\n' "$1"
    exit 0
}

# digest FILE: its SHA-256, or nothing if no program can compute it.
digest() {
    if have sha256sum; then sha256sum <"$1"
    elif have shasum; then shasum -a 256 <"$1"
    elif have openssl; then openssl dgst -sha256 -r <"$1"
    fi | cut -d ' ' -f 1
}

# is_right FILE: whether it is tinyshakespeare.
is_right() {
    [ "$(wc -c <"$1")" -eq "$bytes" ] || return 1
    got=$(digest "$1")
    [ -n "$got" ] || say "no sha256sum, shasum or openssl: checked only the size of $1"
    [ "${got:-$sha256}" = "$sha256" ]
}

# download URL FILE
download() {
    if have curl; then curl -fsSL --connect-timeout 10 --max-time 60 -o "$2" "$1" >&2
    elif have wget; then wget -q -T 10 -t 1 -O "$2" "$1" >&2
    else say "neither curl nor wget is installed"; return 1
    fi
}

if [ -n "${TEXT:-}" ]; then
    [ -r "$TEXT" ] || { say "error: TEXT=$TEXT cannot be read"; exit 1; }
    take "$TEXT" "given by TEXT"
fi

if [ -f "$file" ]; then
    if is_right "$file"; then take "$file" "already downloaded"; fi
    say "$file is not the expected file: downloading it again"
fi

part=$file.part
trap 'rm -f "$part"' EXIT
if ! mkdir -p "$here/tinyshakespeare" || ! download "$url" "$part"; then
    say "cannot download $url"
elif ! is_right "$part"; then
    say "$url returned an unexpected file (wrong size or SHA-256): removed"
else
    mv "$part" "$file"
    take "$file" "downloaded from $url"
fi

[ -d /usr/include ] || { say "error: no text: give one, as in TEXT=book.txt"; exit 1; }
take /usr/include "the C headers, always available"
