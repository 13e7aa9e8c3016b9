#!/usr/bin/env bash
# The component table of docs/results.md: every arm is an ordinary distill.py command, three seeds each.
#
#     bash analysis/grid.sh                 all of it; what is done is skipped, what was killed goes on
#     SEEDS="0" bash analysis/grid.sh       one seed
#     JOBS=4 bash analysis/grid.sh          runs side by side, one thread each (default: one a core)
#     FLAGS="--steps 20" bash analysis/grid.sh        for every arm alike
#
# Afterwards: python analysis/compare.py runs/grid/*
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/grid
jobs=${JOBS:-$(nproc)}                 # before the next line, which nproc obeys
export OMP_NUM_THREADS=1 FLAGS="${FLAGS:---steps 100 --eval-every 0}"

# The bigger teacher: the tiny model with four more layers, taught to look. It is not shipped, so it is
# made here, beside the first arms.
export teacher=data/tiny-teacher
if [ ! -e $teacher/whole ]; then
    { python data/make_tiny.py --grow data/tiny-qwen3-vl --layers 10 --looks --steps 250 --lr 5e-4 \
          --out $teacher && touch $teacher/whole; } > runs/grid/teacher.log 2>&1 &
    export maker=$!
fi

arms="
answer-off       --privilege answer --no-cue-recovery
answer-first     --privilege answer
rationale-off    --privilege rationale --no-cue-recovery
rationale-first  --privilege rationale
cue-off          --privilege cue --no-cue-recovery
cue-first        --privilege cue
cue-last         --privilege cue --sink last
lora-first       --privilege cue --train lora
alone-first      --privilege cue --train cue
alone-last       --privilege cue --train cue --sink last
bigger-none      --privilege none --teacher $teacher --no-cue-recovery
bigger-cue       --privilege cue --teacher $teacher
"

one() {                                # one arm with one seed: NAME SEED FLAGS...
    local name="grid/$1-$2" seed="$2"
    local folder="runs/$name"
    shift 2
    [ -e "$folder/result.json" ] && return
    if [[ "$*" == *$teacher* ]]; then
        while [ ! -e $teacher/whole ] && kill -0 "$maker" 2> /dev/null; do sleep 5; done
    fi
    if [ -e "$folder/args.json" ]; then
        set -- --resume "$folder"
    else
        set -- "$@" --seed "$seed" --name "$name" $FLAGS
    fi
    echo "$(date +%H:%M) python distill.py $*"
    python distill.py "$@" >> "$folder.log" 2>&1 || echo "FAILED: see $folder.log"
}
export -f one

for seed in ${SEEDS:-0 1 2}; do        # seed by seed, so that a cut grid has every arm
    while read -r name flags; do
        [ -n "$name" ] && echo "$name $seed $flags"
    done <<< "$arms"
done | xargs -P "$jobs" -I{} bash -c 'one {}'
