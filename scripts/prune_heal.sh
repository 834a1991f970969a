#!/bin/sh
# Does drop path make layers dispensable? Trains with and without it at equal FLOPs, removes a
# quarter of the layers, trains what is left for a tenth of the steps: a table, and a picture of
# loss against layers removed, for both models.
#
#   model   0.62 M parameters: 12 layers, 4 heads, 64 channels, rows of 64 bytes
#   data    16 rows x 64 bytes x 2000 steps = 2.0 M bytes per run; with drop path 25 % more, for the
#           same FLOPs
#   drops   whole blocks, rates rising to 0.4 in the last layer: 2.6 of 12 are missing on average in
#           each step
#   prune   greedily, by the loss on 32,768 tokens of the training text; what is reported is on
#           32,768 of the validation text
#   cost    a seed: 3 runs of 7.6e12 FLOPs, 2 models of which scores, 17 evaluations and 4 short
#           runs are made; about 10 minutes of one core with AVX-512 and its bf16, so half an hour
#           for three seeds
#   result  of seeds 1337 to 1339: three layers cost 0.149 nats without drop path and 0.008 with it,
#           greedily chosen; after healing both end at 1.99. dev/tools/README.md has the tables
#
#     sh scripts/prune_heal.sh                                        as above
#     SEEDS="1 2 3 4 5" RATE=0.2 sh scripts/prune_heal.sh             other seeds, another rate
#
# Variables: SEEDS="1337 1338 1339" (one after the other, since compare counts up), RATE=0.4,
# LAYERS=12, REMOVE=3, STEPS=2000, HEAL=10 (per cent of STEPS), LAST=3 (layers that one arm trains
# alone), RANK=8 and LORA_LR=3e-3 (of the arm of adapters), TOKENS=32768, OUT=runs/prune_heal,
# BUILD=build, PYTHON=python3, THREADS=0 (all), DTYPE, TEXT=/path of your own text, or DATA, a
# folder with train_*.bin and val_*.bin. The same command again continues where it stopped. Arms of
# healing: the functions heal_NAME below, listed in ARMS.
set -eu
BUILD=${BUILD:-build}
OUT=${OUT:-runs/prune_heal}
PYTHON=${PYTHON:-python3}
SEEDS=${SEEDS:-1337 1338 1339}
RATE=${RATE:-0.4}
LAYERS=${LAYERS:-12}
REMOVE=${REMOVE:-3}
STEPS=${STEPS:-2000}
HEAL=${HEAL:-10}
LAST=${LAST:-3}
RANK=${RANK:-8}
LORA_LR=${LORA_LR:-3e-3}
TOKENS=${TOKENS:-32768}
THREADS=${THREADS:-0}
ARMS=${ARMS:-full last lora}
DTYPE=${DTYPE:-$(if grep -qs avx512_bf16 /proc/cpuinfo; then echo bf16; else echo fp32; fi)}
MODELS="none drop_flops"           # compare's names: without drop path, with it at equal FLOPs

if [ -z "${DATA:-}" ]; then
    DATA=$OUT/data
    if [ ! -f "$DATA/tokenizer.bin" ]; then
        text=$(TEXT="${TEXT:-}" sh data/get_text.sh)
        if [ "$text" = /usr/include ]; then ext="--ext .h"; fi
        # shellcheck disable=SC2086  # ext is two words or none
        "$BUILD/data_bytes" --out "$DATA" --max-bytes 4000000 ${ext:-} "$text"
    fi
fi

first=${SEEDS%% *}
count=0
for seed in $SEEDS; do
    if [ "$seed" -ne $((first + count)) ]; then
        echo "error: SEEDS=\"$SEEDS\": they must count up by one" >&2
        exit 1
    fi
    count=$((count + 1))
done
"$BUILD/compare" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" --out "$OUT" \
    --seeds "$count" --seed "$first" --layers "$LAYERS" --heads 4 --channels 64 --seq-len 64 \
    --batch 16 --steps "$STEPS" --lr 1e-3 --warmup 5% --beta2 0.99 \
    --dtype "$DTYPE" --threads "$THREADS" --log-every 200 --eval-every 500 --keep 1 --picture 0 \
    --drop-path "$RATE" --drop-branches tied

