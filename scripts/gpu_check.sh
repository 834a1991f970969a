#!/bin/sh
# Checks the GPU engine on this machine's GPU: correctness, and speed relative to the hardware and
# to PyTorch. Three calls, for machines that are available for ten minutes at a time; each is useful
# alone.
#
#     PART=1 scripts/gpu_check.sh      correctness: what the machine has; every test in its own
#                                      process
#     PART=2 scripts/gpu_check.sh      speed: steps with more and fewer fused epilogues, kernels,
#                                      PyTorch
#     PART=3 scripts/gpu_check.sh      whole runs, sanitizers, drop path, larger models
#     scripts/gpu_check.sh             all three, one after the other
#     make gpu-check-dry               the same on the emulator, tiny and slow, without a GPU
#
# Existing programs are not rebuilt. To carry them to a machine whose minutes are precious:
#
#     make gpu-programs                                 here: for compute capability 9.0, in
#                                                       build/gpu
#     BUILD=build/gpu PART=1 scripts/gpu_check.sh       there
#
#   needs    an NVIDIA GPU of compute capability 8.0 or newer, its driver and cuBLASLt; to build,
#            also the CUDA Toolkit 12 or 13, a C compiler and make; about 75 GB of GPU memory for
#            gpt2-xl (what does not fit is reported, and the rest continues). For the comparison,
#            python3 and PyTorch for CUDA. Nothing is downloaded.
#   cost     at most TOTAL seconds per call. Each stage has its own limit, at which it is stopped;
#            the most valuable stages come first
#   result   one line per stage, a short table with targets for an H100, each kernel with its bound;
#            $OUT/gpu_check.json with all measurements, rewritten after every stage, so that an
#            interrupted call leaves its results; logs and JSON of the stages in $OUT. Exit code 0
#                if
#            build, tests, training and sanitizers pass
#
# Variables: PART=1,2,3, OUT=build/gpu_check, BUILD=build, PYTHON=python3,
# CUDA_HOME=/usr/local/cuda, TOTAL=540 (seconds per call), JOBS (for make, and concurrent tests),
# ENGINE=emu (the emulator).
set -u
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
OUT=${OUT:-$BUILD/gpu_check}
PYTHON=${PYTHON:-python3}
PART=${PART:-1,2,3}
ENGINE=${ENGINE:-cuda}
TOTAL=${TOTAL:-$([ "$ENGINE" = cuda ] && echo 540 || echo 3600)}
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 4)}
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" BUILD
PATH=$PATH:$CUDA_HOME/bin
begun=$(date +%s)
failed=0

fail() {                                                 # message, hint
    echo "error: $1" >&2
    echo "  hint: $2" >&2
    exit 1
}

case ,$PART, in *[!1-3,]* | *[1-3][1-3]* | *,,*)
    fail "PART=$PART" "some of 1, 2 and 3, separated by commas" ;;
esac
part() { case ,$PART, in *,$1,*) ;; *) return 1 ;; esac; }

if [ "$ENGINE" = cuda ]; then
    names="train_gpt_cuda test_gpt_cuda bench_cuda kernels_cuda data_bytes gpu_summary"
    tests=$BUILD/test_gpt_cuda bench=$BUILD/bench_cuda kernels=$BUILD/kernels_cuda
    build_args="CUDA=1 GPU_ARCH=native" steps=100
    # 80: not a multiple of an attention tile
    rounds="" few="" shape="--preset small --batch 2 --seq-len 80"
else
    names="data_bytes test_gpt bench_emu kernels_emu train_gpt_emu gpu_summary"
    tests=$BUILD/test_gpt bench=$BUILD/bench_emu kernels=$BUILD/kernels_emu
    build_args="" steps=2 slower=10                      # than a GPU
    rounds="--rounds 1" few="--size 64" shape="--preset tiny --batch 2 --seq-len 16"
fi
# ---- Tests, each in its own process ----

# Runs each given test in its own process, JOBS at a time, and records them in tests.jsonl. A test
# that fails is repeated with cuBLASLt doing only matmuls, without fused epilogues: the result helps
# to locate the bug.
each_test() {
    : >"$OUT/tests.jsonl"
    # shellcheck disable=SC2016  # they are the inner shell's
    printf '%s\n' "$@" | xargs -P "$JOBS" -n 1 sh -c '
        tests=$1 out=$2 limit=$3 name=$4
        from=$(date +%s) plain=
        timeout -k 5 "$limit" "$tests" "$name" >"$out/test_$name.log" 2>&1 </dev/null
        status=$?
        if [ $status -ne 0 ]; then
            DROPPATH_GEMM_EPILOGUE=0 timeout -k 5 "$limit" "$tests" "$name" \
                >"$out/test_${name}_plain.log" 2>&1 </dev/null
            plain=", \"plain\": $?"
        fi
        printf "{\"test\": \"%s\", \"status\": %d%s, \"seconds\": %d}\n" "$name" $status "$plain" \
            $(($(date +%s) - from)) >>"$out/tests.jsonl"
        ' each "$tests" "$OUT" $((60 * ${slower:-1}))
    awk '/"status": 0[,}]/ { passed++; next } { failed++; print }
         END { printf "%d passed, %d failed\n", passed, failed; exit failed > 0 }' \
        "$OUT/tests.jsonl"
}

