#!/bin/sh
# The three calls of scripts/gpu_check.sh on the emulator, and one that is killed midway, which must
# leave its results so far. make gpu-check-dry builds the programs in BUILD.
set -eu
out=$BUILD/gpu_check_dry
rm -rf "$out"
for part in 1 2 3; do PART=$part ENGINE=emu TOTAL=200 OUT="$out" sh scripts/gpu_check.sh; done
for what in machine tests step_gpt2 plain_gpt2 kernels_gpt2 drop graphs_1; do
    grep -q "\"$what\": [[{]" "$out/gpu_check.json" || { echo "error: no $what in $out/gpu_check.json" >&2; exit 1; }
done
rm -rf "$out"
PART=2 ENGINE=emu OUT="$out" sh scripts/gpu_check.sh >/dev/null 2>&1 &
call=$!
tries=0
until grep -q '"step_gpt2": [[{]' "$out/gpu_check.json" 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { echo "error: no step in $out/gpu_check.json after 300 s" >&2; kill $call; exit 1; }
    sleep 1
done
kill -9 $call
tail -n 1 "$out/gpu_check.json" | grep -q '}$' || { echo "error: $out/gpu_check.json is cut off" >&2; exit 1; }
echo "ok   gpu_check_dry"
