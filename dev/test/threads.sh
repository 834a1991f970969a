#!/bin/sh
# make test-threads: detects data races with clang's ThreadSanitizer. It sees OpenMP's barriers and
# tasks through Archer, a library of LLVM's OpenMP runtime; with gcc's libgomp, every barrier would
# look like a race. Arguments: names of tests, instead of all that use threads and take less than a
# minute.
set -eu
CC=${CC:-clang}
case $("$CC" --version 2>/dev/null) in *clang*) ;; *) CC=clang ;; esac
archer=
for f in $("$CC" -print-file-name=libarcher.so) $("$CC" -print-resource-dir)/../../libarcher.so; do
    if [ -f "$f" ]; then archer=$f; break; fi
done
if [ -z "$archer" ]; then
    echo "error: $CC has no libarcher.so, so that barriers of OpenMP would look like races"
    echo "  hint: Debian and Ubuntu have it in libomp-dev; CC=clang-16 names another clang"
    exit 1
fi
# ThreadSanitizer looks at loads and stores of 1 to 16 bytes only: with wider vectors it would miss
# a missing barrier.
march=
[ "$(uname -m)" != x86_64 ] || march=MARCH=x86-64
B=build/tsan
make --no-print-directory CC="$CC" SAN=thread CFLAGS="-O1 -g" $march EMULATE=0 B=$B all $B/test_gpt
rm -f $B/report.*
# What has threads: the engine, its kernels, ranks with their watching thread, whole runs of several
# threads.
if [ $# -eq 0 ]; then
    set -- $($B/test_gpt --list | grep -e '^engine_' -e '^kernels_' -e '^comm_' -e '^ranks_' | \
             grep -v -x -e engine_many_tokens -e engine_reference_gradients -e kernels_exp \
                 -e kernels_gelu) \
           trainer_threads_and_cadence_change_no_bit trainer_bf16 evaluate_equals_the_trainer \
           generate_samples
fi
# ignore_noninstrumented_modules: libomp itself is not compiled for ThreadSanitizer. die_after_fork:
# some tests fork.
status=0
OMP_TOOL_LIBRARIES=$archer OMP_WAIT_POLICY=passive BUILD=$B \
    TSAN_OPTIONS="ignore_noninstrumented_modules=1 die_after_fork=0 log_path=$PWD/$B/report" \
    $B/test_gpt "$@" || status=$?
for f in $B/report.*; do
    [ -f "$f" ] || continue
    cat "$f"
    status=1
done
exit $status