# Called by a stage: `timeout` runs programs, and this script is one.
if [ "${1:-}" = each_test ]; then
    shift
    each_test "$@"
    exit
fi

# ---- Results ----

mkdir -p "$OUT" || fail "cannot make $OUT" "set OUT to a folder that can be written"
if part 1; then rm -f "$OUT"/*.log "$OUT"/*.json "$OUT"/*.jsonl; fi
touch "$OUT/stages.jsonl" || fail "cannot write in $OUT" "set OUT to a folder that can be written"

# Prints the table so far and writes $OUT/gpu_check.json, which is complete however a call ends.
report() {
    [ -x "$BUILD/gpu_summary" ] || return 0
    "$BUILD/gpu_summary" "$OUT" "$OUT/gpu_check.new" &&
        mv "$OUT/gpu_check.new" "$OUT/gpu_check.json"
}

# ---- Stages ----

record() {                                               # stage, status, seconds, note
    note=$(printf '%s' "$4" | LC_ALL=C tr -cd '[:alnum:] .,:%()/_=+-' | cut -c 1-90)
    # from an earlier call
    grep -v "^{\"stage\": \"$1\"," "$OUT/stages.jsonl" >"$OUT/stages.new"
    mv "$OUT/stages.new" "$OUT/stages.jsonl"
    printf '{"stage": "%s", "status": "%s", "seconds": %d, "note": "%s"}\n' \
        "$1" "$2" "$3" "$note" >>"$OUT/stages.jsonl"
    printf '   %s, %d s%s\n' "$2" "$3" "${note:+: $note}"
    report >/dev/null 2>&1
}

skip() {                                                 # stage, why
    echo "== $1"
    record "$1" skipped 0 "$2"
}

# Runs a command for at most its limit, and not beyond TOTAL. Its output goes to a log, whose last
# lines are shown if it fails. Returns 0, 1 if it failed, 2 if it was skipped.
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
    note=$(grep -E '^[0-9]+ passed, [0-9]+ failed$|ERROR SUMMARY|RACECHECK SUMMARY|^error:' \
        "$OUT/$name.log" | tail -n 1)
    case $status in
        0) record "$name" ok $seconds "$note"; return 0 ;;
        124 | 137) record "$name" "out of time" $seconds "limit $limit s" ;;
        *) record "$name" "failed ($status)" $seconds "$note" ;;
    esac
    tail -n 15 "$OUT/$name.log" | sed 's/^/   | /'
    return 1
}

must() {                                                 # its failure fails the check, unless it
                                                         # was skipped
    stage "$@"
    [ $? -ne 1 ] || failed=1
}

# the tables of a benchmark
show() { sed -n '/^$/,/^also in/p' "$OUT/$1.log" | grep -v '^also in'; }

# ---- The machine ----

has() { command -v "$1" 2>/dev/null || echo none; }

# Where a header or library is, or none.
place() { PYTHON=$PYTHON sh dev/find_cuda.sh "$@" || echo none; }

torch_version() {
    "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.is_available())' 2>/dev/null ||
        echo none
}

machine() {
    if [ "$ENGINE" = cuda ]; then
        echo "GPU:         $(nvidia-smi --query-gpu=name,memory.total,driver_version \
            --format=csv,noheader 2>&1 | head -n 4)"
        echo "toolkit:     $(nvcc --version 2>/dev/null | sed -n 's/.*release/CUDA/p')"
    fi
    echo "cublasLt.h:  $(place cublasLt.h)"
    echo "libcublasLt: $(place libcublasLt.so cublasLt.h)"
    echo "nccl.h:      $(place nccl.h)"
    echo "libnccl:     $(place libnccl.so nccl.h)"
    echo "Python:      $("$PYTHON" --version 2>&1); PyTorch $(torch_version)"
    for tool in compute-sanitizer ncu nsys; do echo "$tool: $(has $tool)"; done
    compiler=$(${CC:-cc} --version 2>/dev/null | head -n 1)
    echo "host:        $(getconf _NPROCESSORS_ONLN) cores, $(uname -sr), $compiler"
}

machine >"$OUT/machine.log" 2>&1
cat "$OUT/machine.log"
awk 'BEGIN { printf "{" }
     { i = index($0, ":"); value = substr($0, i + 1); gsub(/^ +|["\\\t]/, "", value)
       printf("%s\"%s\": \"%s\"", (NR > 1 ? ", " : ""), substr($0, 1, i - 1), value) }
     END { print "}" }' "$OUT/machine.log" >"$OUT/machine.json"
if [ "$ENGINE" = cuda ]; then
    nvidia-smi -L 2>/dev/null | grep -q GPU ||
        fail "no NVIDIA GPU: nvidia-smi lists none" \
            "make gpu-check-dry runs all of this on an emulator, without a GPU"
    [ "$(place libcublasLt.so)" != none ] ||
        fail "libcublasLt.so is not found" \
            "CUDA_HOME=DIR names the CUDA Toolkit; PYTHON=FILE the Python with PyTorch's packages"
    libraries=$(dirname "$(place libcublasLt.so cublasLt.h)")
    libraries=$libraries:$(dirname "$(place libnccl.so nccl.h)")
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries"
fi

# Builds only what is missing: a carried program, not built by this machine's compiler, is kept.
missing=
for name in $names; do [ -x "$BUILD/$name" ] || missing="$missing $BUILD/$name"; done
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # lists of words, on purpose
    must build 200 make -j "$JOBS" $build_args B="$BUILD" $missing
    if [ "$failed" -ne 0 ]; then
        echo "error: the build failed: $OUT/build.log" >&2
        exit 1
    fi
fi

# ---- Call 1: correctness ----

if part 1; then
    stage products 40 env CUBLASLT_LOG_LEVEL=2 "$tests" cuda_matmuls
    list=$("$tests" --list)
    wanted="$(echo "$list" | grep ^cuda_) $(echo "$list" | grep -E '^(engine|parity)_')"
    [ "$ENGINE" = cuda ] || wanted="cuda_gelu cuda_norm cuda_softmax_loss parity_refuses"
    # shellcheck disable=SC2086
    must tests 240 sh scripts/gpu_check.sh each_test $wanted
fi

# ---- Call 2: the speed of a step, and where the time goes ----

has_torch=0
sees_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [ "$ENGINE" = cuda ] && "$PYTHON" -c "$sees_gpu" 2>/dev/null; then
    has_torch=1
fi
model() { if [ "$ENGINE" = cuda ]; then echo "--preset $1"; else echo "$shape"; fi; }

step() {                                                 # preset, limit, name if not the preset's,
                                                         # variable=value
    name=step_${3:-$1}
    # shellcheck disable=SC2046,SC2086
    stage "$name" "$2" env ${4:-A=} "$bench" --only step $(model "$1") $rounds \
        --json "$OUT/$name.json" && show "$name"
}

torch() {                                                # preset, limit, more options
    if [ $has_torch = 0 ]; then
        skip "torch_$1" "no PyTorch that sees a GPU (PYTHON=$PYTHON)"
        return
    fi
    preset=$1 limit=$2
    shift 2
    rm -f "$OUT/torch_$preset.json"                      # it is appended to, and may have lines of
                                                         # an earlier call
    stage "torch_$preset" "$limit" "$PYTHON" dev/bench/torch_step.py --device cuda \
        --preset "$preset" --seq-len 1024 \
        --bench "$bench" --json "$OUT/torch_$preset.json" "$@" && cat "$OUT/torch_$preset.log"
}

kernel_times() {                                         # preset, limit
    # shellcheck disable=SC2046,SC2086
    stage "kernels_$1" "$2" "$kernels" $(model "$1") ${rounds:---rounds 5} $few \
        --json "$OUT/kernels_$1.json" &&
        show "kernels_$1"
}

# Every kernel of one step by name, including cuBLASLt's: the names tell which use wgmma.
names_of_kernels() {                                     # preset, limit
    if [ "$ENGINE" != cuda ] || [ "$(has ncu)" = none ]; then skip "ncu_$1" "no ncu"; return; fi
    # shellcheck disable=SC2016
    stage "ncu_$1" "$2" env DROPPATH_GEMM_SEARCH=0 sh -c '
        echo 1 | ncu --clock-control none --metrics gpu__time_duration.sum --csv \
            --launch-count 1500 \
            "$1" --only turns --preset "$2"' ncu "$bench" "$1"
}

if part 2; then
    step gpt2 40
    step gpt2 40 gpt2_plain DROPPATH_GEMM_EPILOGUE=0
    step gpt2 40 gpt2_fused DROPPATH_GEMM_EPILOGUE=1
    step gpt2-xl 60
    step gpt2-xl 60 gpt2-xl_fused DROPPATH_GEMM_EPILOGUE=1
    kernel_times gpt2 40
    kernel_times gpt2-xl 60
    torch gpt2 120 --batch 32 --rounds 3
    if [ $has_torch = 1 ] && [ -s "$OUT/kernels_gpt2.json" ]; then
        stage sdpa 45 "$PYTHON" dev/bench/sdpa.py --kernels "$OUT/kernels_gpt2.json" \
            --json "$OUT/sdpa.json" &&
            cat "$OUT/sdpa.log"
    else
        skip sdpa "no PyTorch that sees a GPU (PYTHON=$PYTHON), or no kernels"
    fi
    names_of_kernels gpt2 60
fi

# ---- Call 3: whole runs, sanitizers, drop path, larger models ----

# Whole programs, on the bytes of this folder's sources: the loss must fall. fp32, then bf16 with
# drop path by row.
trainer=$BUILD/train_gpt_cuda
[ "$ENGINE" = cuda ] || trainer=$BUILD/train_gpt_emu
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
        "$trainer" --train "$out/bytes/train_*.bin" --val "$out/bytes/val_*.bin" \
            --out "$out/run" --preset tiny \
            --batch 4 --steps "$steps" --lr 1e-3 --warmup 1 --eval-every 0 --save-every 0 "$@"
        ' train "$OUT" "$trainer" $steps --dtype "$dtype" "$@"
}
tiny=; [ "$ENGINE" = cuda ] || tiny="--batch 1 --seq-len 16 --eval-tokens 64 --selfcheck 0"

# Three steps of a model whose heads use the tensor cores. cuBLASLt's own kernels are excluded from
# racecheck: their hazards are not ours.
sanitize() {                                             # tool, dtype, limit, more of the tool's
                                                         # options
    # shellcheck disable=SC2016
    must "$1_$2" "$3" env DROPPATH_GEMM_SEARCH=0 sh -c '
        tool=$1 bench=$2 dtype=$3 more=$4
        shift 4
        echo 1 | compute-sanitizer --tool "$tool" $more --error-exitcode 9 "$bench" \
            --only turns --dtype "$dtype" "$@"
        ' sanitize "$1" "$bench" "$2" "${4:-}" --preset small --batch 2 --seq-len 80
}

if part 3; then
    # shellcheck disable=SC2086
    train fp32 fp32 $tiny
    # shellcheck disable=SC2086
    train bf16 bf16 --drop-path 0.2 --drop-unit row --drop-ramp-up 10 $tiny
    # With stochastic rounding; then the same with graphs, which must give the same bits.
    # shellcheck disable=SC2086
    train stochastic bf16 --rounding stochastic --drop-path 0.2 --drop-ramp-up 10 $tiny
    rm -rf "$OUT/without_graphs" && mv "$OUT/run" "$OUT/without_graphs"
    # shellcheck disable=SC2086
    train graphs bf16 --rounding stochastic --drop-path 0.2 --drop-ramp-up 10 --graphs 1 $tiny
    must graphs_same_bits 10 cmp "$OUT/run/latest/model.safetensors" \
        "$OUT/without_graphs/latest/model.safetensors"
    if [ "$ENGINE" = cuda ] && [ "$(has compute-sanitizer)" != none ]; then
        sanitize memcheck bf16 45
        sanitize initcheck bf16 45
        sanitize racecheck bf16 60 "--kernel-regex kns=attention"
        sanitize memcheck fp32 30
    else
        skip sanitizers "no compute-sanitizer in PATH or $CUDA_HOME/bin"
    fi
    # shellcheck disable=SC2046,SC2086
    stage drop 80 "$bench" --only drop $(model gpt2) $rounds --json "$OUT/drop.json" && show drop
    # A small model, whose launches take long compared with their work: individually, and each
    # branch as a graph.
    for graphs in 0 1; do
        # shellcheck disable=SC2046,SC2086
        stage "graphs_$graphs" 30 "$bench" --only step $(model tiny) $rounds --graphs $graphs \
            --json "$OUT/graphs_$graphs.json" && show "graphs_$graphs"
    done
    step gpt2-medium 40
    step gpt2-large 50
    torch gpt2-medium 100 --batch 32 --rounds 2 --apart
fi

# ---- The table ----

echo
echo "== in short"
report || failed=1
echo "also in $OUT/gpu_check.json; logs in $OUT; $(($(date +%s) - begun)) s"
exit $failed
