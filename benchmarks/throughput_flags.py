"""The flags of `train_throughput.py`, and the flags of Megatron's that a variant trains with."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from throughput_data import TOKENIZER_TYPE, Datasets
from throughput_table import VARIANTS

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.windows import LONG_SESSION_POLICIES

_MIN_WARMUP_STEPS = 2  # in the second one a run waits for another to have imported everything


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model in the manner of Llama; the sizes that differ."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    vocab_size: int


MODELS = {
    "0.3b": Model(
        num_layers=24, hidden_size=1024, ffn_hidden_size=1536, num_heads=16, vocab_size=50_304
    ),
    "1.3b": Model(
        num_layers=24, hidden_size=2048, ffn_hidden_size=4608, num_heads=16, vocab_size=50_304
    ),
    "tiny": Model(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, vocab_size=512),
}

_MODEL_FLAGS = (
    "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0"
)
_TRAINING_FLAGS = (
    "--lr 1e-4 --min-lr 1e-4 --lr-decay-style constant --clip-grad 1.0 --split 100,0,0 "
    "--eval-iters 0 --eval-interval 1000000 --log-interval 10 --no-one-logger "
    "--no-check-for-nan-in-loss-and-grad"
)
_DTYPE_FLAGS = {"bf16": ["--bf16"], "fp16": ["--fp16"], "fp32": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSizes:
    """The rows of the runs at one sequence length."""

    sequence_length: int
    micro_batch_size: int
    global_batch_size: int


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=description)
    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--lengths", metavar="{smile,sgd,FILE}", help="lengths file; the tokens are random"
    )
    source.add_argument("--data-path", metavar="PREFIX", help="a preprocessed dataset")
    source.add_argument(
        "--write-lengths", metavar="PREFIX", help="write the lengths of a dataset, and end"
    )
    data.add_argument(
        "--sessions", type=int, default=1000, help="at most so many are drawn from a PREFIX"
    )
    data.add_argument("--long-session", choices=LONG_SESSION_POLICIES, default="window")
    data.add_argument("--seed", type=int, default=1)

    runs = parser.add_argument_group("runs")
    runs.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    runs.add_argument("--megatron-script", metavar="PATH", help="pretrain_gpt.py of a checkout")
    runs.add_argument("--model", choices=MODELS, default="0.3b")
    runs.add_argument("--seq-length", type=int, nargs="+", default=[4096])
    runs.add_argument(
        "--micro-batch-size", type=int, nargs="+", default=[4], help="one, or one a --seq-length"
    )
    runs.add_argument(
        "--global-batch-size", type=int, nargs="+", default=[32], help="one, or one a --seq-length"
    )
    runs.add_argument("--steps", type=int, default=20, help="that are measured")
    runs.add_argument("--warmup-steps", type=int, default=5)
    runs.add_argument("--dtype", choices=_DTYPE_FLAGS, default="bf16")
    runs.add_argument(
        "--transformer-impl", choices=("local", "transformer_engine"), default="local"
    )
    runs.add_argument(
        "--packed-attention",
        help="passed on to the plugin; default: torch with --transformer-impl local, which is what "
        "stock rows get there, and the plugin's own choice otherwise",
    )
    runs.add_argument(
        "--own-fusions",
        action="store_true",
        help="let the plugin fuse the accumulation of gradients where Apex is missing; not for "
        "ratios with stock, which cannot",
    )
    runs.add_argument("--extra", default="", metavar='"FLAGS"', help="more of Megatron's flags")
    runs.add_argument("--timeout", type=float, default=900, help="seconds for one run")

    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="all numbers, of every step")
    output.add_argument("--log-folder", type=Path, help="where the logs of the runs are kept")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot be measured."""
    if args.warmup_steps < _MIN_WARMUP_STEPS or args.steps < 1:
        raise ConfigError(
            f"--warmup-steps {args.warmup_steps}, --steps {args.steps}: at least "
            f"{_MIN_WARMUP_STEPS} and 1 are needed"
        )
    if args.megatron_script is not None and not Path(args.megatron_script).is_file():
        raise ConfigError(
            f"--megatron-script {args.megatron_script}: no such file; name the pretrain_gpt.py of "
            "a checkout of Megatron-LM"
        )
    row_sizes(args)


