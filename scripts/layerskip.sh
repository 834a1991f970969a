#!/bin/sh
# What do early exits give? Trains a model four ways at equal FLOPs (plain, drop path, the
# early-exit loss, both: LayerSkip), then reads each one's loss after every layer and generates text
# with self-speculation: a table, and a picture of loss against layers.
#
#   model   0.62 M parameters: 12 layers, 4 heads, 64 channels, rows of 64 bytes
#   data    16 rows x 64 bytes x 400 steps = 0.41 M bytes per plain run; the other arms take as many
#           steps as give the same FLOPs
#   drops   LayerSkip's: whole rows of a block, exponential in depth, rising over the run to 0.2
#   exits   e_scale 1, rotational, every 8th layer: one or two exits a step, 1 % of a step each
#   text    12 prompts x 110 bytes, greedy, drafted 4 bytes at a time by the first 4 layers, and by
#           as many as --exit-layer auto chooses; plain decoding and both take turns, 3 times
#   cost    a seed: 4 runs of 1.5e12 FLOPs; about 2 minutes of one core with AVX-512 and its bf16
#   result  of three seeds: after 4 of 12 layers 2.39 nats with LayerSkip and 2.60 without, after
#           all of them 2.37 for both; decoding 1.7 times as fast. Table: dev/tools/README.md
#
#     TEXT=book.txt sh scripts/layerskip.sh                           as above, on a text of yours
#     SEEDS="1 2 3 4 5" RATE=0.1 SCALE=0.5 sh scripts/layerskip.sh    other seeds and strengths
#
# Variables: SEEDS="1337 1338 1339", STEPS=400, LAYERS=12, CHANNELS=64, RATE=0.2, SCALE=1, EVERY=8,
# EXIT=4, DRAFTS=4, TOKENS=8192 (of the validation text, for the losses), ROUNDS=3,
# OUT=runs/layerskip, BUILD=build, PYTHON=python3, THREADS=0 (all), DTYPE, TEXT=/path of your own
# text, or DATA, a folder with train_*.bin and val_*.bin. The same command again continues where it
# stopped.
set -eu
BUILD=${BUILD:-build}
OUT=${OUT:-runs/layerskip}
PYTHON=${PYTHON:-python3}
SEEDS=${SEEDS:-1337 1338 1339}
STEPS=${STEPS:-400}
LAYERS=${LAYERS:-12}
CHANNELS=${CHANNELS:-64}
RATE=${RATE:-0.2}
SCALE=${SCALE:-1}
EVERY=${EVERY:-8}
EXIT=${EXIT:-4}
DRAFTS=${DRAFTS:-4}
TOKENS=${TOKENS:-8192}
ROUNDS=${ROUNDS:-3}
THREADS=${THREADS:-0}
DTYPE=${DTYPE:-$(if grep -qs avx512_bf16 /proc/cpuinfo; then echo bf16; else echo fp32; fi)}
ARMS="none drop exits both"

mkdir -p "$OUT"
if [ -z "${DATA:-}" ]; then
    DATA=$OUT/data
    if [ ! -f "$DATA/tokenizer.bin" ]; then
        text=$(TEXT="${TEXT:-}" sh data/get_text.sh)
        if [ "$text" = /usr/include ]; then ext="--ext .h"; fi
        # shellcheck disable=SC2086  # ext is two words or none
        "$BUILD/data_bytes" --out "$DATA" --max-bytes 4000000 ${ext:-} "$text"
    fi
fi

# An arm's options.
drop="--drop-recipe layerskip2024 --drop-path $RATE"
exits="--exit-scale $SCALE --exit-every $EVERY"
options() {
    case $1 in
        none) ;;
        drop) echo "$drop" ;;
        exits) echo "$exits" ;;
        both) echo "$drop $exits" ;;
    esac
}

# train STEPS OUT SEED ARM [options]
train() {
    steps=$1 run=$2 seed=$3 arm=$4
    shift 4
    # shellcheck disable=SC2046  # an arm's options are several words
    "$BUILD/train_gpt" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" --out "$run" \
        --seed "$seed" --layers "$LAYERS" --heads 4 --channels "$CHANNELS" --seq-len 64 \
        --batch 16 --steps "$steps" --lr 2e-3 --warmup 5% --beta2 0.99 --dtype "$DTYPE" \
        --threads "$THREADS" --log-every 100 --eval-every 0 --save-every 200 --keep 1 \
        --eval-tokens "$TOKENS" $(options "$arm") "$@"
}

flops() { train "$1" "$OUT/none" 1 "$2" --dry-run | awk '/^flops:/ { print $2 }'; }

# Steps of an arm for the FLOPs of STEPS plain ones: as costs per step hardly depend on the number
# of steps, the second guess is right to a step.
budget=$(flops "$STEPS" none)
steps_of() {
    n=$STEPS
    for _ in 1 2; do
        n=$(awk -v b="$budget" -v f="$(flops "$n" "$1")" -v n="$n" \
                'BEGIN { printf "%d", n * b / f + 0.5 }')
    done
    echo "$n"
}

cat > "$OUT/prompts.txt" <<'END'
The
What is
I have seen
When we
In the name of
My lord,
He that
So shall you
And if I
Come, let us
There was a
They say that
END

# generate NAME RUN [options]: appends what standard error says to OUT/text/NAME.log.
generate() {
    log=$OUT/text/$1.log out=$OUT/text/$1.txt
    shift
    "$BUILD/generate" "$@" --prompts "$OUT/prompts.txt" --temperature 0 --tokens 110 \
        --threads "$THREADS" > "$out" 2>> "$log"
}

mkdir -p "$OUT/scores" "$OUT/text"
for seed in $SEEDS; do
    for arm in $ARMS; do
        name=${arm}_s$seed run=$OUT/${arm}_s$seed
        if [ ! -e "$run/done" ]; then
            steps=$(steps_of "$arm")
            echo "== $name: $steps steps"
            train "$steps" "$run" "$seed" "$arm" --resume
            touch "$run/done"
        fi
        if [ ! -e "$OUT/scores/$name.json" ]; then
            "$BUILD/layers" "$run" --val "$DATA/val_*.bin" --tokens "$TOKENS" --branches 0 \
                --greedy 0 --threads "$THREADS" --json "$OUT/scores/$name.json" > /dev/null
        fi
        if [ -e "$OUT/text/$name.done" ]; then continue; fi
        rm -f "$OUT/text/${name}"_*.log
        for _ in $(seq "$ROUNDS"); do
            generate "${name}_plain" "$run"
            generate "${name}_fixed" "$run" --exit-layer "$EXIT" --speculate "$DRAFTS"
            generate "${name}_auto" "$run" --exit-layer auto --speculate "$DRAFTS"
            cmp "$OUT/text/${name}_plain.txt" "$OUT/text/${name}_fixed.txt"
            cmp "$OUT/text/${name}_plain.txt" "$OUT/text/${name}_auto.txt"
        done
        touch "$OUT/text/$name.done"
    done
done

echo
"$PYTHON" scripts/layerskip.py table "$OUT" "$EXIT" | tee "$OUT/table.md"
echo
if "$PYTHON" scripts/layerskip.py picture "$OUT" "$EXIT"; then
    echo "table and picture are in $OUT"
fi
