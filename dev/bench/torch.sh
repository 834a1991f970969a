#!/bin/sh
# Our training step and PyTorch's, alternating, so that a noisy machine slows both alike.
#
#     dev/bench/torch.sh                                        gpt2 and small, the shapes below
#     dev/bench/torch.sh --preset small --batch 8 --seq-len 128 one shape; torch_step.py's options
#
#   cost     the first time, PyTorch is installed into build/torch-venv (from PyPI: several GB with
#            its dependencies); then about half an hour on 2 cores and 10 GB of memory, part of it
#            for torch.compile, which needs a C++ compiler
#   result   a table per shape: time per step, tokens per second, PyTorch's time over ours in the
#            same dtype, and PyTorch's best over ours in fp32, in bf16 and overall; also in
#            build/torch.json
#
# Variables: VENV=/path of a virtual environment with torch, BUILD=build, PYTHON=python3.
set -eu
cd "$(dirname "$0")/../.."
BUILD=${BUILD:-build}
VENV=${VENV:-$BUILD/torch-venv}

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet torch numpy
fi
make --no-print-directory "$BUILD/bench"

step() {
    "$VENV/bin/python" dev/bench/torch_step.py --bench "$BUILD/bench" \
        --json "$BUILD/torch.json" "$@"
}
if [ $# -gt 0 ]; then
    step "$@"
else
    step --preset gpt2 --batch 4 --seq-len 256
    step --preset gpt2 --batch 4 --seq-len 64
    step --preset small --batch 4 --seq-len 256
fi
