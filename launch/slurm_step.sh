# shellcheck shell=bash
# Sourced by the scripts that run in a SLURM job, behind launch/environment.sh.
#
#   set_step ROOT NODES TASKS   sets `step`, the srun of so many tasks, one a node, in the container
#   work_done PREFIX            prints the bytes that preprocessing has kept of what is unfinished
#   requeue_if_further A B      queues the job again if B, what is done now, differs from A

# CONTAINER_IMAGE is for pyxis; the image's own python3 runs unless MULTITURN_PYTHON names another.
set_step() {
    local root=$1
    step=(
        srun
        --nodes "$2"
        --ntasks "$3"
        --ntasks-per-node 1
        --export ALL
        --kill-on-bad-exit=1
        --cpu-bind none # one task starts a process a GPU, or many workers
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"} # which srun does not inherit
    )
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        export MULTITURN_PYTHON=${MULTITURN_PYTHON:-python3}
        step+=(
            --container-image "$CONTAINER_IMAGE"
            --container-mounts "${CONTAINER_MOUNTS:-$root:$root,$PWD:$PWD}"
            --container-workdir "$PWD"
        )
    fi
}

work_done() { { du --summarize --bytes "$1.unfinished" 2>/dev/null || true; } | cut -f 1; }

requeue_if_further() {
    local job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    if [[ $1 == "$2" ]]; then
        die "job $job was stopped before it got any further than at its start, and is not queued" \
            "again: give it more time (--time), or the signal before its end earlier or later (--signal)"
    fi
    say "job $job was stopped before its end; it is queued again"
    scontrol requeue "$job"
}
