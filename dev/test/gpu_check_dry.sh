#!/bin/sh
# The three calls of scripts/gpu_check.sh on the emulator, and one that is killed midway, which must
# leave its results so far. make gpu-check-dry builds the programs in BUILD.
set -eu
out=$BUILD/gpu_check_dry
rm -rf "$out"
fail() { echo "error: $1" >&2; exit 1; }
for part in 1 2 3; do PART=$part ENGINE=emu TOTAL=600 OUT="$out" sh scripts/gpu_check.sh; done
for what in machine tests step_gpt2 plain_gpt2 kernels_gpt2 drop graphs_1; do
    grep -q "\"$what\": [[{]" "$out/gpu_check.json" || fail "no $what in $out/gpu_check.json"
done
rm -rf "$out"
PART=2 ENGINE=emu OUT="$out" sh scripts/gpu_check.sh >/dev/null 2>&1 &
call=$!
tries=0
until grep -q '"step_gpt2": [[{]' "$out/gpu_check.json" 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { kill $call; fail "no step in $out/gpu_check.json after 300 s"; }
    sleep 1
done
kill -9 $call
tail -n 1 "$out/gpu_check.json" | grep -q '}$' || fail "$out/gpu_check.json is cut off"
echo "ok   gpu_check_dry"
