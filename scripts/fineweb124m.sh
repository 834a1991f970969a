#!/bin/sh
# GPT-2 124M on 10 billion tokens of FineWeb, on one GPU or eight, with and without drop path: does
# it pay?
#
#     sh scripts/fineweb124m.sh                   one GPU
#     GPUS=8 sh scripts/fineweb124m.sh            eight, by scripts/launch.sh; two machines:
#                                                 scripts/slurm.sh
#     SCALE=tiny sh scripts/fineweb124m.sh        a test: the same steps on the CPU in about a
#                                                 minute
#
#   model   124.4 M parameters: 12 layers, 12 heads, 768 channels, rows of 1024 tokens, GPT-2's
#           vocabulary of 50257
#   data    16 micro-batches x 32 rows x 1024 tokens = 524288 tokens a step, x 18865 steps = 9.89e9
#           tokens, once. 28 GB of downloads and 21 GB of shards
#   cost    797.9 MFLOPs per token (3 x 2 x (12 x 12 x 768^2 + 768 x 50257), plus 3 x 12 x 2 x 768 x
#           1025 for attention): 7.89e18 FLOPs; 3.7 % less at rate 0.1, whose mean over the layers
#               is
#           0.054, or 0.051 with the ramp, of the 71 % that can be dropped. At an assumed 50 % of an
#           H100's 989 TFLOP/s: 0.62 M tokens/s, 4.4 hours per run on one GPU, 34 minutes on eight.
#               At
#           50 % of an A100's 312: 14 hours, 1.8 hours. These are estimates: none of this has run on
#               a
#           GPU yet. (llm.c's own script for this run takes 300 ms per step, 94 minutes, on eight
#               A100)
#   memory  each GPU holds 2.2 GB of weights (4 + 2 bytes), gradients (4) and moments (8), 6.1 GB
#           saved for the backward pass by 32 rows (15416 bytes per token and layer), and scratch:
#           16 GB suffice; otherwise use BATCH=16
#   result  expected without drop path: a validation loss near 3.28 or 3.29, which llm.c reports for
#           this model, data and schedule (github.com/karpathy/llm.c, discussion 481) on its own
#           validation shard. Ours is different text: rely on the difference between the two runs,
#               in
#           the table at the end
#
# Variables: GPUS=1, SCALE=full, DROP="0 0.1" (the rates, one run each), EDU=1 (FineWeb-Edu
# instead), DATA=/path of existing shards (train_*.bin and val_*.bin, or llm.c's
# fineweb_train_*.bin), STEPS, BATCH, OUT=runs/fineweb124m, BUILD=build, PYTHON=python3, LAUNCH
# (instead of scripts/launch.sh, such as srun), ONLY=data (to download where there is a network),
# TEXT=/path of the text for SCALE=tiny, and MORE for any other train_gpt options. If interrupted,
# the same command continues. Python needs data/requirements.txt and scripts/requirements.txt.
set -eu
BUILD=${BUILD:-build}
PYTHON=${PYTHON:-python3}
GPUS=${GPUS:-1}
DROP=${DROP:-0 0.1}
SCALE=${SCALE:-full}

# The differences between the two scales. The schedules are alike: 16 micro-batches a step, a
# warm-up of 3.7 %, decay to 0.
case $SCALE in
    full)
        OUT=${OUT:-runs/fineweb124m}
        program=$BUILD/train_gpt_cuda STEPS=${STEPS:-18865} prompt='The first rule of'
        model="--preset gpt2 --seq-len 1024 --batch ${BATCH:-32} --total-batch 524288 --lr 6e-4"
        pace='--eval-every 250 --eval-tokens 10485760 --save-every 1000 --log-every 10' ;;
    tiny)
        OUT=${OUT:-runs/fineweb124m_tiny}
        program=$BUILD/train_gpt STEPS=${STEPS:-100} prompt='The '
        model="--preset tiny --seq-len 64 --batch ${BATCH:-4} --total-batch 4096 --lr 1e-3"
        pace='--eval-every 25 --eval-tokens 20000 --save-every 50 --log-every 25' ;;
    *)
        echo "error: SCALE=$SCALE: it is full or tiny" >&2
        exit 1 ;;
esac
if [ ! -x "$program" ]; then
    echo "error: there is no $program" >&2
    hint='make'
    [ "$SCALE" != full ] || hint='make CUDA=1; without a GPU: SCALE=tiny'
    echo "  hint: $hint" >&2
    exit 1
fi

# ---- Shards ----

if [ -z "${DATA:-}" ]; then
    DATA=$OUT/data
    if [ "$SCALE" = full ]; then                         # continues where it was interrupted
        "$PYTHON" data/fetch.py fineweb ${EDU:+--edu} --sample 10BT --out "$DATA"
    elif [ ! -f "$DATA/tokenizer.bin" ]; then
        text=$(TEXT="${TEXT:-}" sh data/get_text.sh)
        if [ "$text" = /usr/include ]; then set -- --ext .h "$text"; else set -- "$text"; fi
        "$BUILD/data_bytes" --out "$DATA" --max-bytes 4000000 "$@"
    fi
fi
names=
for name in '' fineweb_ edu_fineweb_; do
    for file in "$DATA/${name}train_"*.bin; do if [ -f "$file" ]; then names=$name found=1; fi; done
done
if [ -z "${found:-}" ]; then
    echo "error: $DATA has no train_*.bin, fineweb_train_*.bin or edu_fineweb_train_*.bin" >&2
    echo "  hint: without DATA they are downloaded" >&2
    exit 1
fi
if [ "${ONLY:-}" = data ]; then exit 0; fi

# ---- One run per rate, on the same data in the same order ----

if [ -z "${LAUNCH:-}" ] && [ "$GPUS" != 1 ]; then LAUNCH="sh scripts/launch.sh -n $GPUS"; fi
runs=
for rate in $DROP; do
    echo
    echo "== drop path $rate, $GPUS process$([ "$GPUS" = 1 ] || echo es)"
    # shellcheck disable=SC2086  # several words
    ${LAUNCH:-} "$program" --train "$DATA/${names}train_*.bin" --val "$DATA/${names}val_*.bin" \
        --out "$OUT/drop$rate" --resume $model --steps "$STEPS" --warmup 3.7% --lr-final 0 \
        --drop-path "$rate" $pace ${MORE:-}
    runs="$runs drop$rate"
    last=$OUT/drop$rate/latest
done

# ---- Comparison ----

echo
if [ -f "$DATA/tokenizer.bin" ]; then "$BUILD/generate" "$last" --prompt "$prompt" --tokens 100; fi
plot=$PWD/scripts/plot.py
cd "$OUT"
echo
# shellcheck disable=SC2086
"$PYTHON" "$plot" $runs --table | tee table.md
# shellcheck disable=SC2086
"$PYTHON" "$plot" $runs --x tokens,flops --out picture || echo "the runs are complete all the same"
