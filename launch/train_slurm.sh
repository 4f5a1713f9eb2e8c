#!/usr/bin/env bash
#SBATCH --job-name=multiturn
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains with launch/train_torchrun.sh on all nodes of a SLURM job, one torchrun a node.
#
#   sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 \
#       --export ALL,DATA_PATH=PREFIX,TOKENIZER_MODEL=FILE,SAVE_DIR=FOLDER \
#       launch/train_slurm.sh [more flags of Megatron's]
#
# Submit from the root of the checkout, with SAVE_DIR on a file system that all nodes see. All
# variables of train_torchrun.sh count. The addresses come from the job. Some minutes before
# the time limit (STOP_MINUTES, 10 by default) Megatron saves and ends; an unfinished job that
# has got on since its start is then queued again and goes on from SAVE_DIR, as it does after
# a preemption. DRY_RUN=1 prints the commands and stops, outside a job too.
set -euo pipefail

if [[ ${DRY_RUN:-0} == 1 && -z ${SLURM_JOB_ID:-} ]]; then
    # Not in a job: what SLURM would say is made up.
    SLURM_JOB_ID=1 SLURM_JOB_NODELIST=first-node
    scontrol() { echo "$SLURM_JOB_NODELIST"; }
    squeue() { :; }
fi
: "${SLURM_JOB_ID:?run this with sbatch, or inside salloc}"
: "${SAVE_DIR:?set it to a folder for checkpoints}"
root=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $root/launch/train_torchrun.sh ]]; then
    echo "$root holds no launch/train_torchrun.sh; submit the job from the root of the checkout" >&2
    exit 1
fi

export NNODES=${SLURM_NNODES:-1}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A job that was queued again must not meet the port that its last try may still hold.
MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    export NPROC_PER_NODE=${NPROC_PER_NODE:-$SLURM_GPUS_ON_NODE}
fi

# minutes_left: until the job's time limit; nothing if it has none.
minutes_left() {
    local end seconds
    end=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)
    seconds=$(date --date "$end" +%s 2>/dev/null) || return 0
    echo $(((seconds - $(date +%s)) / 60))
}

# latest_iteration: of the checkpoints in SAVE_DIR; 0 without one.
latest_iteration() {
    cat "$SAVE_DIR/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

left=$(minutes_left)
if [[ -n $left ]]; then
    stop=${STOP_MINUTES:-10}
    export EXIT_MINUTES=$((left > stop ? left - stop : 1))
fi

step=(srun --ntasks-per-node 1 --kill-on-bad-exit=1 "$root/launch/train_torchrun.sh" "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${step[@]}"
    printf '\n'
    exec "$root/launch/train_torchrun.sh" "$@"
fi

# run_step: and note what the job says that TRAIN_EPOCHS are in iterations.
run_step() {
    if [[ -z ${TRAIN_EPOCHS:-} ]]; then
        "${step[@]}"
    else
        mkdir -p "$SAVE_DIR"
        "${step[@]}" | sed -u -e p \
            -e "s/.*--train-epochs .* so --train-iters \([0-9]*\)\$/\1/w $SAVE_DIR/train_iters.txt" \
            -e d
        TRAIN_ITERS=$(tail -n 1 "$SAVE_DIR/train_iters.txt")
    fi
}

start=$(latest_iteration)
run_step
reached=$(latest_iteration)
if ((reached < ${TRAIN_ITERS:-10000} && reached > start)); then
    echo "iteration $reached of ${TRAIN_ITERS:-10000} is saved in $SAVE_DIR; the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
