#!/bin/sh
# Starts N ranks of a command on this machine, with the variables that torchrun would set, a fresh job token and a free port.
#
#     scripts/launch.sh -n 8 build/train_gpt_cuda --train 'data/train_*.bin' ...
#     scripts/launch.sh -n 2 --prefix -- build/train_gpt ...         each line of output after its rank: "[1] ..."
#
# When a rank fails, the others have 5 seconds to say so themselves, then they are ended. The exit
# code is that of the first that failed; 128 + the signal's number for one that was killed.
#
#     SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal closes)    SIGTERM to all ranks: save and end
#     SIGUSR2, SIGXCPU (a scheduler's warnings)                 the same to all ranks: save and end
#     SIGUSR1                                                   the same: save and continue
#
# A second SIGTERM, SIGINT or SIGHUP kills the ranks, unless it follows within two seconds:
# timeout(1) sends each signal to this process and again to its whole group. Nothing is left on the
# disk, and no free space is needed there.
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

# The ranks' news: "start RANK PID" and "end RANK CODE PID". Once the fifo is open nobody needs its
# name. It takes an entry in a directory and no space; where TMPDIR has no room for an entry,
# another directory does.
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

running='' timers=''                                     # process numbers: of ranks, of `later`
started=0 ended=0 failed=0                               # ranks; the code of the first that failed
stop='' asked=''                                         # the signal to stop by; when, in seconds

# A trap may run between any two commands, so no two of these functions change the same variable.
signal_all() { for member in $running; do kill "-$1" "$member" 2>/dev/null; done; }

forget() {
    case " $running " in *" $1 "*) ;; *) started=$((started + 1)) ;; esac    # it never reported
    others=''
    for other in $running; do [ "$other" = "$1" ] || others="$others $other"; done
    running=$others
}

later() {                                                # later SECONDS NEWS, for the main loop
    ( sleep "$1"; echo "$2" >&3 ) </dev/null >/dev/null 2>&1 &
    timers="$timers $!"
}

# No more news from `later`; its sleep ends by itself.
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

# The first signal is the ranks' to answer: the trainer saves and ends. SIGINT does not reach them
# by itself, since a shell has it ignored in background jobs; nor does SIGHUP, which a terminal that
# closes sends to all. A later signal ends all. Before every rank has started there is nothing to
# save: after 5 seconds those whose parent was killed by the signal are given up.
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
trap : PIPE                                              # nobody reads our errors: the ranks go on

# Runs in a subshell of its own, which no signal ends before its rank, nor interrupts: bash's `wait`
# would lose the rank's code. The rank reports its own number, once it no longer ignores the signals
# that will be handed on to it.
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

# Lives until its rank's last line, whatever signal the group gets.
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
