#!/usr/bin/env bash
# The tables of docs/results.md: every arm is an ordinary command, three seeds each but where the list says less.
#
#     bash analysis/grid.sh                 what has no result yet, here or in docs/results; what was killed goes on
#     AGAIN=1 bash analysis/grid.sh         also what docs/results has
#     SEEDS="0" bash analysis/grid.sh       one seed
#     JOBS=4 bash analysis/grid.sh          runs side by side, one thread each (default: one a core)
#     FLAGS="--steps 20" bash analysis/grid.sh        for every arm alike (default: 100 steps, and
#                                           eager attention, as what docs/results has was made)
#
# Afterwards: python analysis/compare.py runs/grid/* --keep docs/results
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/grid
jobs=${JOBS:-$(nproc)}                 # before the next line, which nproc obeys
export OMP_NUM_THREADS=1 FLAGS="${FLAGS:---steps 100 --eval-every 0 --attention eager}" AGAIN="${AGAIN:-}"

# The worlds that lie to the teacher, tell it nothing, or show it another picture.
for world in wrong empty; do
    [ -e data/toy-$world/train.jsonl ] || python data/toy.py --cues $world
done
for world in masked blurred; do
    [ -e data/toy-$world/train.jsonl ] || python data/toy.py --views $world
done

# The bigger teacher: the tiny model with four more layers, taught to look. It is not shipped, so it is
# made here, beside the first arms.
export teacher=data/tiny-teacher
if [ ! -e $teacher/whole ] && { [ -n "$AGAIN" ] || [ ! -e docs/results/bigger-cue-2 ]; }; then
    { python data/make_tiny.py --grow data/tiny-qwen3-vl --layers 10 --looks --steps 250 --lr 5e-4 \
          --out $teacher && touch $teacher/whole; } > runs/grid/teacher.log 2>&1 &
    export maker=$!
fi

# name, seeds, flags. Behind a name of analysis/baselines.py (supervised, grpo) stand its flags.
arms="
cue-off          0,1,2 --privilege cue --no-cue-recovery
wrong-off        0,1,2 --privilege cue --data data/toy-wrong/train.jsonl --no-cue-recovery
empty-off        0,1,2 --privilege cue --data data/toy-empty/train.jsonl --no-cue-recovery
supervised-off   0,1,2 supervised --no-cue-recovery
grpo-off         0,1,2 grpo --batch-size 12 --samples-per-prompt 4 --lr 1e-4 --no-cue-recovery
masked-off       0,1,2 --privilege view --data data/toy-masked/train.jsonl --no-cue-recovery
maskedcue-off    0,1,2 --privilege view+cue --data data/toy-masked/train.jsonl --no-cue-recovery
blurred-off      0,1,2 --privilege view --data data/toy-blurred/train.jsonl --no-cue-recovery
samples-off      0     --privilege cue --batch-size 12 --samples-per-prompt 4 --no-cue-recovery
reverse-off      0,1,2 --privilege cue --loss reverse_kl --no-cue-recovery
sampled-off      0,1,2 --privilege cue --loss sampled --no-cue-recovery
answer-off       0,1,2 --privilege answer --no-cue-recovery
answer-first     0,1,2 --privilege answer
rationale-off    0,1,2 --privilege rationale --no-cue-recovery
rationale-first  0,1,2 --privilege rationale
cue-first        0,1,2 --privilege cue
cue-last         0,1,2 --privilege cue --sink last
lora-first       0,1,2 --privilege cue --train lora
lora2-off        0     --privilege cue --train lora --lora-rank 2 --no-cue-recovery
lora2-first      0     --privilege cue --train lora --lora-rank 2
alone-first      0,1,2 --privilege cue --train cue
alone-last       0,1,2 --privilege cue --train cue --sink last
alone-long       0     --privilege cue --train cue --steps 300
twice-off        0     --privilege cue --min-pixels 6144 --no-cue-recovery
twice-first      0     --privilege cue --min-pixels 6144
twice-alone      0     --privilege cue --min-pixels 6144 --train cue
big-off          0     --privilege cue --min-pixels 12288 --no-cue-recovery
big-first        0     --privilege cue --min-pixels 12288
big-alone        0     --privilege cue --min-pixels 12288 --train cue
bigger-none      0,1,2 --privilege none --teacher $teacher --no-cue-recovery
bigger-cue       0,1,2 --privilege cue --teacher $teacher
long-self        0,1,2 --privilege cue --steps 1000 --eval-every 100
long-ema         0     --privilege cue --steps 1000 --eval-every 100 --teacher ema
"

one() {                                # one arm with one seed: NAME SEED FLAGS...
    local name="grid/$1-$2" kept="docs/results/$1-$2/result.json" seed="$2" script="distill.py"
    local folder="runs/$name"
    shift 2
    [ -e "$folder/result.json" ] && return
    [ -e "$kept" ] && [ -z "$AGAIN" ] && return
    if [[ "$1" != --* ]]; then
        script="analysis/baselines.py $1"
        shift
    fi
    if [[ "$*" == *$teacher* ]]; then
        while [ ! -e $teacher/whole ] && kill -0 "$maker" 2> /dev/null; do sleep 5; done
    fi
    if [ -e "$folder/args.json" ]; then
        set -- --resume "$folder"
    else
        set -- $FLAGS "$@" --seed "$seed" --name "$name"
    fi
    echo "$(date +%H:%M) python $script $*"
    python $script "$@" >> "$folder.log" 2>&1 || echo "FAILED: see $folder.log"
}
export -f one

for seed in ${SEEDS:-0 1 2}; do        # seed by seed, so that a cut grid has every arm
    while read -r name seeds flags; do
        [[ ",$seeds," == *",$seed,"* ]] && echo "$name $seed $flags"
    done <<< "$arms"
done | xargs -P "$jobs" -I{} bash -c 'one {}'
