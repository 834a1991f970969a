#!/bin/sh
# make test-install: installs into a temporary folder, as a package would (DESTDIR), runs every
# installed program, and uninstalls. Variables: MAKE, B (the build folder).
set -eu
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

fail() { echo "FAIL install: $*"; exit 1; }
call() { "$MAKE" --no-print-directory -s B="$B" DESTDIR="$root" PREFIX="/opt/a b" "$1"; }

call install
bin="$root/opt/a b/bin"
n=0
for program in "$bin"/*; do
    "$program" --help >"$root/help" 2>&1 || fail "$program --help: $(tail -n 1 "$root/help")"
    [ -s "$root/help" ] || fail "$program --help prints nothing"
    n=$((n + 1))
done
for program in train_gpt droppath-compare droppath-study droppath-generate droppath-evaluate \
               droppath-export droppath-layers droppath-prune droppath-collapse \
               droppath-exits droppath-data-bytes; do
    [ -x "$bin/$program" ] || fail "$program is not there"
done
[ -s "$root/opt/a b/share/doc/droppath/LICENSE" ] || fail "LICENSE is not there"
rm "$root/help"
call uninstall
left=$(find "$root" -type f)
[ -z "$left" ] || fail "uninstall leaves $left"
echo "install: $n programs run where they were installed, and none is left"
