"""What is refused before the model is built: the setting, the reason and the remedy.

A refused setting is one under which Megatron would train something else than was asked for: with
another divisor, other rows, pieces that see each other, or a loss that it reports wrongly; or one
that the plugin cannot serve and that would fail only when training is under way.
"""

import argparse
from collections import defaultdict

from megatron_multiturn.attention_refusals import ATTENTION_REFUSALS
from megatron_multiturn.averages import MAX_DIVISOR_UNIT
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.refusal import OWN_LOSS, Flags, Refusal, as_set, cp_size, tp_size


def refused(args: argparse.Namespace) -> list[Refusal]:
    """The refusals that `args` meets, in the order of `REFUSALS`."""
    flags = Flags(args)
    return [refusal for refusal in REFUSALS if refusal.applies(flags)]


def check_args(args: argparse.Namespace) -> None:
    """Raise ConfigError, naming every refused setting of `args` at once."""
    found = refused(args)
    if found:
        values = defaultdict(lambda: None, vars(args))
        lines = ["not with --dataset-provider {dataset_provider}:"]
        lines += [f"  {r.setting}: {r.reason}; {r.remedy}" for r in found]
        raise ConfigError("\n".join(lines).format_map(values))


def _routes_by_micro_batch(a: Flags) -> bool:
    kinds = as_set(a.moe_router_load_balancing_type)
    return bool(a.num_experts and kinds & {"sinkhorn", "quantile_balancing"})


def _drops_tokens(a: Flags) -> bool:
    factor = a.moe_expert_capacity_factor
    return bool(a.num_experts) and factor is not None and factor >= 0  # below 0: no capacity


