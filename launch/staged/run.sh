#!/usr/bin/env bash
#SBATCH --job-name=multiturn-staged
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains in stages, each from the weights of the one before: dialogues, knowledge, instructions.
#
#   DIALOGUE_DATA=a.jsonl KNOWLEDGE_DATA=b.jsonl INSTRUCTION_DATA=c.jsonl \
#       TOKENIZER_MODEL=FILE WORK_DIR=FOLDER MODEL=llama3-8b ./launch/staged/run.sh [more flags]
#
# The same command goes on, wherever it was stopped; what is finished is not done again, and what
# was begun with other settings is not gone on with. The same behind sbatch trains on all nodes of
# the job, and is queued again at its time limit (launch/pretrain.slurm).
#
# DIALOGUE_DATA, KNOWLEDGE_DATA, INSTRUCTION_DATA   files, patterns or folders, with blanks between
# WORK_DIR          a folder a stage: the dataset, checkpoint, settings, finished
# PRETRAINED        a checkpoint that the first stage begins with; else from random weights
# TEMPLATE          firefly by default; or CHAT_TEMPLATE, tokenizer or a file
# ON_BAD_SESSION    error (default), or skip
# STAGES            a folder of stages in place of launch/staged, in the order of their names: its
#                   files [0-9]*.sh say data, epochs, learning rate, batch, window, and flags
# PREPROCESS_ONLY=1 make the datasets of all stages and stop (needs no GPU)
# DRY_RUN=1         print the commands and stop
#
# A stage's settings: DIALOGUE_EPOCHS, DIALOGUE_LEARNING_RATE, DIALOGUE_BATCH, DIALOGUE_WINDOW (the
# longest piece of a session; a row by default), and the like of KNOWLEDGE and INSTRUCTION.
# All other variables of launch/pretrain_torchrun.sh count for every stage.
set -euo pipefail

