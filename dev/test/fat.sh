#!/bin/sh
# Checks that a fat build keeps each engine's instructions to itself, so that its programs run on
# any x86-64: an engine's object must export only its table, and no program may contain a vector
# instruction outside these objects (AVX and later: their names begin with v, those on masks with
# k, those on tiles with t). Needs nm and objdump. Run by make instructions FAT=1.
#
# Variables: BUILD=build/fat.
set -eu
BUILD=${BUILD:-build/fat}
wrong=0

fail() { echo "FAIL $*"; wrong=1; }
code() { objdump -d --no-show-raw-insn "$1"; }
count() { code "$2" | grep -cE "$1" || true; }           # lines of the disassembly of $2 that match
                                                         # $1

amx='tile[a-z0-9]+|tdp[a-z0-9]+'
v=":[[:space:]]+(v[a-z0-9]+|k[a-z]+[bwdq]|$amx)([[:space:]]|\$)"    # AVX and later
amx=":[[:space:]]+($amx)([[:space:]]|\$)"
avx512='%zmm|%[xy]mm(1[6-9]|2[0-9]|3[01])|[{,]%k[0-7]|:[[:space:]]+k[a-z]+[bwdq][[:space:]]'
total=0
for object in "$BUILD"/engine_*.o; do
    name=${object##*/engine_}
    name=${name%.o}
    # C: a lock of OpenMP, data that all may share
    shown=$(nm -g --defined-only "$object" | awk '$2 != "C" { print $3 }')
    [ "$shown" = "cpu_engine_$name" ] ||
        fail "$object shows other symbols than its table: $(echo "$shown" | tr '\n' ' ')"
    vectors=$(count "$v" "$object") wide=$(count "$avx512" "$object") tiles=$(count "$amx" "$object")
    total=$((total + vectors))
    echo "$object: $vectors instructions of AVX and later, $wide of them AVX-512, $tiles AMX"
    [ "$name" = amx ] || [ "$tiles" -eq 0 ] || fail "$object has AMX"
    case $name in
        amx) [ "$wide" -gt 0 ] && [ "$tiles" -gt 0 ] || fail "$object has no AMX" ;;
        avx512*) [ "$wide" -gt 0 ] || fail "$object has no AVX-512" ;;
        avx*) [ "$vectors" -gt 0 ] && [ "$wide" -eq 0 ] || fail "$object is not of AVX2" ;;
        *) [ "$vectors" -eq 0 ] || fail "$object, for every processor, has AVX" ;;
    esac
done
for program in train_gpt compare evaluate generate test_gpt data_bytes; do
    [ "$program" = data_bytes ] && total=0               # no engine in it
    vectors=$(count "$v" "$BUILD/$program")
    [ "$vectors" -eq "$total" ] || fail "$BUILD/$program has $vectors of them, its engines $total"
done
[ "$wrong" -eq 0 ] && echo "instructions: those of each engine are in its object alone"
exit "$wrong"
