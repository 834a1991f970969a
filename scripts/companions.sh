#!/bin/sh
# What does each regularizer beside drop path do? Trains a teacher, then a small model alone, with
# each companion, and with each companion and drop path, at equal FLOPs, every arm with its own
# learning rate (build/study): a table of validation loss, of its gap to the training text's, of
# the entropy of attention, and of seconds a step.
#
#   model   0.09 M parameters: 6 layers, 2 heads, 32 channels, rows of 64 bytes
#   teacher 0.22 M parameters: 4 layers, 4 heads, 64 channels, three times the steps
#   data    100 kB of text, 16 rows x 64 bytes x 300 steps: 3 epochs, so that there is something to
#           regularize; what reads a row twice, or has a teacher, takes as many fewer steps
#   arms    18: none, dropout, smoothing, hard, blur, rdrop, hardtwins, distill, align, each without
#           and with drop path (whole rows, rates rising linearly to 0.2 in the last layer)
#   cost    each arm 3 learning rates x 1 seed + 3 seeds, 108 runs of 1.4e11 FLOPs: about 10 minutes
#           of one core with AVX-512; the queue can be stopped and continued
#   result  dev/tools/README.md has a table
#
#     sh scripts/companions.sh                                        as above
#     TEXT=book.txt STEPS=2000 SEEDS=5 sh scripts/companions.sh       a text of yours, longer
#
# Variables: SEEDS=3 (how many), STEPS=300, LAYERS=6, CHANNELS=32, RATE=0.2 (of drop path),
# BYTES=120000 (of the text, an eighth of them for validation), LRS="2.5e-3 5e-3 1e-2", JOBS=2 (runs
# at a time), ARMS (some of those above, with none), OUT=runs/companions, BUILD=build,
# PYTHON=python3, TEXT=/path of your own text, or DATA, a folder with train_*.bin and val_*.bin. The
# same command again continues where it stopped.
set -eu
BUILD=${BUILD:-build}
OUT=${OUT:-runs/companions}
PYTHON=${PYTHON:-python3}
SEEDS=${SEEDS:-3}
STEPS=${STEPS:-300}
LAYERS=${LAYERS:-6}
CHANNELS=${CHANNELS:-32}
RATE=${RATE:-0.2}
BYTES=${BYTES:-120000}
LRS=${LRS:-2.5e-3 5e-3 1e-2}
JOBS=${JOBS:-2}
ARMS=${ARMS:-none dropout smoothing hard blur rdrop hardtwins distill align}

mkdir -p "$OUT"
if [ -z "${DATA:-}" ]; then
    DATA=$OUT/data
    if [ ! -f "$DATA/tokenizer.bin" ]; then
        text=$(TEXT="${TEXT:-}" sh data/get_text.sh)
        if [ "$text" = /usr/include ]; then ext="--ext .h"; fi
        # shellcheck disable=SC2086  # ext is two words or none
        "$BUILD/data_bytes" --out "$DATA" --max-bytes "$BYTES" ${ext:-} "$text"
    fi
fi

# The teacher: once, on the same text.
if [ ! -e "$OUT/teacher/latest" ]; then
    "$BUILD/train_gpt" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" --out "$OUT/teacher" \
        --layers 4 --heads 4 --channels 64 --seq-len 64 --batch 16 --steps $((3 * STEPS)) \
        --lr 3e-3 --eval-every 0 --log-every "$STEPS" --threads "$JOBS"
fi

# An arm's options. AttentionDrop and align exclude each other, since a map of edited scores is not
# the student's.
options() {
    case $1 in
        none) ;;
        dropout) echo "dropout = 0.1" ;;
        smoothing) echo "label-smoothing = 0.1" ;;
        hard) echo "attentiondrop = hard" ;;
        blur) echo "attentiondrop = blur" ;;
        rdrop) printf 'dropout = 0.1\nconsistency = 0.5\n' ;;
        hardtwins) printf 'attentiondrop = hard\nconsistency = 0.5\n' ;;
        distill) printf 'teacher = "%s"\ndistill = 0.5\n' "$OUT/teacher" ;;
        align) printf 'teacher = "%s"\nalign = attention\nalign-gamma = 1\n' "$OUT/teacher" ;;
    esac
}

plan=$OUT/plan.txt
{
    cat <<END
# written by scripts/companions.sh
[study]
out = $OUT/study
equal = flops
seeds = $SEEDS
tune-seeds = 1
extend = 1
jobs = $JOBS
keep-runs = 1

[all]
train = "$DATA/train_*.bin"
val = "$DATA/val_*.bin"
layers = $LAYERS
heads = 2
channels = $CHANNELS
seq-len = 64
batch = 16
steps = $STEPS
warmup = 5%
beta2 = 0.99
threads = 1
eval-every = 0
eval-tokens = 0
record-entropy = 1

[grid]
lr = $LRS
END
    for drop in "" _drop; do
        for arm in $ARMS; do
            printf '\n[arm %s%s]\n' "$arm" "$drop"
            options "$arm"
            if [ "$drop" ]; then printf 'drop-path = %s\ndrop-unit = row\n' "$RATE"; fi
        done
    done
} > "$plan.new"
if ! cmp -s "$plan.new" "$plan"; then mv "$plan.new" "$plan"; else rm "$plan.new"; fi

"$BUILD/study" "$plan"
"$PYTHON" scripts/companions.py "$BUILD" "$OUT" "$DATA" $ARMS
