#!/bin/sh
# How much drop path? Trains with several rates and seeds, and compares the final results in a table
# and two plots.
#
#   model   0.83 M parameters: 4 layers, 4 heads, 128 channels, rows of 64 bytes (nanoGPT's CPU
#           recipe)
#   data    12 rows x 64 bytes x 1000 steps = 0.77 M bytes per run, the same in the same order for
#           all runs of a seed
#   cost    5 rates x 3 seeds = 15 runs of 3.9e12 FLOPs or less; about 8 minutes on 2 cores with
#           AVX-512
#   result  FLOPs fall in proportion to the rate: 5.6 % less at 0.1. In the quickstart, with the
#           same model and steps, rate 0 ended at a validation loss of 2.0734 and rate 0.1 at
#           2.1026; deeper models and longer runs may reverse that
#
#     sh scripts/sweep.sh                                             as above
#     RATES="0 0.2" SEEDS="1 2 3 4" sh scripts/sweep.sh --layers 8    with any train_gpt options
#
# Variables: RATES, SEEDS, STEPS=1000, OUT=runs/sweep, BUILD=build, PYTHON=python3, TEXT=/path of
# your own text, or DATA, a folder with train_*.bin and val_*.bin. If interrupted, the same command
# continues; rates and seeds can be added later.
set -eu
BUILD=${BUILD:-build}
OUT=${OUT:-runs/sweep}
PYTHON=${PYTHON:-python3}
RATES=${RATES:-0 0.05 0.1 0.2 0.4}
SEEDS=${SEEDS:-1 2 3}
STEPS=${STEPS:-1000}

if [ -z "${DATA:-}" ]; then
    DATA=$OUT/data
    if [ ! -f "$DATA/tokenizer.bin" ]; then
        text=$(TEXT="${TEXT:-}" sh data/get_text.sh)
        if [ "$text" = /usr/include ]; then ext="--ext .h"; fi
        # shellcheck disable=SC2086  # ext is two words or none
        "$BUILD/data_bytes" --out "$DATA" --max-bytes 4000000 ${ext:-} "$text"
    fi
fi

runs=
for rate in $RATES; do                                   # rates outermost, since the first row of
                                                         # the table is the baseline
    for seed in $SEEDS; do runs="$runs p${rate}_s$seed"; done
done
for seed in $SEEDS; do                                   # seeds outermost, so that an early end
                                                         # leaves complete comparisons
    for rate in $RATES; do
        run=$OUT/p${rate}_s$seed
        if [ -e "$run/$(printf step_%08d "$STEPS")" ]; then continue; fi
        echo "== rate $rate, seed $seed"
        "$BUILD/train_gpt" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" --out "$run" \
            --resume --seed "$seed" --preset tiny --batch 12 --steps "$STEPS" --lr 1e-3 \
            --warmup 5% --beta2 0.99 --drop-path "$rate" \
            --eval-every 250 --log-every 250 --keep 1 "$@"
    done
done

cd "$OUT"
plot=$OLDPWD/scripts/plot.py
echo
# shellcheck disable=SC2086  # runs is several words
"$PYTHON" "$plot" $runs --table | tee table.md
echo
# shellcheck disable=SC2086
if "$PYTHON" "$plot" $runs --out curves && "$PYTHON" "$plot" $runs --by drop-path --out ends; then
    echo "table and pictures are in $OUT"
fi