def _batch_would_shrink(a: Flags) -> bool:
    if not (a.decrease_batch_size_if_needed and a.global_batch_size and a.micro_batch_size):
        return False
    model_size = tp_size(a) * (a.pipeline_model_parallel_size or 1) * cp_size(a)
    rows_at_once = a.micro_batch_size * max(1, (a.world_size or 1) // model_size)
    return bool(a.global_batch_size % rows_at_once)


def _loss_scale_is_too_large(a: Flags) -> bool:
    if not a.fp16 or a.loss_average in (None, "turn", "token"):
        return False
    return bool(a.loss_scale) or (a.min_loss_scale or 0) > 1 / MAX_DIVISOR_UNIT


def _shards_otherwise(a: Flags) -> bool:
    hybrid = (a.num_distributed_optimizer_instances or 1) > 1
    v2 = a.megatron_fsdp_version == 2
    return bool(a.use_torch_fsdp2 or (a.use_megatron_fsdp and (hybrid or v2)))


def _evaluates_in_part(a: Flags) -> bool:
    return bool(a.eval_iters) and (a.tensor_parallel_num_weight_shards or 1) > tp_size(a)


REFUSALS = (
    # Other rows, and other losses than the mean over turns.
    Refusal(
        "--sft",
        lambda a: a.sft,
        "Megatron's SFT mode brings its own rows and makes evaluation a mean of means",
        "remove it; this plugin replaces it",
    ),
    Refusal(
        "--perform-rl-step, --modelopt-enabled, --export-kd-teacher-load or --logits-load-dir",
        lambda a: (
            a.perform_rl_step
            or a.modelopt_enabled
            or a.export_kd_teacher_load
            or a.logits_load_dir is not None
        ),
        "reinforcement learning, quantization and distillation bring layers or losses of their own",
        OWN_LOSS,
    ),
    Refusal(
        "--mock-data or --fim-data",
        lambda a: a.mock_data or a.fim_data,
        "they are other datasets",
        OWN_LOSS,
    ),
    Refusal(
        "--reset-position-ids, --reset-attention-mask or --eod-mask-loss",
        lambda a: a.reset_position_ids or a.reset_attention_mask or a.eod_mask_loss,
        "they guess pieces and masks from token ids; here both come from the data",
    ),
    Refusal(
        "--yaml-cfg",
        lambda a: a.yaml_cfg is not None,
        "a YAML configuration bypasses these checks",
        "pass flags",
    ),
    # The rows of a global batch, and the evaluation's.
    Refusal(
        "--dataloader-type other than single",
        lambda a: a.dataloader_type not in (None, "single"),
        "each global batch must be the same rows on any cluster shape; the plan is shuffled",
    ),
    Refusal(
        "--decrease-batch-size-if-needed with a batch that does not fit",
        _batch_would_shrink,
        "the {global_batch_size} rows of a batch would become fewer on this number of ranks",
        "pass a --global-batch-size that is a multiple of --micro-batch-size {micro_batch_size} "
        "times the data parallel ranks",
    ),
    Refusal(
        "--rampup-batch-size",
        lambda a: a.rampup_batch_size is not None,
        "Megatron ignores it since 0.18, and every batch would have the full size",
        "use --step-batch-size-schedule with --train-samples",
    ),
    Refusal(
        "--step-batch-size-schedule with --train-iters",
        lambda a: a.step_batch_size_schedule is not None and a.train_iters,
        "Megatron would read rows for steps of --micro-batch-size times the data parallel ranks",
        "pass --train-samples",
    ),
    Refusal(
        "--phase-transition-iterations",
        lambda a: a.phase_transition_iterations,
        "Megatron begins every phase at the first row again",
        "remove it; begin each phase as a run of its own, with --finetune",
    ),
    Refusal(
        "--iterations-to-skip with --context-parallel-size above 1",
        lambda a: a.iterations_to_skip and cp_size(a) > 1,
        "Megatron reads the rows that it skips by itself, and fails on the pieces in them",
        "remove it, or skip the iterations without context parallelism",
    ),
    Refusal(
        "--full-validation",
        lambda a: a.full_validation,
        "Megatron deals its rows out one a rank and repeats some, so the loss would depend on the "
        "number of ranks",
        "pass --eval-iters with enough steps for the validation rows",
    ),
    *ATTENTION_REFUSALS,
    # Mixtures of experts and multi-token prediction.
    Refusal(
        "--moe-router-load-balancing-type sinkhorn or quantile_balancing",
        _routes_by_micro_batch,
        "experts are balanced within a micro-batch, so the routing of a token depends on the other "
        "pieces in it",
        "use aux_loss, seq_aux_loss, global_aux_loss or none",
    ),
    Refusal(
        "--moe-expert-capacity-factor",
        _drops_tokens,
        "which tokens are dropped depends on the other pieces of the micro-batch",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        lambda a: a.overlap_moe_expert_parallel_comm,
        "its schedule takes the model apart, past the plugin's forward step",
    ),
    Refusal(
        "--mtp-num-layers with --context-parallel-size above 1, or --mtp-hsm",
        lambda a: a.mtp_num_layers and (cp_size(a) > 1 or a.mtp_hsm),
        "further tokens and hidden states would come from other ranks, or from other pieces",
        "use tensor, sequence or pipeline parallelism, and no --mtp-hsm",
    ),
    # Gradients that are not divided once, by the divisor of the global batch.
    Refusal(
        "fully sharded data parallelism other than --use-megatron-fsdp with one instance",
        _shards_otherwise,
        "PyTorch's does not divide gradients by what the loss counts, and hybrid sharding was seen "
        "to lose a part of them, also without this plugin",
        "use --use-megatron-fsdp without --num-distributed-optimizer-instances, or "
        "--use-distributed-optimizer",
    ),
    Refusal(
        "--ddp-average-in-collective",
        lambda a: a.ddp_average_in_collective,
        "it averages over data parallel ranks, which the turn mean must not",
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards above the tensor parallel size",
        _evaluates_in_part,
        "Megatron 0.19 reports the evaluation loss of a part of the rows",
        "remove it, or pass --eval-iters 0",
    ),
    Refusal(
        "--fp16 under a --loss-average other than turn or token",
        _loss_scale_is_too_large,
        f"the loss is counted in a unit of up to {MAX_DIVISOR_UNIT:,}, and Megatron skips every "
        "step whose gradients overflow with it",
        "remove --loss-scale and pass --min-loss-scale 1e-5, or train in bf16",
    ),
)
