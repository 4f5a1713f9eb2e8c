"""The flags of this plugin, and what they set in Megatron's arguments."""

import argparse
import importlib.util

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.given_files import check_given_files
from megatron_multiturn.provider_names import PROVIDERS_GROUP, registered_providers
from megatron_multiturn.refusals import check_args
from megatron_multiturn.samples import LOSS_AVERAGES
from megatron_multiturn.windows import LONG_SESSION_POLICIES

_EVAL_INTERVAL = 1000

PACKED_ATTENTION = ("auto", "te", "torch", "fa4")


def add_multiturn_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags to Megatron's parser; returns the parser, as Megatron expects."""
    group = parser.add_argument_group(title="multi-turn sessions")
    registered = [point.name for point in registered_providers()]
    group.add_argument(
        "--dataset-provider",
        default="multiturn",
        metavar=f"{{{','.join(['multiturn', 'megatron', *registered, 'MODULE:FUNCTION'])}}}",
        help="multiturn: packed sessions and the plugin's loss (default). megatron: the script's "
        "own datasets and loss, untouched. MODULE:FUNCTION, or the name of an entry point in the "
        f"group {PROVIDERS_GROUP}: a provider with the signature of "
        "train_valid_test_datasets_provider whose rows keep the sample contract.",
    )
    group.add_argument(
        "--loss-average",
        choices=LOSS_AVERAGES,
        default="turn",
        help="what the loss is the mean of, over the global batch (default: turn)",
    )
    group.add_argument(
        "--long-session",
        choices=LONG_SESSION_POLICIES,
        default="window",
        help="a session longer than a row is cut between turns into windows (default), "
        "truncated after the last turn that fits, dropped, or an error",
    )
    group.add_argument(
        "--session-window",
        type=int,
        metavar="TOKENS",
        help="longest piece of a session; default: what fits a row",
    )
    group.add_argument(
        "--window-context",
        type=float,
        default=0.25,
        metavar="FRACTION",
        help="how much of a later window may repeat earlier messages as context (default: 0.25)",
    )
    group.add_argument(
        "--packed-attention",
        choices=PACKED_ATTENTION,
        default="auto",
        help="the kernels that keep pieces apart. torch: PyTorch's variable-length flash "
        "attention. te: Transformer Engine's, with its own context parallelism. auto: for each "
        "micro-batch the faster of these two (default). fa4: FlashAttention 4",
    )
    group.add_argument(
        "--no-balance-data-parallel",
        action="store_false",
        dest="balance_data_parallel",
        help="train on the rows in shuffled order, instead of one that evens the attention cost of "
        "data parallel ranks",
    )
    group.add_argument(
        "--train-epochs",
        type=float,
        metavar="F",
        help="train for so many epochs, or a fraction of one, in place of --train-iters",
    )
    group.add_argument(
        "--log-turn-index",
        type=int,
        default=0,
        metavar="N",
        help="log the loss of the 1st, 2nd, ... Nth turns of the sessions too (default: 0)",
    )
    return parser


