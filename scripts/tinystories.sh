#!/bin/sh
# TinyStories overnight on a CPU: a GPT that tells children's stories, with its own tokenizer.
#
#   model   7.4 M parameters: 8 layers, 8 heads, 256 channels, rows of 256 tokens, vocabulary 4096
#   data    32 rows x 256 tokens x 12000 steps = 98 M tokens, about a fifth of the stories once; 13
#           tokens per parameter
#   cost    47.2 MFLOPs per token (forward and backward), 4.6e15 FLOPs in total, 4.6 % less with
#           DROP=0.1: at 130 GFLOP/s (two cores with AVX-512) 9 to 10 hours; at 50 GFLOP/s (two
#               older
#           cores) a day
#   result  Eldan and Li 2023 (arXiv:2305.07759) get fluent stories from models of this size. Losses
#           depend on the tokenizer: compare bits per byte. This script was tested with fewer steps
#           and on other text, not yet for a whole night
#
# Variables: TEXT=/path of your own text instead of TinyStories, OUT=runs/tinystories, BUILD=build,
# PYTHON=python3, DROP=0.1, STEPS=12000, VOCAB=4096, and MORE for any other train_gpt options. If
# interrupted, the same command continues. A quick test, in minutes:
#
#     TEXT=some.txt STEPS=50 VOCAB=512 MORE="--batch 4" sh scripts/tinystories.sh
#
# Python needs data/requirements.txt. In another terminal: scripts/tensorboard.py runs/tinystories
set -eu
BUILD=${BUILD:-build}
OUT=${OUT:-runs/tinystories}
PYTHON=${PYTHON:-python3}
DROP=${DROP:-0.1}
STEPS=${STEPS:-12000}
VOCAB=${VOCAB:-4096}
DATA=$OUT/data

# Both continue where they were interrupted, and do nothing if they are complete.
if [ -n "${TEXT:-}" ]; then
    "$PYTHON" data/prepare.py --out "$DATA" --tokenizer bpe --vocab-size "$VOCAB" "$TEXT"
else
    "$PYTHON" data/fetch.py tinystories --out "$DATA" --tokenizer bpe --vocab-size "$VOCAB"
fi

# shellcheck disable=SC2086  # MORE is several words
"$BUILD/train_gpt" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" \
    --out "$OUT/drop$DROP" --resume \
    --preset small --layers 8 --heads 8 --channels 256 --seq-len 256 --vocab-size "$VOCAB" \
    --batch 32 --steps "$STEPS" --lr 1e-3 --warmup 5% --drop-path "$DROP" \
    --eval-every 500 --eval-tokens 262144 --save-every 500 --sample-every 2000 \
    --prompt "Once upon a time" ${MORE:-}

echo
"$BUILD/generate" "$OUT/drop$DROP/latest" --prompt "Once upon a time" --tokens 300
echo
"$PYTHON" scripts/plot.py "$OUT"/drop* --out "$OUT/picture" ||
    echo "the run itself is complete"
