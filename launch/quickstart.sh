#!/usr/bin/env bash
# From a fresh clone to a trained checkpoint, on two GPUs, one, or none.
#
#   ./launch/quickstart.sh                     a demo corpus that is made on the spot
#   ./launch/quickstart.sh my_sessions.jsonl   your own sessions, one or several files
#
# Makes .venv and installs on the first run, trains a SentencePiece tokenizer, preprocesses,
# shows a packed row, trains a small GPT through Megatron, evaluates and saves it.
#
# Variables, with their defaults:
#   QUICKSTART_DIR=quickstart   where everything is written; a second run replaces the first's
#   TEMPLATE=firefly            or chatml
#   LOSS_AVERAGE=turn           what the loss is the mean of
#   SEQ_LENGTH                  256 for the demo corpus, 1024 for your own sessions
#   TRAIN_ITERS                 600 for the demo corpus, 300 for your own sessions
#   MULTITURN_PYTHON            an interpreter to use as it is, in place of .venv
set -euo pipefail
export LC_ALL=C.UTF-8 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
for file in "$@"; do
    [[ -f $file && -r $file ]] || die "$file: no such file, or not readable; name a JSONL file of sessions."
done

work=${QUICKSTART_DIR:-$root/quickstart}
if [[ -d $work && ! -e $work/.quickstart && -n $(ls -A "$work") ]]; then
    die "$work holds other files; name a new or empty folder in QUICKSTART_DIR."
fi
logs=$work/logs
checkpoint=$work/checkpoint
plans=$work/plans
tokenizer=$work/tokenizer
data=$work/sessions
mkdir -p "$work"
touch "$work/.quickstart"
mkdir -p "$logs"

ensure_environment "$root" base
python=$MULTITURN_PYTHON
begin=$SECONDS

heading() { printf '\n== %s\n' "$*"; }

# explain_failure LOG STATUS: ends the script with the end of the log, without what torchrun says
# of processes that have failed.
explain_failure() {
    say ""
    say "failed with exit code $2; the end of $1:"
    sed '/ failed (exitcode: /,$d' "$1" | tail -n 25 >&2
    exit "$2"
}

# stage NAME COMMAND...: shows what the command prints; its messages go to the stage's log.
stage() {
    local log=$logs/$1.log status=0
    shift
    "$@" </dev/null 2>"$log" | sed 's/^/  /' || status=$?
    ((status == 0)) || explain_failure "$log" "$status"
}

if (($#)); then
    inputs=("$@")
    seq_length=${SEQ_LENGTH:-1024} train_iters=${TRAIN_ITERS:-300} global_batch=4
else
    inputs=("$work/demo.jsonl")
    seq_length=${SEQ_LENGTH:-256} train_iters=${TRAIN_ITERS:-600} global_batch=8
    heading "demo corpus"
    stage corpus "$python" -m megatron_multiturn.demo corpus --output "${inputs[0]}"
fi

tokenizer_flags=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer.model")

heading "tokenizer"
stage tokenizer "$python" -m megatron_multiturn.demo tokenizer \
    --input "${inputs[@]}" --output-prefix "$tokenizer"

heading "preprocessing"
stage preprocess "$python" -m megatron_multiturn.preprocess --input "${inputs[@]}" \
    --output-prefix "$data" --template "${TEMPLATE:-firefly}" "${tokenizer_flags[@]}" \
    --on-bad-session skip --overwrite

heading "a packed row: context dim, each turn's targets in a colour of their own"
color=never
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    color=always
fi
stage inspect "$python" -m megatron_multiturn.inspection "$data" "${tokenizer_flags[@]}" \
    --seq-length "$seq_length" --loss-average "${LOSS_AVERAGE:-turn}" --color "$color"

heading "training"
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)
if ((gpus > 0)); then
    ranks=$((gpus > 1 ? 2 : 1))
    precision=(--bf16)
    echo "  on $ranks GPU(s)"
else
    ranks=2
    precision=()
    # Processes of one machine; its host name need not resolve.
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
    echo "  no GPU: 2 processes on the CPU"
fi

# Some sessions are held back for evaluation, if there are enough to spare any.
num_sessions=$("$python" -c \
    'import json, sys; print(json.load(open(sys.argv[1]))["counts"]["sessions"])' "$data.json")
if ((num_sessions >= 40)); then
    evaluation=(--split "95,5,0" --eval-iters 8)
else
    evaluation=(--split "100,0,0" --eval-iters 0)
    echo "  $num_sessions sessions are too few to hold any back: no evaluation"
fi

# shellcheck source=launch/models/tiny.sh
SEQ_LENGTH=$seq_length source "$root/launch/models/tiny.sh"
model+=(--seq-length "$seq_length" --max-position-embeddings "$seq_length")
data_flags=(
    --dataset-provider multiturn
    --loss-average "${LOSS_AVERAGE:-turn}"
    --data-path "$data"
    --data-cache-path "$plans"
    "${tokenizer_flags[@]}"
)
optimizer=(
    --micro-batch-size "$((global_batch / 2))"
    --global-batch-size "$global_batch"
    --train-iters "$train_iters"
    --lr 1e-2
    --min-lr 1e-4
    --lr-decay-style cosine
    --lr-warmup-fraction 0.05
    --adam-beta2 0.98
    --clip-grad 1.0
)
report=(
    --log-interval "$((train_iters >= 20 ? train_iters / 20 : 1))"
    --save "$checkpoint"
    --save-interval "$train_iters"
    --eval-interval "$((train_iters + 1))" # never reached: evaluates once, at the end
)
# Only now, when the data are good, does the last run's result go.
rm -rf "$checkpoint" "$plans"
train() {
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
        -m megatron_multiturn "${model[@]}" "${data_flags[@]}" "${optimizer[@]}" \
        ${precision[@]+"${precision[@]}"} "${evaluation[@]}" "${report[@]}" </dev/null 2>&1
}
status=0
train | tee "$logs/train.log" | "$python" -m megatron_multiturn.demo progress || status=$?
((status == 0)) || explain_failure "$logs/train.log" "$status"

heading "summary"
stage summary "$python" -m megatron_multiturn.demo summary --log "$logs/train.log" \
    --data-prefix "$data" --cache "$plans"
if [[ -s $data.rejected.jsonl ]]; then
    printf '  left out               %d bad sessions, see %s\n' \
        "$(wc -l <"$data.rejected.jsonl")" "$data.rejected.jsonl"
fi
printf '  checkpoint             %s\n' "$checkpoint"
printf '  time                   %d s, installation aside; logs in %s\n' \
    $((SECONDS - begin)) "$logs"
