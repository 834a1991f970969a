#!/bin/sh
# Our checkpoints in transformers, and its checkpoints in our programs: `make test-interop`.
#
#     dev/test/interop/run.sh              the tests; the last line counts them
#     dev/test/interop/run.sh --install    only installs what they need: exit code 77 if it cannot
#
#   cost     the first time, torch, transformers and safetensors are installed into
#            build/interop-venv (from PyPI, several GB with torch's dependencies; PIP_INDEX_URL or
#            PIP_EXTRA_INDEX_URL may name an index with its smaller CPU builds); then about a minute
#            on one core
#
# Variables: VENV=/path of a virtual environment that has them, BUILD=build, PYTHON=python3.
set -eu
cd "$(dirname "$0")/../../.."
BUILD=${BUILD:-build}
given=${VENV:-}
VENV=${VENV:-$BUILD/interop-venv}
packages="torch numpy transformers safetensors peft"

has() { "$VENV/bin/python" -c 'import numpy, peft, safetensors, torch, transformers' 2>/dev/null; }

if ! has; then
    if [ -n "$given" ]; then
        echo "error: VENV=$VENV lacks one of these: $packages" >&2
        echo "  hint: $VENV/bin/python -m pip install $packages;" \
            "without VENV one is made in $BUILD/interop-venv" >&2
        exit 1
    fi
    echo "interop: installing $packages into $VENV"
    # shellcheck disable=SC2086
    if ! { "${PYTHON:-python3}" -m venv "$VENV" &&
           "$VENV/bin/python" -m pip install --quiet $packages && has; }; then
        echo "interop: NOT TESTED: $packages cannot be installed (no network?)" >&2
        echo "  hint: VENV=/path of a virtual environment that has them" >&2
        exit 77
    fi
fi
[ "${1:-}" != --install ] || exit 0
export BUILD HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
exec "$VENV/bin/python" dev/test/interop/test_interop.py "$@"
