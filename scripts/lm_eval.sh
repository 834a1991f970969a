#!/bin/sh
# Evaluates a checkpoint with EleutherAI's lm-evaluation-harness, after exporting it for
# transformers.
#
#     scripts/lm_eval.sh runs/gpt/latest                                     hellaswag, zero-shot
#     scripts/lm_eval.sh runs/gpt/latest --tasks lambada_openai,piqa --limit 100
#     scripts/lm_eval.sh runs/gpt/latest --include_path my/tasks --tasks mine
#                                                            your own tasks, without downloads
#
#   cost     the first time, lm-eval, torch and transformers are installed into build/lm-eval-venv
#            (from PyPI, several GB), and the harness downloads a task's data. Zero-shot HellaSwag
#                is
#            10,042 questions x 4 endings of about 100 tokens, 4 M tokens: 1e15 FLOPs with a 124 M
#            model, a minute on a GPU, hours on a CPU (--limit asks fewer questions)
#   result   the harness' table, and its JSON in OUT/results. OpenAI's GPT-2 124M has acc_norm 0.31
#            on HellaSwag (llm.c's dev/data/hellaswag.py); guessing gives 0.25
#
# Arguments after the checkpoint are passed to lm_eval. The checkpoint needs a tokenizer:
# data/README.md. Variables: OUT=build/lm-eval, VENV=/path of a virtual environment with lm_eval,
# BUILD=build, PYTHON=python3, DEVICE=cpu or cuda, BATCH=8.
set -eu
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build}
OUT=${OUT:-$BUILD/lm-eval}
VENV=${VENV:-$BUILD/lm-eval-venv}
[ $# -ge 1 ] || { echo "usage: scripts/lm_eval.sh CHECKPOINT [options of lm_eval]" >&2; exit 1; }
checkpoint=$1
shift

if ! "$VENV/bin/python" -c 'import lm_eval, torch, transformers' 2>/dev/null; then
    echo "installing lm-eval into $VENV"
    if ! { "${PYTHON:-python3}" -m venv "$VENV" &&
            "$VENV/bin/python" -m pip install --quiet "lm-eval[hf]"; }; then
        echo "error: lm-eval cannot be installed (no network?)" >&2
        echo "  hint: VENV=/path of a virtual environment that has it" >&2
        exit 1
    fi
fi

make --no-print-directory "$BUILD/export" >&2
mkdir -p "$OUT"
model=$(mktemp -d "$OUT/model.XXXXXX")
trap 'rm -rf "$model"' EXIT
"$BUILD/export" "$checkpoint" --out "$model/hf"
[ -f "$model/hf/tokenizer.json" ] ||
    { echo "error: the harness needs a tokenizer: data/README.md" >&2; exit 1; }

case " $* " in *" --tasks "*) ;; *) set -- --tasks hellaswag "$@" ;; esac
"$VENV/bin/lm_eval" --model hf --model_args "pretrained=$model/hf" \
    --device "${DEVICE:-cpu}" --batch_size "${BATCH:-8}" \
    --output_path "$OUT/results" "$@"