def prepare_args(args: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """Fit parsed arguments to the plugin and to the machine, in place.

    Sets `piece_multiple`, of which every piece's positions must be a multiple, beside the flags.
    Must run right before Megatron's own validation, when the arguments of a checkpoint
    (--use-checkpoint-args) have taken their places. Returns a line for each thing that was changed,
    to be shown to the user. Raises ConfigError for what cannot be trained truthfully.
    """
    if args.dataset_provider == "megatron" and args.train_epochs is None and not on_cpu:
        return []  # the script as it was
    notices = _fit_to_machine(args, on_cpu=on_cpu)
    if args.eval_interval is None:
        # Megatron divides by it, evaluation or not.
        args.eval_interval = _EVAL_INTERVAL
        notices.append(f"no --eval-interval: {_EVAL_INTERVAL:,} steps")
    if args.dataset_provider != "megatron":
        notices += _fit_kernels(args, on_cpu=on_cpu)
        check_args(args)
        check_given_files(args)
        _require_kernels(args)
        # With its own context parallelism, Transformer Engine's ranks share every piece.
        shared = args.packed_attention == "te" and args.context_parallel_size > 1
        args.piece_multiple = 2 * args.context_parallel_size if shared else 1
        notices += _fit_evaluation(args)
        args.calculate_per_token_loss = True
        args.create_attention_mask_in_dataloader = False
    if args.train_epochs is not None:
        notices.append(_set_training_length(args))
    return notices


def _fit_kernels(args: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """Settle on kernels that run here, in place."""
    notices = []
    if on_cpu and args.packed_attention in ("te", "fa4"):
        notices.append(f"NO GPU: --packed-attention torch in place of {args.packed_attention}")
        if args.packed_attention == "te" and args.context_parallel_size > 1:
            notices.append("so pieces are not rounded up, and rows are packed otherwise")
        args.packed_attention = "torch"
    # Transformer Engine's attention has conditions of its own for these two.
    plain = not (args.deterministic_mode or args.apply_query_key_layer_scaling)
    te_runs = has_module("transformer_engine") and (args.bf16 or args.fp16) and plain
    if args.packed_attention == "auto" and (on_cpu or not te_runs):
        args.packed_attention = "torch"
    fusible = args.bf16 and not on_cpu and not args.deterministic_mode
    if args.transformer_impl == "local" and fusible and not args.cross_entropy_loss_fusion:
        # In bf16 the two give the same gradient; Megatron's fused one gives bf16 in any case.
        args.cross_entropy_loss_fusion = True
        notices.append("--cross-entropy-loss-fusion is turned on")
    return notices


def _require_kernels(args: argparse.Namespace) -> None:
    for kernels, module, name in (
        ("te", "transformer_engine", "Transformer Engine"),
        ("fa4", "flash_attn.cute", "FlashAttention 4"),
    ):
        if args.packed_attention == kernels and not has_module(module):
            raise ConfigError(
                f"--packed-attention {kernels} needs {name} ({module}), which is not installed; "
                "install it, or pass --packed-attention auto"
            )


def _fit_evaluation(args: argparse.Namespace) -> list[str]:
    """Evaluate on the same rows on any layout, where Megatron would take a layout's own number."""
    from megatron_multiturn.megatron_compat import scheduled_batch_sizes  # not for --help

    sizes = scheduled_batch_sizes(args)
    if not sizes or args.eval_global_batch_size is not None:
        return []
    args.eval_global_batch_size = max(sizes)
    return [f"no --eval-global-batch-size: {max(sizes):,}, the largest that is scheduled"]


def has_apex() -> bool:
    """Whether NVIDIA's Apex is installed; the registries hold an unrelated "apex"."""
    return has_module("fused_weight_gradient_mlp_cuda")


def has_module(name: str) -> bool:
    """Whether a module can be imported here."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of the package that should hold it
        return False


def _set_training_length(args: argparse.Namespace) -> str:
    """Turn --train-epochs into what Megatron knows, in place."""
    if args.dataset_provider != "multiturn":
        raise ConfigError(
            f"--train-epochs: --dataset-provider {args.dataset_provider} does not say how long an "
            "epoch is; pass --train-iters"
        )
    # Not for --help.
    from megatron_multiturn.epochs import set_training_length
    from megatron_multiturn.provider import batch_schedule, planning_config

    if args.data_path is not None and args.split is None:
        raise ConfigError("--train-epochs needs --split; pass --split 100,0,0 to train on all")
    if args.global_batch_size is None and not getattr(args, "step_batch_size_schedule", None):
        model_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        data_parallel_size = args.world_size // (model_size * args.context_parallel_size)
        args.global_batch_size = args.micro_batch_size * data_parallel_size
    return set_training_length(args, planning_config(args), batch_schedule(args))


def _fit_to_machine(args: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """Turn off what is not installed, and on a machine without a GPU what needs one."""
    notices = []
    has_te = not on_cpu and has_module("transformer_engine")
    if args.transformer_impl == "transformer_engine" and not has_te:
        args.transformer_impl = "local"
        notices.append("no Transformer Engine: --transformer-impl local")
    if args.transformer_impl == "local":
        args.no_persist_layer_norm = True
        args.apply_rope_fusion = False
        args.masked_softmax_fusion = False
    # Without Apex the runner has another way.
    other_way = not (args.use_megatron_fsdp or args.defer_embedding_wgrad_compute)
    fusible = not on_cpu and (has_apex() or other_way)
    if args.gradient_accumulation_fusion and not fusible:
        args.gradient_accumulation_fusion = False
        notices.append("no Apex: --no-gradient-accumulation-fusion")
    if on_cpu:
        args.distributed_backend = "gloo"
        args.use_cpu_initialization = True
        notices.append("NO GPU: this run is on the CPU (gloo); it is for tests and dry runs")
    return notices
