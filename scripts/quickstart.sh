#!/bin/sh
# The quickstart: byte-level shards of a text, the tiny GPT with and without drop path, a comparison
# and a sample.
#
#   model   0.83 M parameters: 4 layers, 4 heads, 128 channels, rows of 64 bytes (nanoGPT's CPU
#           recipe)
#   data    12 rows x 64 bytes x 1000 steps = 0.77 M bytes per run
#   cost    3 runs of about 4 TFLOPs: none, drop, and drop for as many FLOPs as none; one to three
#           minutes on 2 cores
#
# Variables: TEXT=/path of a text file or folder, OUT=runs/quickstart, BUILD=build, DTYPE=fp32 or
# bf16 (the default if the processor multiplies in bf16).
# If interrupted, the same command continues.
set -eu
BUILD=${BUILD:-build}
OUT=${OUT:-runs/quickstart}
DATA=$OUT/data
DTYPE=${DTYPE:-$(if grep -qs avx512_bf16 /proc/cpuinfo; then echo bf16; else echo fp32; fi)}

text=$(TEXT="${TEXT:-}" sh data/get_text.sh)
if [ ! -f "$DATA/source" ]; then
    set -- "$text"
    [ "$text" != /usr/include ] || set -- --ext .h --max-bytes 4000000 "$text"
    "$BUILD/data_bytes" --out "$DATA" "$@"
    echo "$text" > "$DATA/source"
elif [ "$(cat "$DATA/source")" != "$text" ]; then
    echo "error: $OUT holds a quickstart on another text, $(cat "$DATA/source")" >&2
    echo "  hint: make quickstart OUT=runs/another TEXT=$text" >&2
    exit 1
fi

"$BUILD/compare" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" --out "$OUT" --seeds 1 \
    --preset tiny --batch 12 --steps 1000 --lr 1e-3 --warmup 50 --beta2 0.99 \
    --drop-path 0.1 --dtype "$DTYPE" --eval-every 250 --log-every 100

echo
echo "A sample from the model trained with drop path:"
echo
"$BUILD/generate" "$OUT/drop_s1337/latest" --prompt "" --tokens 300
echo
echo
echo "Files: $OUT/compare.md, compare.json     the table above"
echo "       $OUT/*_s1337/metrics.jsonl        every step of each run, drawn by"
echo "                                         scripts/plot.py $OUT/*_s1337"
echo "       $OUT/*_s1337/latest/              checkpoints, which transformers opens too"
