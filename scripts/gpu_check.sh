#!/bin/sh
# What the GPU engine does on this machine's GPU: is it right, and how fast is it beside the hardware and beside PyTorch?
#
#     scripts/gpu_check.sh                              all, in less than nine minutes
#     PART=1 scripts/gpu_check.sh                       is it right: tests, whole runs, sanitizers
#     PART=2 scripts/gpu_check.sh                       whole steps and drop path, beside PyTorch
#     PART=3 scripts/gpu_check.sh                       attention and all kernels
#
# Where minutes are counted, the parts have nine each, and nothing is left out for want of time. Each builds what is not yet
# built. 1 forgets earlier results, the others add to them, and the table has what there is.
#
#   needs    an NVIDIA GPU of compute capability 8.0 or newer, its driver, the CUDA Toolkit 12 or 13 (nvcc, cuBLASLt), a C
#            compiler and make; about 75 GB of GPU memory for gpt2-xl (what does not fit is told, and the rest goes on);
#            with python3 and PyTorch for CUDA also the comparison. Nothing is downloaded.
#   cost     at most TOTAL seconds. Each stage has its own limit and is ended there; what is worth most comes first
#   result   a line for each stage, a short table beside the aims for an H100, build/gpu_check.json with everything measured;
#            logs and JSON of the stages in $OUT. Exit code 0 if build, tests, training and sanitizers are good
#
# Variables: PART=1,2,3, OUT=build/gpu_check, BUILD=build, PYTHON=python3, CUDA_HOME=/usr/local/cuda, TOTAL=530 (seconds),
# JOBS (of make); ENGINE=emu tries this script where there is no GPU: the same stages on the emulator, on tiny models, where
# nothing is fast.
set -u
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
OUT=${OUT:-$BUILD/gpu_check}
PYTHON=${PYTHON:-python3}
PART=${PART:-1,2,3}
ENGINE=${ENGINE:-cuda}
TOTAL=${TOTAL:-$([ "$ENGINE" = cuda ] && echo 530 || echo 3600)}
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 4)}
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" BUILD
PATH=$PATH:$CUDA_HOME/bin
begun=$(date +%s)
failed=0

fail() {                                                 # what is wrong, a hint
    echo "error: $1" >&2
    echo "  hint: $2" >&2
    exit 1
}

case ,$PART, in *[!1-3,]* | *[1-3][1-3]* | *,,*) fail "PART=$PART" "some of 1, 2 and 3, with commas between them" ;; esac
part() { case ,$PART, in *,$1,*) ;; *) return 1 ;; esac; }

# ---- The machine ----

if [ "$ENGINE" = cuda ]; then
    nvidia-smi -L 2>/dev/null | grep -q GPU ||
        fail "no NVIDIA GPU: nvidia-smi lists none" "make test runs the GPU engine's kernels on an emulator, without a GPU"
    command -v nvcc >/dev/null || fail "no nvcc in PATH or $CUDA_HOME/bin" "install the CUDA Toolkit, or set CUDA_HOME"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | sed 's/^/GPU:      /'
    nvcc --version | sed -n 's/.*release/toolkit:  CUDA/p'
    programs="all $BUILD/test_gpt_cuda $BUILD/bench_cuda $BUILD/kernels_cuda $BUILD/gpu_summary"
    tests=$BUILD/test_gpt_cuda bench=$BUILD/bench_cuda kernels=$BUILD/kernels_cuda
    build_args="CUDA=1 GPU_ARCH=native" steps=100
    rounds="" few="" shape="--preset small --batch 2 --seq-len 80"     # 80: no multiple of a tile of attention
else
    programs="all $BUILD/test_gpt $BUILD/bench_emu $BUILD/kernels_emu $BUILD/gpu_summary"
    tests=$BUILD/test_gpt bench=$BUILD/bench_emu kernels=$BUILD/kernels_emu
    build_args="" steps=2 slower=10                      # than a GPU
    rounds="--rounds 1" few="--size 64" shape="--preset tiny --batch 2 --seq-len 16"
