#!/bin/sh
# make fuzz: the named parsers, or all, with FUZZ_RUNS inputs each or FUZZ_SECONDS (0: no limit),
# whichever ends first. libFuzzer's own corpus stays in BUILD/fuzz/found; a finding is a file
# BUILD/fuzz/NAME-crash-..., to be fixed and then added to dev/fuzz/corpus/NAME.
#
# A tenth runs with value profiles, which get past comparisons of numbers and strings but take three
# times as long; the rest continues from their corpus. A small quarantine and no stack traces for
# allocations make AddressSanitizer half as fast again.
set -u
build=${BUILD:-build} runs=${FUZZ_RUNS:-10000000} seconds=${FUZZ_SECONDS:-0}
export ASAN_OPTIONS="malloc_context_size=0:quarantine_size_mb=16${ASAN_OPTIONS:+:$ASAN_OPTIONS}"

# fuzz PARSER EXECUTIONS SECONDS VALUE_PROFILES
fuzz() {
    "$build/fuzz/$1" "$build/fuzz/found/$1" "dev/fuzz/corpus/$1" -runs="$2" \
        -max_total_time="$3" -use_value_profile="$4" -max_len=4096 -timeout=20 \
        -rss_limit_mb=2048 -print_final_stats=1 -dict=dev/fuzz/words.dict \
        -artifact_prefix="$build/fuzz/$1-"
}

[ $# -gt 0 ] || set -- $("$build/fuzz_replay" --list)
for name; do
    "$build/fuzz_replay" --list | grep -qx -- "$name" || {
        echo "error: there is no parser $name"
        echo "  hint: the parsers are" $("$build/fuzz_replay" --list)
        exit 1
    }
done
for name; do
    log=$build/fuzz/$name.log
    mkdir -p "$build/fuzz/found/$name"
    ln -sf parsers "$build/fuzz/$name"
    {
        fuzz "$name" $((runs / 10)) $(((seconds + 9) / 10)) 1 &&
            fuzz "$name" $((runs - runs / 10)) $((seconds - seconds / 10)) 0
    } >"$log" 2>&1 || {
        tail -n 40 "$log"
        echo "fuzz: a finding in $name; the input is named above, and the whole output is in $log"
        exit 1
    }
    awk -v name="$name" '/^stat::number_of_executed_units:/ { n += $2 }
        /^Done [0-9]+ runs in/ { s += $5 }
        { for (i = 1; i < NF; i++) if ($i == "cov:") edges = $(i + 1) }
        END { printf "%-12s %10d executions in %5d s, %d edges, nothing found\n",
              name, n, s, edges }' "$log"
done
