#!/bin/sh
# Proves that a change of the code changes no arithmetic: sh dev/test/same_bits.sh REVISION
# Builds that revision beside the present tree and trains both for twelve steps: row and batch unit,
# separate and tied branches, fp32 and bf16, on the CPU and on the emulated GPU. Weights, moments
# and metrics (except times and memory) must be the same bytes. ENGINES=train_gpt omits the GPU.
set -eu
[ $# -eq 1 ] || { sed -n '2,5s/^# //p' "$0"; exit 1; }
cd "$(dirname "$0")/../.."
here=$PWD/build
engines=${ENGINES:-train_gpt train_gpt_emu}
base=$(mktemp -d)
trap 'git worktree remove --force "$base/tree" 2>/dev/null || :; rm -rf "$base"' EXIT
trap 'exit 130' INT TERM
git worktree add -q --detach "$base/tree" "$1"
for tree in . "$base/tree"; do
    # shellcheck disable=SC2086 # a list of programs
    make -s -C "$tree" B=build $(for e in data_bytes $engines; do echo "build/$e"; done)
done
awk 'BEGIN { for (i = 0; i < 9000; i++) print i, i * i, i % 7 }' >"$base/text.txt"
"$here/data_bytes" --out "$base/data" "$base/text.txt" >/dev/null

run() {                                                  # tree's build folder, engine, dtype, unit,
                                                         # branches: prints sums
    out=$base/run
    rm -rf "$out"
    OMP_WAIT_POLICY=passive "$1/$2" --train "$base/data/train_*.bin" --val "$base/data/val_*.bin" \
        --out "$out" --layers 3 --heads 3 --channels 60 --vocab-size 257 --seq-len 40 --batch 4 \
        --total-batch 320 --steps 12 \
        --eval-every 6 --eval-tokens 800 --save-every 12 --dtype "$3" --weight-decay 0.1 \
        --drop-path 0.4 --drop-ramp-up 4 --drop-unit "$4" --drop-branches "$5" \
        >"$base/log" 2>&1 || {
        cat "$base/log" >&2
        exit 1
    }
    cd "$out/step_00000012"
    sha256sum model.safetensors optimizer.safetensors
    cd - >/dev/null
    sed -E 's/"(ms|tok_per_s|mfu|peak_bytes)": [^,}]*//g' "$out/metrics.jsonl" | sha256sum
}

different=0
for engine in $engines; do
    for dtype in fp32 bf16; do
        for unit in batch row; do
            for branches in separate tied; do
                run "$here" "$engine" $dtype $unit $branches >"$base/now"
                run "$base/tree/build" "$engine" $dtype $unit $branches >"$base/then"
                if cmp -s "$base/now" "$base/then"; then word=same
                else word=DIFFERENT different=1; fi
                echo "$engine $dtype $unit $branches: $word"
            done
        done
    done
done
exit $different