fi
mkdir -p "$OUT" || fail "cannot make $OUT" "set OUT to a folder that can be written"
if part 1; then rm -f "$OUT"/*.log "$OUT"/*.json "$OUT"/*.jsonl; fi
touch "$OUT/stages.jsonl" || fail "cannot write in $OUT" "set OUT to a folder that can be written"

# ---- Stages ----

record() {                                               # stage, status, seconds, note
    note=$(printf '%s' "$4" | LC_ALL=C tr -cd '[:alnum:] .,:%()/_=+-' | cut -c 1-90)
    grep -v "^{\"stage\": \"$1\"," "$OUT/stages.jsonl" >"$OUT/stages.new"           # of an earlier call
    mv "$OUT/stages.new" "$OUT/stages.jsonl"
    printf '{"stage": "%s", "status": "%s", "seconds": %d, "note": "%s"}\n' "$1" "$2" "$3" "$note" >>"$OUT/stages.jsonl"
    printf '   %s, %d s%s\n' "$2" "$3" "${note:+: $note}"
}

skip() {                                                 # stage, why
    echo "== $1"
    record "$1" skipped 0 "$2"
}

# Runs a command for at most its limit, and not beyond TOTAL. Its output goes to a log, whose last lines are shown if it
# fails. Returns 0, 1 when it failed, 2 when it was skipped.
stage() {                                                # stage, limit in seconds, command ...
    name=$1 limit=$(($2 * ${slower:-1}))
    shift 2
    from=$(date +%s)
    left=$((TOTAL - from + begun))
    if [ "$left" -lt 10 ]; then
        skip "$name" "no time left of $TOTAL s"
        return 2
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    printf '== %s: %s\n' "$name" "$(printf '%s' "$*" | tr -s '\n ' ' ' | cut -c 1-118)"
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 </dev/null
    status=$?
    seconds=$(($(date +%s) - from))
    note=$(grep -E '^[0-9]+ passed, [0-9]+ failed$|ERROR SUMMARY|RACECHECK SUMMARY|^error:' "$OUT/$name.log" | tail -n 1)
    case $status in
        0) record "$name" ok $seconds "$note"; return 0 ;;
        124 | 137) record "$name" "out of time" $seconds "limit $limit s" ;;
        *) record "$name" "failed ($status)" $seconds "$note" ;;
    esac
    tail -n 15 "$OUT/$name.log" | sed 's/^/   | /'
    return 1
}

must() {                                                 # its failure is the check's, unless it was skipped
    stage "$@"
    [ $? -ne 1 ] || failed=1
}

show() { sed -n '/^$/,/^also in/p' "$OUT/$1.log" | grep -v '^also in'; }     # a benchmark's tables

# ---- Is it right? ----

# shellcheck disable=SC2086  # lists of words, on purpose
must build 200 make -j "$JOBS" $build_args $programs
if [ "$failed" -ne 0 ]; then
    echo "error: it was not built: $OUT/build.log" >&2
    exit 1
fi
[ "$ENGINE" = cuda ] || test_names="cuda_gelu cuda_norm parity_refuses"
if part 1; then
    # shellcheck disable=SC2086
    must tests 100 "$tests" ${test_names:-$("$tests" --list | grep -E '^(cuda|engine|parity)_')}
fi

# Whole programs, on the bytes of this folder's sources: the loss must fall. fp32, then bf16 with drop path of rows.
train() {                                                # name, dtype, more options
    name=$1 dtype=$2
    shift 2
    # shellcheck disable=SC2016  # they are the inner shell's
    must "train_$name" 40 sh -c '
        set -e
        out=$1 trainer=$2 steps=$3
        shift 3
        [ -f "$out/bytes/train_000000.bin" ] || "$BUILD/data_bytes" --out "$out/bytes" --ext .h dev
        rm -rf "$out/run"
        "$trainer" --train "$out/bytes/train_*.bin" --val "$out/bytes/val_*.bin" --out "$out/run" --preset tiny \
            --batch 4 --steps "$steps" --lr 1e-3 --warmup 5 --eval-every 0 --save-every 0 "$@"
        ' train "$OUT" "$BUILD/train_gpt_cuda" $steps --dtype "$dtype" "$@"
}
if part 1 && [ "$ENGINE" = cuda ]; then
    train fp32 fp32
    train bf16 bf16 --drop-path 0.2 --drop-unit row --drop-ramp-up 10
    # Rounded at random; then the same with graphs, which must leave the same bits.
    train stochastic bf16 --rounding stochastic --drop-path 0.2 --drop-ramp-up 10
    rm -rf "$OUT/without_graphs" && mv "$OUT/run" "$OUT/without_graphs"
    train graphs bf16 --rounding stochastic --drop-path 0.2 --drop-ramp-up 10 --graphs 1
    must graphs_same_bits 10 cmp "$OUT/run/latest/model.safetensors" "$OUT/without_graphs/latest/model.safetensors"
fi

# ---- How fast is a step, beside PyTorch and with drop path? ----

has_torch=0
if [ "$ENGINE" = cuda ] && "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    has_torch=1
fi

step() {                                                 # preset, limit
    if [ "$ENGINE" = cuda ]; then model="--preset $1"; else model=$shape; fi
    # shellcheck disable=SC2086
    stage "step_$1" "$2" "$bench" --only step $model $rounds --json "$OUT/step_$1.json" && show "step_$1"
}

torch() {                                                # preset, limit, more options
    if [ $has_torch = 0 ]; then skip "torch_$1" "no PyTorch that sees a GPU (PYTHON=$PYTHON)"; return; fi
    preset=$1 limit=$2
    shift 2
    rm -f "$OUT/torch_$preset.json"                      # it is written line by line, after those of an earlier call
    stage "torch_$preset" "$limit" "$PYTHON" dev/bench/torch_step.py --device cuda --preset "$preset" --seq-len 1024 \
        --bench "$bench" --json "$OUT/torch_$preset.json" "$@" && cat "$OUT/torch_$preset.log"
}

if part 2; then
    step gpt2 40
    torch gpt2 150 --batch 32 --rounds 5
    if [ "$ENGINE" = cuda ]; then model="--preset gpt2"; else model=$shape; fi
    # shellcheck disable=SC2086
    stage drop 80 "$bench" --only drop $model $rounds --json "$OUT/drop.json" && show drop
fi

# A small model, whose launches take long beside what they compute: one by one, and each branch as a graph.
if part 2; then
    if [ "$ENGINE" = cuda ]; then model="--preset tiny --batch 8"; else model=$shape; fi
    for graphs in 0 1; do
        # shellcheck disable=SC2086
        stage "graphs_$graphs" 30 "$bench" --only step $model $rounds --graphs $graphs --json "$OUT/graphs_$graphs.json" &&
            show "graphs_$graphs"
    done
fi

# ---- Attention beside PyTorch's; the sanitizers; larger models; all kernels ----

if [ "$ENGINE" = cuda ]; then sizes="--rounds 5"; else sizes="$shape $rounds $few"; fi
if part 3; then
    # shellcheck disable=SC2086
    stage attention 45 "$kernels" --only attention $sizes --json "$OUT/attention.json" && show attention
    if [ $has_torch = 1 ] && [ -s "$OUT/attention.json" ]; then
        stage sdpa 60 "$PYTHON" dev/bench/sdpa.py --kernels "$OUT/attention.json" --json "$OUT/sdpa.json" &&
            cat "$OUT/sdpa.log"
    else
        skip sdpa "no PyTorch that sees a GPU (PYTHON=$PYTHON), or no attention"
    fi
fi

# Three steps each: of a model whose heads take the tensor cores, in bf16 and in fp32.
sanitize() {                                             # tool, dtype, limit
    # shellcheck disable=SC2016
    must "$1_$2" "$3" env DROPPATH_GEMM_SEARCH=0 sh -c '
        tool=$1 bench=$2 dtype=$3
        shift 3
        echo 1 | compute-sanitizer --tool "$tool" --error-exitcode 9 "$bench" --only turns --dtype "$dtype" "$@"
        ' sanitize "$1" "$bench" "$2" --preset small --batch 2 --seq-len 80
}
if part 1 && [ "$ENGINE" = cuda ] && command -v compute-sanitizer >/dev/null; then
    sanitize memcheck bf16 45
    sanitize racecheck bf16 60
    sanitize memcheck fp32 30
elif part 1; then
    skip sanitizers "no compute-sanitizer in PATH or $CUDA_HOME/bin"
fi

if part 2; then step gpt2-xl 60; fi
# shellcheck disable=SC2086
if part 3; then stage kernels 110 "$kernels" $sizes --json "$OUT/kernels.json" && show kernels; fi
if part 2; then
    step gpt2-medium 40
    step gpt2-large 50
    torch gpt2-medium 130 --batch 32 --rounds 3 --apart
fi

# ---- The table ----

echo
echo "== in short"
"$BUILD/gpu_summary" "$OUT" "$BUILD/gpu_check.json" || failed=1
echo "also in $BUILD/gpu_check.json; logs in $OUT; $(($(date +%s) - begun)) s"
exit $failed
