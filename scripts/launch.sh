#!/bin/sh
# Starts N ranks of a command on this machine, with the variables that torchrun would set, a fresh job token and a free port.
#
#     scripts/launch.sh -n 8 build/train_gpt_cuda --train 'data/train_*.bin' ...
#     scripts/launch.sh -n 2 --prefix -- build/train_gpt ...         each line of output after its rank: "[1] ..."
#
# When a rank fails, the others have 5 seconds to say so themselves, then they are ended. The exit code is that of the first
# that failed; 128 + the signal's number for one that was killed. Ctrl-C, a SIGTERM or a terminal that closes reaches all
# ranks as SIGTERM, upon which build/train_gpt saves and ends; a second signal kills them.
set -u
usage() {
    echo "usage: scripts/launch.sh -n N [--prefix] [--] command ..." >&2
    exit 2
}

n='' prefix=0
while [ $# -gt 0 ]; do
    case $1 in
        -n) [ $# -ge 2 ] || usage; n=$2; shift 2 ;;
        --prefix) prefix=1; shift ;;
        --) shift; break ;;
        -*) usage ;;
        *) break ;;
    esac
done
case $n in ''|*[!0-9]*|0*) usage ;; esac
[ $# -gt 0 ] || usage

# Ports below those that the system hands out for outgoing connections (32768 on Linux), that nobody listens on.
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
taken() {
    [ -r /proc/net/tcp ] || return 1                     # elsewhere: rank 0 will say so
    cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ":$(printf %04X "$1") [0-9A-F]*:0000 0A"
}
while
    MASTER_PORT=$((20000 + 0x$(random 2) % 12000))
    taken "$MASTER_PORT"
do :; done

# Another launcher's variables would contradict ours.
others='OMPI_COMM_WORLD_[A-Z_]*\|PMI_[A-Z_]*\|MPI_LOCALRANKID\|TORCHELASTIC_[A-Z_]*'
for name in $(env | sed -n "s/^\($others\)=.*/\1/p"); do unset "$name"; done
MASTER_ADDR=127.0.0.1 DROPPATH_JOB_TOKEN=$(random 16)
export WORLD_SIZE="$n" LOCAL_WORLD_SIZE="$n" MASTER_ADDR MASTER_PORT DROPPATH_JOB_TOKEN
if [ -z "${OMP_NUM_THREADS:-}" ]; then                   # the ranks share the cores
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    OMP_NUM_THREADS=$((cores / n > 0 ? cores / n : 1))
    export OMP_NUM_THREADS
fi

dir=$(mktemp -d) || exit 1
mkfifo "$dir/ended" || exit 1
exec 3<>"$dir/ended"                                     # each rank's "rank code" when it ends
timer=''

signal_all() {                                           # only processes that are still ours: a rank's file goes with it
    for file in "$dir"/pid.*; do
        [ -f "$file" ] && kill "-$1" "$(cat "$file")" 2>/dev/null
    done
}

finish() {
    trap '' INT TERM HUP
    [ -z "$timer" ] || kill "$timer" 2>/dev/null
    signal_all KILL
    rm -rf "$dir"
    exit "$1"
}

# The first signal is the ranks' to answer: the trainer saves and ends. SIGINT does not reach them, since a shell has it ignored
# in what it starts behind itself; nor does SIGHUP, which a terminal that closes sends to all: who waits for a rank must live to
# tell its end. A second signal ends all.
asked=0
ask() {
    [ "$asked" -eq 0 ] || finish "$1"
    asked=1
    signal_all TERM
}
trap 'ask 130' INT
trap 'ask 143' TERM
trap 'ask 129' HUP

run_rank() {
    RANK=$1 LOCAL_RANK=$1
    shift
    export RANK LOCAL_RANK
    "$@" 3>&- &
    echo $! > "$dir/pid.$RANK"
    wait $!
    code=$?
    rm -f "$dir/pid.$RANK"
    echo "$RANK $code" >&3
}

label() { while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done; }

rank=0
while [ "$rank" -lt "$n" ]; do
    if [ "$prefix" = 1 ]; then { trap '' HUP; run_rank "$rank" "$@" 2>&1 | label "$rank" 3>&-; } &
    else { trap '' HUP; run_rank "$rank" "$@"; } &
    fi
    rank=$((rank + 1))
done

failed=0 ended=0
while [ "$ended" -lt "$n" ]; do
    read -r rank code <&3 || continue                    # interrupted
    ended=$((ended + 1))
    [ "$code" -ne 0 ] && [ "$failed" -eq 0 ] || continue
    failed=$code
    echo "launch.sh: rank $rank ended with exit code $code" >&2
    ( sleep 5; signal_all TERM; sleep 5; signal_all KILL ) </dev/null >/dev/null 2>&1 3>&- &
    timer=$!
done
[ "$prefix" = 0 ] || { [ -z "$timer" ] || kill "$timer" 2>/dev/null; timer=''; wait; }   # the last lines
finish "$failed"