find_root() {
    local folder script=
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        # SLURM runs a copy of this file, but knows where it was.
        script=$(scontrol show job --oneliner "$SLURM_JOB_ID" \
            | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
    fi
    for folder in "${MULTITURN_ROOT:-}" "${script%/*}/../.." "${BASH_SOURCE[0]%/*}/../.." \
        "${SLURM_SUBMIT_DIR:-$PWD}"; do
        if [[ -n $folder && -f $folder/launch/environment.sh ]]; then
            (cd "$folder" && pwd)
            return
        fi
    done
    echo "the checkout of megatron-multiturn is not found; set MULTITURN_ROOT to its folder" >&2
    return 1
}

root=$(find_root)
export MULTITURN_ROOT=$root
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
: "${TOKENIZER_MODEL:?set it to the tokenizer}"
: "${WORK_DIR:?set it to a folder for the datasets and checkpoints of all stages}"
step=()
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    # shellcheck source=launch/slurm_step.sh
    source "$root/launch/slurm_step.sh"
    set_step "$root" 1 1
fi
python=$(installed_python "$root")
extra_flags=("$@")

stages=("${STAGES:-$root/launch/staged}"/[0-9]*.sh)
[[ -f ${stages[0]} ]] || die "STAGES=${STAGES:-} holds no file whose name is like 1-first.sh"

# load_stage FILE: sets the variables of a stage.
load_stage() {
    stage=${1##*/}
    stage=${stage%.sh}
    folder=$WORK_DIR/$stage
    # Nothing of the stage before.
    unset inputs epochs learning_rate global_batch_size
    window='' preprocess_flags=() train_flags=()
    # shellcheck source=launch/staged/2-knowledge.sh
    source "$1"
    tokenizer_flags=(
        --tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}"
        --tokenizer-model "$TOKENIZER_MODEL"
    )
    template=(--template "${TEMPLATE:-firefly}")
    if [[ -n ${CHAT_TEMPLATE:-} ]]; then
        template=(--chat-template "$CHAT_TEMPLATE")
    fi
    preprocess=(
        ${step[@]+"${step[@]}"} "$python" -m megatron_multiturn.preprocess
        --input "${inputs[@]}"
        --output-prefix "$folder/data"
        "${template[@]}" "${tokenizer_flags[@]}"
        --on-bad-session "${ON_BAD_SESSION:-error}"
        ${preprocess_flags[@]+"${preprocess_flags[@]}"}
    )
    train_flags+=(${window:+--session-window "$window"} ${extra_flags[@]+"${extra_flags[@]}"})
}

# input_files: those of the stage, with size and date.
input_files() {
    local pattern path
    for pattern in "${inputs[@]}"; do
        while read -r path; do
            find "$path" -type f -not -name '.*' -printf '%p, %s bytes of %TY-%Tm-%Td %TT\n'
        done < <(compgen -G "$pattern") | sort
    done
}

# print_settings: what decides the result of the stage, a line each.
print_settings() {
    printf 'input: %s\n' "${inputs[*]}"
    input_files | sed 's/^/file: /'
    printf 'template: %s\n' "${template[*]}"
    printf 'tokenizer: %s\n' "${tokenizer_flags[*]}"
    printf 'preprocessing: %s\n' "${preprocess_flags[*]-}"
    printf 'bad sessions: %s\n' "${ON_BAD_SESSION:-error}"
    printf 'model: %s\n' "${MODEL:-gpt-1.3b}"
    printf 'row: %s\n' "${SEQ_LENGTH:-of the model}"
    printf 'epochs: %s\n' "$epochs"
    printf 'learning rate: %s\n' "$learning_rate"
    printf 'batch: %s\n' "$global_batch_size"
    printf 'flags: %s\n' "${train_flags[*]-}"
}

# check_same FILE TEXT: stops, and says what, if the stage was begun with another TEXT than this.
check_same() {
    local changed
    [[ -e $1 ]] || return 0
    changed=$(diff --old-line-format='  was: %L' --new-line-format='  now: %L' \
        --unchanged-line-format='' "$1" <(printf '%s\n' "$2") || true)
    [[ -z $changed ]] || die "$stage was begun otherwise:
$changed
put it back; or remove $folder, to do this stage and those behind it anew; or name another WORK_DIR"
}

# keep FILE TEXT: whole or not at all.
keep() {
    printf '%s\n' "$2" >"$1.new"
    mv "$1.new" "$1"
}

check_stage() {
    local pattern
    for pattern in "${inputs[@]}"; do
        compgen -G "$pattern" >/dev/null \
            || die "$stage: $pattern: no such file; name the data as seen from $PWD"
    done
    check_same "$folder/settings" "$(print_settings)"
}

# run_child COMMAND...: ends it when this script is to end.
run_child() {
    local child status=0
    "$@" &
    child=$!
    # shellcheck disable=SC2064
    trap "kill -TERM $child" TERM INT
    wait "$child" || status=$?
    if ((status > 128)) && kill -0 "$child" 2>/dev/null; then
        wait "$child" || status=$?
    fi
    trap - TERM INT
    return "$status"
}

make_dataset() {
    mkdir -p "$folder"
    [[ -e $folder/settings ]] || keep "$folder/settings" "$(print_settings)"
    if [[ -e $folder/data.json ]]; then
        return
    fi
    say "== $stage: preprocessing"
    local before status=0
    [[ -z ${SLURM_JOB_ID:-} ]] || before=$(work_done "$folder/data")
    run_child "${preprocess[@]}" || status=$?
    if [[ -n ${SLURM_JOB_ID:-} ]] && ((status == 128 + 10)); then # SIGUSR1, of --signal
        requeue_if_further "$before" "$(work_done "$folder/data")"
        exit 0
    fi
    ((status == 0)) || die "$stage: preprocessing has stopped; the same command goes on"
}

# train PREVIOUS: from the weights of the checkpoint PREVIOUS, if it names one.
train() {
    local script=$root/launch/pretrain_torchrun.sh
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        script=$root/launch/pretrain.slurm
    fi
    DATA_PATH=$folder/data SAVE_DIR=$folder/checkpoint PRETRAINED=$1 \
        MULTITURN_END_MARK=$folder/checkpoint/finished \
        TRAIN_EPOCHS=$epochs GLOBAL_BATCH_SIZE=$global_batch_size LEARNING_RATE=$learning_rate \
        MIN_LEARNING_RATE=$(awk -v rate="$learning_rate" 'BEGIN { printf "%g", rate / 10 }') \
        run_child "$script" ${train_flags[@]+"${train_flags[@]}"}
}

# train_stage PREVIOUS ORIGIN: ORIGIN tells PREVIOUS from others that have lain in its place.
train_stage() {
    check_same "$folder/origin" "begins with: $2"
    keep "$folder/origin" "begins with: $2"
    if [[ -e $folder/finished ]]; then
        say "== $stage: $(cat "$folder/finished")"
        return
    fi
    say "== $stage: training"
    rm -f "$folder/checkpoint/finished"
    train "$1" || die "$stage: training has failed; the same command goes on"
    if [[ ! -e $folder/checkpoint/finished ]]; then
        # launch/pretrain.slurm has queued the job again.
        [[ -z ${SLURM_JOB_ID:-} ]] || exit 0
        die "$stage: training was stopped before its end; the same command goes on"
    fi
    keep "$folder/finished" "finished at iteration $(cat \
        "$folder/checkpoint/latest_checkpointed_iteration.txt"), $(date -u +%Y-%m-%dT%H:%M:%S.%NZ)"
}

print_commands() {
    local file previous=${PRETRAINED:-}
    for file in "${stages[@]}"; do
        load_stage "$file"
        printf '%q ' "${preprocess[@]}"
        printf '\n'
        train "$previous"
        previous=$folder/checkpoint
    done
}

# One function, which bash has read whole when it starts: the file may be edited meanwhile.
main() {
    local file previous=${PRETRAINED:-} origin=${PRETRAINED:-random weights}
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        print_commands
        exit 0
    fi
    [[ -n ${CONTAINER_IMAGE:-} ]] || require_torch "$python"
    mkdir -p "$WORK_DIR" || die "WORK_DIR=$WORK_DIR: cannot be made; name a folder that you can write"
    # Kept by every process that is started from here, so also where this script alone was killed.
    exec 9>"$WORK_DIR/lock"
    flock --nonblock 9 || die "another run is at work in $WORK_DIR; wait for it, or end its processes"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

    # What is wrong with a later stage shows before the first is trained.
    for file in "${stages[@]}"; do
        load_stage "$file"
        check_stage
    done
    for file in "${stages[@]}"; do
        load_stage "$file"
        make_dataset
    done
    if [[ ${PREPROCESS_ONLY:-0} == 1 ]]; then
        exit 0
    fi
    for file in "${stages[@]}"; do
        load_stage "$file"
        train_stage "$previous" "$origin"
        previous=$folder/checkpoint
        origin="$stage, $(cat "$folder/finished")"
    done
    say "== all stages are finished; the last checkpoint is in $previous"
    exit 0
}

main
