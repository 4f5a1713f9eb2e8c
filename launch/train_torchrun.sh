#!/usr/bin/env bash
# Trains a GPT on preprocessed sessions with torchrun, on one node or, started on each, on many.
#
#   DATA_PATH=PREFIX TOKENIZER_MODEL=FILE SAVE_DIR=FOLDER ./launch/train_torchrun.sh [more flags]
#
# DATA_PATH        one PREFIX, or "WEIGHT PREFIX WEIGHT PREFIX ...", as written by preprocessing
# TOKENIZER_MODEL  the tokenizer they were written with; TOKENIZER_TYPE if not SentencePiece
# SAVE_DIR         checkpoints and TensorBoard logs; a run goes on from the latest one there
# MEGATRON_PATH    a Megatron-LM checkout: its pretrain_gpt.py is run; without it, the installed
#                  megatron-core
# DRY_RUN=1        print the command and stop
# TRAIN_ITERS      how long to train, 10000 by default; or TRAIN_EPOCHS
#
# The size of the model and of the run: the variables below. Flags given behind the script come
# last, so they win. On several nodes set torchrun's NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT; launch/train_slurm.sh does that.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

: "${DATA_PATH:?set it to the PREFIX of a preprocessed dataset}"
: "${TOKENIZER_MODEL:?set it to the tokenizer that the dataset was written with}"
: "${SAVE_DIR:?set it to a folder for checkpoints}"
seq_length=${SEQ_LENGTH:-4096}
length=(--train-iters "${TRAIN_ITERS:-10000}")
# A flag behind the script may say it in another way.
if [[ " $* " =~ " --train-epochs"[\ =]|" --train-samples"[\ =] ]]; then
    length=()
elif [[ -n ${TRAIN_EPOCHS:-} ]]; then
    length=(--train-epochs "$TRAIN_EPOCHS")
fi

count_gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; }

gpus=$(count_gpus)
nnodes=${NNODES:-1}
nproc_per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

python=${MULTITURN_PYTHON:-}
if [[ -z $python && -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
fi
launcher=("${python:-python3}" -m torch.distributed.run --nproc-per-node "$nproc_per_node")
if ((nnodes > 1)); then
    launcher+=(
        --nnodes "$nnodes"
        --node-rank "${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK}}"
        --master-addr "${MASTER_ADDR:?set it to the name of the first node}"
        --master-port "${MASTER_PORT:-29500}"
    )
else
    launcher+=(--standalone)
fi

entry=(-m megatron_multiturn)
if [[ -n ${MEGATRON_PATH:-} ]]; then
    entry+=("$MEGATRON_PATH/pretrain_gpt.py")
fi

model=(
    --num-layers "${NUM_LAYERS:-24}"
    --hidden-size "${HIDDEN_SIZE:-2048}"
    --num-attention-heads "${NUM_ATTENTION_HEADS:-16}"
    --seq-length "$seq_length"
    --max-position-embeddings "$seq_length"
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)

read -r -a data_path <<<"$DATA_PATH"
data=(
    --dataset-provider multiturn
    --loss-average "${LOSS_AVERAGE:-turn}"
    --data-path "${data_path[@]}"
    --data-cache-path "$SAVE_DIR/cache"
    --split "${SPLIT:-98,2,0}"
    --tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}"
    --tokenizer-model "$TOKENIZER_MODEL"
)

parallel=(
    --tensor-model-parallel-size "${TENSOR_PARALLEL:-1}"
    --pipeline-model-parallel-size "${PIPELINE_PARALLEL:-1}"
    --context-parallel-size "${CONTEXT_PARALLEL:-1}"
)
if ((${TENSOR_PARALLEL:-1} > 1)); then
    parallel+=(--sequence-parallel)
fi
# Without Transformer Engine or Apex, Megatron 0.19 cannot load what its distributed optimizer
# has saved, and a run could not go on.
has_module() {
    "${launcher[0]}" -c \
        "import importlib.util as u; raise SystemExit(u.find_spec('$1') is None)" 2>/dev/null
}
if has_module transformer_engine; then
    parallel+=(--use-distributed-optimizer)
fi

optimizer=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-128}"
    "${length[@]}"
    --lr "${LEARNING_RATE:-3e-4}"
    --min-lr "${MIN_LEARNING_RATE:-3e-5}"
    --lr-decay-style cosine
    --lr-warmup-fraction "${WARMUP_FRACTION:-0.01}"
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)

logging=(
    --log-interval "${LOG_INTERVAL:-10}"
    --eval-interval "${EVAL_INTERVAL:-500}"
    --eval-iters "${EVAL_ITERS:-20}"
    --tensorboard-dir "$SAVE_DIR/tensorboard"
)

checkpoint=(
    --save "$SAVE_DIR"
    --load "$SAVE_DIR"
    --save-interval "${SAVE_INTERVAL:-500}"
)
if [[ -n ${EXIT_MINUTES:-} ]]; then
    checkpoint+=(--exit-duration-in-mins "$EXIT_MINUTES")
fi

if ((gpus > 0)); then
    optimizer+=(--bf16)
    logging+=(--log-throughput)
    parallel+=(--overlap-grad-reduce)
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
fi

command=(
    "${launcher[@]}" "${entry[@]}"
    "${model[@]}" "${data[@]}" "${parallel[@]}" "${optimizer[@]}" "${logging[@]}"
    "${checkpoint[@]}" "$@"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
    for word in "${command[@]}"; do
        case $word in
            --*) printf '\\\n    %q ' "$word" ;;
            *) printf '%q ' "$word" ;;
        esac
    done
    printf '\n'
    exit 0
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${command[@]}"
