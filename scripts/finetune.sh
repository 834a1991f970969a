#!/bin/sh
# GPT-2 on a text of your own, with a mild drop rate to slow down memorization.
#
#     TEXT=~/notes sh scripts/finetune.sh
#
# Download the weights from the hub once, with huggingface_hub's command:
#
#     hf download openai-community/gpt2 config.json model.safetensors --local-dir models/gpt2
#
#   model   124 M parameters: 12 layers, 12 heads, 768 channels; rows of 256 of the 1024 possible
#           tokens
#   data    8 rows x 256 tokens x 200 steps = 0.41 M tokens: a text of 1.6 MB once
#   cost    755 MFLOPs per token: 3.1e14 FLOPs, 2 % less with DROP=0.05; 40 minutes at 130 GFLOP/s
#           (two cores with AVX-512). Memory: 2 GB for weights, gradients and moments, plus
#           activations
#   result  the tables of evaluate before and after: the perplexity on the last tenth of your text
#           should fall. If the curves show it rising again, the model is memorizing the text: use
#           fewer STEPS, or a higher DROP. Tested with a small model in the same layout, not with
#               the
#           published weights
#
# Variables: TEXT (required), INIT=models/gpt2, OUT=runs/finetune, BUILD=build, PYTHON=python3,
# DROP=0.05, STEPS=200, TOKENIZER=gpt2 (any of data/prepare.py's), SEQ=256, PROMPT, and MORE for any
# other train_gpt options. Python needs data/requirements.txt. If interrupted, the same command
# continues.
set -eu
BUILD=${BUILD:-build}
OUT=${OUT:-runs/finetune}
PYTHON=${PYTHON:-python3}
INIT=${INIT:-models/gpt2}
DROP=${DROP:-0.05}
STEPS=${STEPS:-200}
SEQ=${SEQ:-256}
DATA=$OUT/data

if [ -z "${TEXT:-}" ]; then
    echo "error: on which text? TEXT=/path of a file or folder sh scripts/finetune.sh" >&2
    exit 1
fi
if [ ! -f "$INIT/config.json" ]; then
    echo "error: $INIT has no config.json: GPT-2's weights are not there" >&2
    echo "  hint: hf download openai-community/gpt2 config.json model.safetensors" \
        "--local-dir $INIT" >&2
    exit 1
fi
"$PYTHON" data/prepare.py --out "$DATA" --tokenizer "${TOKENIZER:-gpt2}" "$TEXT"

echo "before:"
"$BUILD/evaluate" "$INIT" --val "$DATA/val_*.bin" --seq-len "$SEQ" \
    --tokenizer "$DATA/tokenizer.bin" --eval-tokens 65536

# A tenth of the learning rate of pretraining, and a short warm-up, since AdamW's moments start at
# zero.
# shellcheck disable=SC2086  # MORE is several words
"$BUILD/train_gpt" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" --out "$OUT/drop$DROP" \
    --init-from "$INIT" --resume --seq-len "$SEQ" --batch 8 --steps "$STEPS" --lr 3e-5 \
    --warmup 10% --weight-decay 0.01 --drop-path "$DROP" \
    --eval-every 25 --eval-tokens 65536 --save-every 100 ${MORE:-}

echo "after:"
"$BUILD/evaluate" "$OUT/drop$DROP/latest" --val "$DATA/val_*.bin" --seq-len "$SEQ" \
    --tokenizer "$DATA/tokenizer.bin" \
    --eval-tokens 65536
"$BUILD/generate" "$OUT/drop$DROP/latest" --tokenizer "$DATA/tokenizer.bin" \
    --prompt "${PROMPT:-The}" --tokens 200
echo
"$PYTHON" scripts/plot.py "$OUT"/drop* --out "$OUT/picture" ||
    echo "the run itself is complete"