def row_sizes(args: argparse.Namespace) -> list[RowSizes]:
    """One for each --seq-length; ConfigError where the batch sizes do not fit them."""
    lengths: list[int] = args.seq_length
    sizes = {}
    for flag in ("micro_batch_size", "global_batch_size"):
        given: list[int] = getattr(args, flag)
        if len(given) not in (1, len(lengths)):
            raise ConfigError(
                f"--{flag.replace('_', '-')} has {len(given)} values and --seq-length "
                f"{len(lengths)}; give one, or one for each"
            )
        sizes[flag] = given * (len(lengths) // len(given))
    return [
        RowSizes(sequence_length=length, micro_batch_size=micro, global_batch_size=whole)
        for length, micro, whole in zip(
            lengths, sizes["micro_batch_size"], sizes["global_batch_size"], strict=True
        )
    ]


def command_of(
    variant: str,
    args: argparse.Namespace,
    rows: RowSizes,
    datasets: Datasets,
    *,
    vocab_size: int,
    cache_folder: Path,
) -> list[str]:
    """[SCRIPT.py] and Megatron's flags for one run; all runs use the script's Megatron."""
    model = MODELS[args.model]
    command = [args.megatron_script] if args.megatron_script else []
    command += f"--num-layers {model.num_layers} --hidden-size {model.hidden_size}".split()
    command += f"--ffn-hidden-size {model.ffn_hidden_size}".split()
    command += f"--num-attention-heads {model.num_heads}".split()
    command += [*_MODEL_FLAGS.split(), *_TRAINING_FLAGS.split(), *_DTYPE_FLAGS[args.dtype]]
    command += ["--transformer-impl", args.transformer_impl]
    if args.transformer_impl == "local" and args.dtype == "bf16":
        command.append("--cross-entropy-loss-fusion")  # the plugin's own choice there; so for stock
    if variant == "stock" or not args.own_fusions:
        # Stock's needs Apex.
        command.append("--no-gradient-accumulation-fusion")
    command += ["--tokenizer-type", TOKENIZER_TYPE, "--vocab-size", str(vocab_size)]
    command += f"--seq-length {rows.sequence_length}".split()
    command += f"--max-position-embeddings {rows.sequence_length}".split()
    command += f"--micro-batch-size {rows.micro_batch_size}".split()
    command += f"--global-batch-size {rows.global_batch_size}".split()
    command += f"--train-iters {args.warmup_steps + args.steps} --seed {args.seed}".split()
    command += ["--data-cache-path", str(cache_folder)]
    command += _variant_flags(variant, args, datasets)
    return [*command, *shlex.split(args.extra)]


def _variant_flags(variant: str, args: argparse.Namespace, datasets: Datasets) -> Sequence[str]:
    if variant == "stock":
        flags = ["--dataset-provider", "megatron", "--data-path", datasets.stock]
        flags += ["--no-create-attention-mask-in-dataloader"]
        if args.transformer_impl == "local":
            flags += ["--spec", "whole_row_attention", "whole_row_layer_spec"]
            flags += "--no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion".split()
        return flags
    provider = "multiturn" if variant == "packed" else "padded_rows:one_piece_a_row"
    prefix = datasets.split if variant == "split" else datasets.sessions
    flags = ["--dataset-provider", provider, "--data-path", prefix]
    flags += ["--long-session", args.long_session]
    kernels = args.packed_attention
    if kernels is None and args.transformer_impl == "local":
        kernels = "torch"
    return [*flags, "--packed-attention", kernels] if kernels else flags