# train RUN FROM [options]: HEAL per cent of the steps more, from these weights, in an order of the
# text that is new to them. Evaluated four times, for the table of loss against tokens and seconds.
train() {
    healed=$OUT/heal/$1 from=$2
    shift 2
    if [ -e "$healed/latest" ]; then return 0; fi
    "$BUILD/train_gpt" --train "$DATA/train_*.bin" --val "$DATA/val_*.bin" --out "$healed" \
        --init-from "$from" --resume --seed $((seed + 1000)) --batch 16 --seq-len 64 \
        --steps $((STEPS * HEAL / 100)) --lr 3e-4 --warmup 10% --beta2 0.99 --dtype "$DTYPE" \
        --threads "$THREADS" --log-every 100 --eval-every $(((STEPS * HEAL + 399) / 400)) \
        --eval-tokens "$TOKENS" --keep 1 "$@"
}

# An arm: how the pruned model in $1 is healed, as run $2.
heal_full() { train "$2" "$1"; }
heal_last() { train "$2" "$1" --train-last "$LAST"; }
# All weights stay; drop path is off, as in the other arms.
heal_lora() { train "$2" "$1" --lora "$RANK" --lr "$LORA_LR" --drop-path 0; }

# loss JSON MODEL [options]: on the validation text.
loss() {
    json=$1
    shift
    "$BUILD/evaluate" "$@" --val "$DATA/val_*.bin" --eval-tokens "$TOKENS" --threads "$THREADS" \
        --json "$json" > /dev/null
}

mkdir -p "$OUT/scores" "$OUT/curve" "$OUT/pruned" "$OUT/heal"
for seed in $SEEDS; do
    for model in $MODELS; do
        name=${model}_s$seed run=$OUT/${model}_s$seed scores=$OUT/scores/${model}_s$seed.json
        echo "== $name: scores, pruning, healing"
        if [ ! -e "$scores" ]; then
            "$BUILD/layers" "$run" --val "$DATA/train_*.bin" --tokens "$TOKENS" \
                --greedy $((REMOVE * 2)) --branches 0 --exits 0 --threads "$THREADS" \
                --json "$scores" > "$OUT/scores/$name.txt"
        fi
        # Ways are such as greedy_3=0,1,2,4,8: a name, and the layers that stay.
        for way in $("$PYTHON" scripts/prune_heal.py ways "$scores" "$REMOVE"); do
            file=$OUT/curve/${name}_${way%%=*}.json
            if [ "${way%%=*}" = "greedy_$REMOVE" ]; then keep=${way#*=}; fi
            if [ -e "$file" ]; then continue; fi
            loss "$file" "$run" --keep-layers "${way#*=}"
        done
        if [ ! -e "$OUT/pruned/$name" ]; then
            "$BUILD/prune" "$run" --out "$OUT/pruned/$name" --keep "$keep" \
                --val "$DATA/val_*.bin" --tokens "$TOKENS" --threads "$THREADS"
        fi
        loss "$OUT/curve/${name}_pruned.json" "$OUT/pruned/$name"
        for arm in $ARMS; do
            "heal_$arm" "$OUT/pruned/$name" "${name}_$arm"
            loss "$OUT/curve/${name}_heal_$arm.json" "$OUT/heal/${name}_$arm"
        done
        train "${name}_whole" "$run"     # what the same training gives with all layers
        loss "$OUT/curve/${name}_heal_whole.json" "$OUT/heal/${name}_whole"
    done
done

echo
# shellcheck disable=SC2086  # ARMS are several words
"$PYTHON" scripts/prune_heal.py table "$OUT" "$REMOVE" $ARMS | tee "$OUT/table.md"
echo
# shellcheck disable=SC2086
"$PYTHON" scripts/prune_heal.py costs "$OUT" "$REMOVE" $ARMS | tee "$OUT/costs.md"
echo
# shellcheck disable=SC2086
if "$PYTHON" scripts/prune_heal.py picture "$OUT" "$REMOVE" $ARMS; then
    echo "table and picture are in $OUT"
fi
