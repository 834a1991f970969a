#!/bin/sh
# make fuzz: the parsers that are named, or all, FUZZ_RUNS inputs each or FUZZ_SECONDS (0: no limit), whichever ends first. What
# libFuzzer keeps for its own use stays in BUILD/fuzz/found; what it finds is a file BUILD/fuzz/NAME-crash-..., to be mended and
# then put into dev/fuzz/corpus/NAME.
set -u
build=${BUILD:-build}
[ $# -gt 0 ] || set -- $("$build/fuzz_replay" --list)
for name; do
    found=$build/fuzz/found/$name log=$build/fuzz/$name.log
    mkdir -p "$found"
    ln -sf parsers "$build/fuzz/$name"
    "$build/fuzz/$name" "$found" "dev/fuzz/corpus/$name" -runs="${FUZZ_RUNS:-10000000}" -max_total_time="${FUZZ_SECONDS:-0}" \
        -max_len=4096 -timeout=20 -rss_limit_mb=2048 -use_value_profile=1 -print_final_stats=1 -dict=dev/fuzz/words.dict \
        -artifact_prefix="$build/fuzz/$name-" >"$log" 2>&1 || {
        tail -n 40 "$log"
        echo "fuzz: $name has found something; the input is named above, and $log has all that was said"
        exit 1
    }
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    seconds=$(sed -n 's/^Done [0-9]* runs in \([0-9]*\) second.*/\1/p' "$log")
    covered=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    printf '%-12s %10s executions in %5s s, %s edges, nothing found\n' "$name" "$runs" "$seconds" "$covered"
done
