#!/bin/sh
# Starts N ranks of a command on this machine, with the variables that torchrun sets, a fresh job
# token and a free port.
#
#     scripts/launch.sh -n 8 build/train_gpt_cuda --train 'data/train_*.bin' ...
#     scripts/launch.sh -n 2 --prefix -- build/train_gpt ...    prefixes output with the rank: "[1]
#                                                               ..."
#
# When a rank fails, the others have 5 seconds to report it themselves before they are stopped. The
# exit code is that of the first rank that failed; 128 + the signal number for one that was killed.
#
#     SIGTERM, SIGINT (Ctrl-C), SIGHUP (terminal closed)    SIGTERM to all ranks: save and exit
#     SIGUSR2, SIGXCPU (a scheduler's warnings)             the same to all ranks: save and exit
#     SIGUSR1                                               the same: save and continue
#
# A second SIGTERM, SIGINT or SIGHUP kills the ranks, unless it follows within two seconds, since
# timeout(1) sends each signal to this process and again to its whole group. Leaves no files behind
# and needs no free disk space.
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

# Finds a port that nobody listens on, below those that the system assigns to outgoing connections
# (32768 on Linux).
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
taken() {
    [ -r /proc/net/tcp ] || return 1                     # elsewhere, rank 0 will report it
    cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ":$(printf %04X "$1") [0-9A-F]*:0000 0A"
}
while
    MASTER_PORT=$((20000 + 0x$(random 2) % 12000))
    taken "$MASTER_PORT"
do :; done

# Other launchers' variables would contradict ours.
others='OMPI_COMM_WORLD_[A-Z_]*\|PMI_[A-Z_]*\|MPI_LOCALRANKID\|TORCHELASTIC_[A-Z_]*'
for name in $(env | sed -n "s/^\($others\)=.*/\1/p"); do unset "$name"; done
MASTER_ADDR=127.0.0.1 DROPPATH_JOB_TOKEN=$(random 16)
export WORLD_SIZE="$n" LOCAL_WORLD_SIZE="$n" MASTER_ADDR MASTER_PORT DROPPATH_JOB_TOKEN
if [ -z "${OMP_NUM_THREADS:-}" ]; then                   # the ranks share the cores
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    OMP_NUM_THREADS=$((cores / n > 0 ? cores / n : 1))
    export OMP_NUM_THREADS
fi

# Reports from the ranks: "start RANK PID" and "end RANK CODE PID". Once the fifo is open, its name
# is no longer needed. It takes a directory entry but no space; if TMPDIR cannot hold an entry,
# another directory can.
for place in "${TMPDIR:-/tmp}" /dev/shm /tmp .; do
    dir=$(mktemp -d "$place/launch.XXXXXX" 2>/dev/null) || continue
    mkfifo "$dir/news" 2>/dev/null && exec 3<>"$dir/news"
    opened=$?
    rm -rf "$dir"
    [ "$opened" -ne 0 ] || break
    dir=''
done
if [ -z "$dir" ]; then
    echo "launch.sh: cannot make a fifo in TMPDIR, /dev/shm, /tmp or here" >&2
    exit 1
fi

running='' timers=''                                     # process ids: of ranks, of `later`
started=0 ended=0 failed=0                               # ranks; the code of the first that failed
stop='' asked=''                                         # the signal to stop with; when it was
                                                         # requested, in seconds

# A trap may run between any two commands, so no two of these functions change the same variable.
signal_all() { for member in $running; do kill "-$1" "$member" 2>/dev/null; done; }

forget() {
    case " $running " in *" $1 "*) ;; *) started=$((started + 1)) ;; esac    # it never reported
    others=''
    for other in $running; do [ "$other" = "$1" ] || others="$others $other"; done
    running=$others
}

later() {                                                # later SECONDS REPORT: sends a report to
                                                         # the main loop
    ( sleep "$1"; echo "$2" >&3 ) </dev/null >/dev/null 2>&1 &
    timers="$timers $!"
}

# No more reports from `later`; its sleep ends by itself.
cancel() {
    for timer in $timers; do kill "$timer" 2>/dev/null; done
    timers=''
}

finish() {
    trap '' INT TERM HUP USR1 USR2 XCPU
    cancel
    signal_all KILL
    exit "$1"
}

# The ranks handle the first signal: the trainer saves and exits. SIGINT does not reach them by
# itself, because a shell ignores it in background jobs; nor does SIGHUP, which a closing terminal
# sends to all. A later signal kills them. Before every rank has started there is nothing to save:
# after 5 seconds, ranks whose parent was killed by the signal are given up.
ask() {                                                  # ask SIGNAL CODE
    until now=$(date +%s); do :; done                    # the signal may have hit `date`, too
    [ -z "$asked" ] || [ $((now - asked)) -le 2 ] || finish "$2"
    asked=${asked:-$now}
    hand_on "$1" "$2"
}
hand_on() {
    stop=$1
    signal_all "$1"
    [ "$started" -eq "$n" ] || later 5 "unmet - $2"
}
trap 'ask TERM 130' INT
trap 'ask TERM 143' TERM
trap 'ask TERM 129' HUP
trap 'hand_on USR2 140' USR2
trap 'hand_on XCPU 152' XCPU
trap 'signal_all USR1' USR1
trap : PIPE                                              # nobody reads our messages: the ranks
                                                         # continue

# Runs in its own subshell, which no signal ends before its rank, nor interrupts: bash's `wait`
# would lose the rank's exit code. The rank reports its own pid, once it no longer ignores the
# signals that will be forwarded to it.
run_rank() {
    RANK=$1 LOCAL_RANK=$1
    shift
    export RANK LOCAL_RANK
    trap '' TERM HUP USR1 USR2 XCPU
    (
        trap - TERM USR1 USR2 XCPU
        exec sh -c 'echo "start $RANK $$" >&3; exec "$@" 3>&-' launch.sh "$@"
    ) &
    wait $!
    echo "end $RANK $? $!" >&3
}

# Survives until its rank's last line, whatever signal the group gets.
label() {
    trap '' TERM HUP USR1 USR2 XCPU
    while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

rank=0
while [ "$rank" -lt "$n" ]; do
    if [ "$prefix" = 1 ]; then run_rank "$rank" "$@" 2>&1 | label "$rank" 3>&- &
    else run_rank "$rank" "$@" &
    fi
    rank=$((rank + 1))
done

while [ "$ended" -lt "$n" ]; do
    read -r news rank value pid <&3 || continue          # interrupted
    case $news in
        start)
            started=$((started + 1)) running="$running $value"
            [ -z "$stop" ] || kill "-$stop" "$value" 2>/dev/null ;;
        end)
            ended=$((ended + 1))
            forget "$pid"
            [ "$value" -ne 0 ] && [ "$failed" -eq 0 ] || continue
            failed=$value
            echo "launch.sh: rank $rank ended with exit code $value" >&2
            later 5 "signal - TERM"
            later 10 "signal - KILL"
            later 15 "over - $value" ;;
        signal) signal_all "$value" ;;
        unmet) [ "$started" -eq "$n" ] || finish "$value" ;;
        over) finish "$value" ;;
    esac
done
cancel
[ "$prefix" = 0 ] || until wait; do :; done              # the last lines; a signal interrupts
finish "$failed"
