#!/usr/bin/env bash
# Trains a GPT on preprocessed sessions with torchrun, on one node or, started on each, on many.
#
#   DATA_PATH=PREFIX TOKENIZER_MODEL=FILE SAVE_DIR=FOLDER ./launch/pretrain_torchrun.sh [more flags]
#
# DATA_PATH        one PREFIX, or "WEIGHT PREFIX WEIGHT PREFIX ...", as written by preprocessing
# TOKENIZER_MODEL  the tokenizer they were written with; TOKENIZER_TYPE if not SentencePiece
# SAVE_DIR         checkpoints and TensorBoard logs; a run goes on from the latest one there
# MODEL            tiny, gpt-0.3b, gpt-1.3b (default), qwen2.5-7b, llama3-8b: launch/models/MODEL.sh;
#                  or the path of a file like these
# PRETRAINED       a checkpoint whose weights a run begins with that has none in SAVE_DIR yet
# TRAIN_ITERS      how long to train, 10000 by default; or TRAIN_EPOCHS
# MEGATRON_PATH    a Megatron-LM checkout: its pretrain_gpt.py is run; without it, the installed
#                  megatron-core
# EXIT_MINUTES     save and end after so many minutes
# EXIT_SIGNAL      save and end when the ranks get this signal, SIGUSR1 for instance
# DRY_RUN=1        print the command and stop; for the GPUs of this machine, so run it on one like
#                  those that will train, or set NPROC_PER_NODE
#
# The size of the run: the variables below. Flags given behind the script come last, so they win.
# Every launch is noted in SAVE_DIR/launches: the command, what of the environment counts, versions.
#
# Several nodes: the same on each, with
#   NNODES, MASTER_ADDR (the first node), NODE_RANK (0 on the first node, 1, ...)
# and MASTER_PORT if 29500 is taken. Without NODE_RANK they find their ranks themselves (c10d
# rendezvous; RDZV_ID tells runs on the same port apart). launch/pretrain.slurm sets all of it.
#
# A copy of this script works anywhere, with MULTITURN_ROOT naming the checkout of this project.
set -euo pipefail
root=${MULTITURN_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [[ ! -f $root/launch/environment.sh ]]; then
    echo "$root is not a checkout of megatron-multiturn; set MULTITURN_ROOT to one" >&2
    exit 1
fi
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
: "${DATA_PATH:?set it to the PREFIX of a preprocessed dataset}"
: "${TOKENIZER_MODEL:?set it to the tokenizer that the dataset was written with}"
: "${SAVE_DIR:?set it to a folder for checkpoints}"

MODEL=${MODEL:-gpt-1.3b}
preset=$MODEL
[[ $preset == */* ]] || preset=$root/launch/models/$preset.sh
if [[ ! -f $preset ]]; then
    presets=("$root"/launch/models/*.sh)
    presets=("${presets[@]##*/}")
    die "MODEL=$MODEL: there is no $preset; the presets are ${presets[*]%.sh}"
fi
# shellcheck source=launch/models/tiny.sh
source "$preset"
model+=(--seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH")

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

python=$(installed_python "$root")
launcher=("$python" -m torch.distributed.run --nproc-per-node "$nproc_per_node")
if ((nnodes == 1)); then
    launcher+=(--standalone)
else
    : "${MASTER_ADDR:?set it to the name of the first node}"
    launcher+=(--nnodes "$nnodes")
    if [[ -n ${NODE_RANK:-} ]]; then
        launcher+=(
            --node-rank "$NODE_RANK"
            --master-addr "$MASTER_ADDR"
            --master-port "${MASTER_PORT:-29500}"
        )
    else
        launcher+=(
            --rdzv-backend c10d
            --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
            --rdzv-id "${RDZV_ID:-multiturn}"
        )
    fi
fi

entry=(-m megatron_multiturn)
if [[ -n ${MEGATRON_PATH:-} ]]; then
    entry+=("$MEGATRON_PATH/pretrain_gpt.py")
fi

read -r -a data_path <<<"$DATA_PATH"
data=(
    --dataset-provider multiturn
    --loss-average "${LOSS_AVERAGE:-turn}"
    --data-path "${data_path[@]}"
    --data-cache-path "${DATA_CACHE_DIR:-$SAVE_DIR/cache}"
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
if has_module "$python" transformer_engine; then
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
    --override-opt-param-scheduler # a run may be made longer; the flags here say how, not SAVE_DIR
)
if [[ -n ${PRETRAINED:-} ]]; then
    # Megatron looks here when there is nothing in --load, and takes the weights alone.
    checkpoint+=(--pretrained-checkpoint "$PRETRAINED")
fi
if [[ -n ${EXIT_MINUTES:-} ]]; then
    checkpoint+=(--exit-duration-in-mins "$EXIT_MINUTES")
fi
if [[ -n ${EXIT_SIGNAL:-} ]]; then
    EXIT_SIGNAL=SIG${EXIT_SIGNAL#SIG}
    checkpoint+=(--exit-signal-handler --exit-signal "$EXIT_SIGNAL")
    if [[ $EXIT_SIGNAL != SIGTERM ]]; then
        # It comes to torchrun and to ranks that are still starting too, and would end them. What is
        # ignored here they ignore, until Megatron listens. (torchrun ends its ranks by SIGTERM.)
        trap '' "$EXIT_SIGNAL"
    fi
fi

if ((gpus > 0)); then
    optimizer+=(--bf16)
    logging+=(--log-throughput)
    parallel+=(--overlap-grad-reduce)
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
elif ((nnodes == 1)); then
    # Processes of one machine; its host name need not resolve.
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi

command=(
    "${launcher[@]}" "${entry[@]}"
    "${model[@]}" "${data[@]}" "${parallel[@]}" "${optimizer[@]}" "${logging[@]}"
    "${checkpoint[@]}" "$@"
)

print_command() {
    local word
    for word in "${command[@]}"; do
        case $word in
            --*) printf '\\\n    %q ' "$word" ;;
            *) printf '%q ' "$word" ;;
        esac
    done
    printf '\n'
}

# print_versions: as comments; a package that is not there is left out.
print_versions() {
    local folder
    "$python" - "${MEGATRON_PATH:-}" <<'END' || true
import importlib.metadata as metadata
import pathlib
import platform
import runpy
import sys

import megatron_multiturn

print(f"# python {platform.python_version()}")
print(f"# megatron-multiturn {megatron_multiturn.__version__}")
for name in ("torch", "megatron-core", "transformer-engine", "flash-attn-4", "numpy"):
    try:
        print(f"# {name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
about = pathlib.Path(sys.argv[1], "megatron/core/package_info.py")
if about.is_file():
    print(f"# Megatron of MEGATRON_PATH {runpy.run_path(str(about))['__version__']}")
END
    for folder in "$root" ${MEGATRON_PATH:+"$MEGATRON_PATH"}; do
        printf '# git revision of %s %s\n' "$folder" \
            "$(git -C "$folder" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)"
    done
}

# print_exports PATTERN: of the environment, in the shell's words.
print_exports() {
    local name
    while read -r name; do
        printf 'export %s=%q\n' "$name" "${!name}"
    done < <(compgen -e | grep -E "^($1)" | sort)
}

# print_launch: a script that does the same again. Of the environment, names that say how a run
# goes; nothing that may be secret.
print_launch() {
    printf '# launched %s on %s, node %s of %s\n' \
        "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(hostname)" "${NODE_RANK:-0}" "$nnodes"
    print_versions
    print_exports 'SLURM_(JOB_|NNODES|NODEID|RESTART|GPUS|CPUS)' | sed 's/^export /# /'
    printf 'cd %q\n' "$PWD"
    print_exports \
        'CUDA_|GLOO_|NCCL_|NVTE_|OMP_|PYTORCH_|TORCH|UCX_|(PYTHONPATH|MULTITURN_PYTHON|MULTITURN_ROOT)$'
    print_command
}

# note_launch: in a file of its own, on the first node; a run that goes on adds another.
note_launch() {
    local folder=$SAVE_DIR/launches stem file number=1
    mkdir -p "$folder" || die "SAVE_DIR=$SAVE_DIR: cannot be made; name a folder that you can write"
    stem=$folder/$(date -u +%Y%m%dT%H%M%SZ)
    file=$stem.sh
    until (set -o noclobber && : >"$file") 2>/dev/null; do
        [[ -e $file ]] || die "$file: cannot be written; name another SAVE_DIR"
        file=$stem-$((++number)).sh
    done
    print_launch >"$file"
}

if [[ ${DRY_RUN:-0} == 1 ]]; then
    print_command
    exit 0
fi
if [[ -n ${PRETRAINED:-} && $PRETRAINED != *://* && ! -d $PRETRAINED ]]; then
    die "PRETRAINED=$PRETRAINED: no such folder; name a checkpoint, as seen from $PWD"
fi
if [[ $TOKENIZER_MODEL == *.model && ! -e $TOKENIZER_MODEL ]]; then
    die "TOKENIZER_MODEL=$TOKENIZER_MODEL: no such file on $(hostname), as seen from $PWD"
fi
require_torch "$python"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if ((${NODE_RANK:-0} == 0)); then
    note_launch
fi
exec "${command[@]}"
