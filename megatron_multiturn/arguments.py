"""The flags of this plugin, what they set in Megatron's arguments, and what is refused.

A refused combination is one under which Megatron would train without an error, but with
another objective than the one asked for, or with pieces that see each other.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.samples import LOSS_AVERAGES
from megatron_multiturn.windows import LONG_SESSION_POLICIES

_EVAL_INTERVAL = 1000

PACKED_LAYER_SPEC = ["megatron_multiturn.attention", "packed_layer_spec"]


def add_multiturn_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags to Megatron's parser; returns the parser, as Megatron expects."""
    group = parser.add_argument_group(title="multi-turn sessions")
    group.add_argument(
        "--dataset-provider",
        default="multiturn",
        metavar="{multiturn,megatron,MODULE:FUNCTION}",
        help="multiturn: packed sessions and the plugin's loss (default). megatron: the script's "
        "own datasets and loss, untouched. MODULE:FUNCTION: a provider with the signature of "
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
    return parser


def prepare_args(args: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """Fit parsed arguments to the plugin and to the machine, in place.

    Must run right before Megatron's own validation, when the arguments of a checkpoint
    (--use-checkpoint-args) have taken their places. Returns a line for each thing that was changed,
    to be shown to the user. Raises ConfigError for what cannot be trained truthfully.
    """
    notices = _fit_to_machine(args, on_cpu=on_cpu)
    if args.eval_interval is None:
        # Megatron divides by it, evaluation or not.
        args.eval_interval = _EVAL_INTERVAL
        notices.append(f"no --eval-interval: {_EVAL_INTERVAL:,} steps")
    if args.dataset_provider != "megatron":
        check_args(args)
        args.calculate_per_token_loss = True
        args.create_attention_mask_in_dataloader = False
        args.spec = PACKED_LAYER_SPEC
    return notices


@dataclass(frozen=True, slots=True)
class Refusal:
    """A setting under which the objective or the isolation of pieces would be wrong."""

    setting: str
    applies: Callable[[argparse.Namespace], object]
    reason: str
    remedy: str


REFUSALS = (
    Refusal(
        "--sft",
        lambda a: a.sft,
        "Megatron's SFT mode brings its own rows and makes evaluation a mean of means",
        "remove it; this plugin replaces it",
    ),
    Refusal(
        "--spec",
        lambda a: a.spec not in (None, PACKED_LAYER_SPEC),
        "only the plugin's own layer spec is known to keep the pieces of a row apart",
        "remove it, or train with --dataset-provider megatron",
    ),
    Refusal(
        "--attention-dropout above 0",
        lambda a: a.attention_dropout > 0,
        "the variable-length attention kernel has no dropout (Megatron's default is 0.1)",
        "pass --attention-dropout 0",
    ),
    Refusal(
        "--context-parallel-size above 1",
        lambda a: a.context_parallel_size > 1 or a.hybrid_context_parallel,
        "rows are not cut over context parallel ranks yet",
        "use tensor or pipeline parallelism",
    ),
    Refusal(
        "--sequence-parallel without Transformer Engine",
        lambda a: a.sequence_parallel and a.transformer_impl != "transformer_engine",
        "torch's norm has no sequence parallel gradient",
        "install Transformer Engine or remove the flag",
    ),
    Refusal(
        "mixture-of-experts load balancing",
        lambda a: a.num_experts and (_balances_experts(a) or a.moe_z_loss_coeff),
        "auxiliary losses are scaled for a loss divided by tokens, and routing by sinkhorn or "
        "quantiles depends on the other pieces of the micro-batch",
        "pass --moe-router-load-balancing-type none and no --moe-z-loss-coeff",
    ),
    Refusal(
        "--moe-expert-capacity-factor",
        lambda a: a.num_experts and a.moe_expert_capacity_factor is not None,
        "which tokens are dropped depends on the other pieces of the micro-batch",
        "remove it",
    ),
    Refusal(
        "--mtp-num-layers",
        lambda a: a.mtp_num_layers,
        "multi-token prediction would look across the pieces of a row",
        "remove it",
    ),
    Refusal(
        "--multi-latent-attention",
        lambda a: a.multi_latent_attention,
        "packed attention wants keys and values of one head size",
        "use --group-query-attention",
    ),
    Refusal(
        "--window-size",
        lambda a: a.window_size is not None,
        "packed attention has no sliding window yet",
        "remove it",
    ),
    Refusal(
        "--softmax-type other than vanilla",
        lambda a: a.softmax_type != "vanilla",
        "packed attention has no attention sink",
        "pass --softmax-type vanilla",
    ),
    Refusal(
        "another model than GPT",
        lambda a: (
            a.experimental_attention_variant
            or a.hybrid_layer_pattern
            or a.heterogeneous_layers_config_path
            or a.heterogeneous_layers_config_encoded_json
        ),
        "only layers of softmax attention keep the pieces of a row apart",
        "remove the experimental, hybrid or heterogeneous flags",
    ),
    Refusal(
        "--attention-backend local",
        lambda a: "local" in str(a.attention_backend),
        "it puts Megatron's own attention back, which sees across pieces",
        "remove it",
    ),
    Refusal(
        "--yaml-cfg",
        lambda a: a.yaml_cfg is not None,
        "a YAML configuration bypasses these checks",
        "pass flags",
    ),
    Refusal(
        "fully sharded data parallelism",
        lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2,
        "its gradients were never checked against the turn mean",
        "use --use-distributed-optimizer",
    ),
    Refusal(
        "--ddp-average-in-collective",
        lambda a: a.ddp_average_in_collective,
        "it averages over data parallel ranks, which the turn mean must not",
        "remove it",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        lambda a: a.overlap_moe_expert_parallel_comm,
        "its schedule bypasses the piece boundaries",
        "remove it",
    ),
    Refusal(
        "--cuda-graph-impl",
        lambda a: a.cuda_graph_impl not in (None, "none"),
        "a captured graph would replay the first batch's piece boundaries",
        "remove it",
    ),
    Refusal(
        "--dataloader-type other than single",
        lambda a: a.dataloader_type not in (None, "single"),
        "each global batch must be the same rows on any cluster shape; the plan is shuffled",
        "remove it",
    ),
    Refusal(
        "--full-validation",
        lambda a: a.full_validation,
        "Megatron deals its rows out one a rank and repeats some, so the loss would depend on the "
        "number of ranks",
        "pass --eval-iters with enough steps for the validation rows",
    ),
    Refusal(
        "--step-batch-size-schedule",
        lambda a: a.step_batch_size_schedule is not None,
        "the largest global batch, which the divisor must hold, is not known from it",
        "pass --global-batch-size",
    ),
    Refusal(
        "--fp16 with --loss-scale under a --loss-average other than turn or token",
        lambda a: a.fp16 and a.loss_scale and a.loss_average not in ("turn", "token"),
        "the loss is counted in a fixed unit, which a static scale would take beyond fp16",
        "remove --loss-scale, so that Megatron finds the scale, or train in bf16",
    ),
    Refusal(
        "--mock-data or --fim-data",
        lambda a: a.mock_data or a.fim_data,
        "they are other datasets",
        "remove them, or train with --dataset-provider megatron",
    ),
    Refusal(
        "--reset-position-ids, --reset-attention-mask or --eod-mask-loss",
        lambda a: a.reset_position_ids or a.reset_attention_mask or a.eod_mask_loss,
        "they guess pieces and masks from token ids; here both come from the data",
        "remove them",
    ),
    Refusal(
        "--logits-load-dir",
        lambda a: a.logits_load_dir is not None,
        "distillation brings a loss of its own",
        "remove it, or train with --dataset-provider megatron",
    ),
)


def check_args(args: argparse.Namespace) -> None:
    """Raise ConfigError, naming every refused setting of `args` at once."""
    found = [refusal for refusal in REFUSALS if refusal.applies(args)]
    if found:
        heading = f"not with --dataset-provider {args.dataset_provider}:"
        lines = [f"  {r.setting}: {r.reason}; {r.remedy}" for r in found]
        raise ConfigError("\n".join([heading, *lines]))


def _balances_experts(args: argparse.Namespace) -> bool:
    kinds = args.moe_router_load_balancing_type
    return any(kind != "none" for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _fit_to_machine(args: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """Turn off what is not installed, and on a machine without a GPU what needs one."""
    notices = []
    # The package registries hold an unrelated "apex"; NVIDIA's has these kernels.
    has_te = not on_cpu and _has_module("transformer_engine")
    has_apex = not on_cpu and _has_module("fused_weight_gradient_mlp_cuda")
    if args.transformer_impl == "transformer_engine" and not has_te:
        args.transformer_impl = "local"
        notices.append("no Transformer Engine: --transformer-impl local")
    if args.transformer_impl == "local":
        args.no_persist_layer_norm = True
        args.apply_rope_fusion = False
        args.masked_softmax_fusion = False
    if args.gradient_accumulation_fusion and not has_apex:
        args.gradient_accumulation_fusion = False
        notices.append("no Apex: --no-gradient-accumulation-fusion")
    if on_cpu:
        args.distributed_backend = "gloo"
        args.use_cpu_initialization = True
        notices.append("NO GPU: this run is on the CPU (gloo); it is for tests and dry runs")
    return notices
