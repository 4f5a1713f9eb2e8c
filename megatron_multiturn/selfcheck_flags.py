"""How the selfcheck changes a job's flags: the job's own run, and the reference on one rank.

Both take the job's model, data and tokenizer flags as they are. A pattern below names flags by
their destination in the namespace; they go back to the default of Megatron's parser.
"""

import argparse
from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_multiturn.errors import ConfigError

# Written, logged or scheduled by a training run, and of no matter to one forward and backward.
_NEEDLESS = (
    *("save*", "non_persistent_*", "async_save", "async_strategy", "ckpt_convert_*"),
    *("tensorboard_dir", "wandb_*", "log_*", "*straggler*", "moe_routing_trace_*"),
    *("moe_per_layer_logging", "logits_save_*", "profile", "use_pytorch_profiler"),
    *("record_memory_history", "exit_*", "adlr_autoresume", "inprocess_*", "*_ft_*"),
    *("fault_injector_*", "error_injection_*", "iterations_to_skip", "result_rejected_*"),
    *("check_weight_hash_*", "gpu_sniff_test_interval", "run_workload_inspector_server"),
    *(
        "train_samples",
        "train_epochs",
        "rampup_batch_size",
        "decrease_batch_size_if_needed",
        "skip_train",
    ),
    *("lr_*", "min_lr", "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
    *("*weight_decay*", "eval_*_batch_size", "start_eval_at_iter"),
)

# What draws random numbers, and so other ones on another layout; or changes the weights.
_RANDOM = (
    *("moe_input_jitter_eps", "moe_router_force_*", "qk_clip", "moe_use_upcycling"),
    *("fim_data", "data_parallel_random_init"),
)

# Every use of less than 32 bits.
_LOW_PRECISION = (
    *("fp16", "bf16", "fp8*", "fp4*", "first_last_layers_bf16", "grad_reduce_in_bf16"),
    *("fp16_lm_cross_entropy", "fp32_residual_connection", "apply_query_key_layer_scaling"),
    *("loss_scale", "use_precision_aware_optimizer", "main_grads_dtype", "main_params_dtype"),
    *("exp_avg_dtype", "exp_avg_sq_dtype", "optimizer_cpu_offload", "*mxfp8*"),
    *("moe_router_padding_for_*", "disable_bf16_reduced_precision_matmul"),
    *("te_precision_config_file", "ddp_param_name_patterns_for_fp32_local_accumulation"),
    *("packed_attention", "cross_entropy_loss_fusion"),  # their kernels
)

# Every way to cut a job over ranks, or to spare memory or time for the sake of it.
_DISTRIBUTED = (
    *("tensor_model_parallel_size", "*_num_weight_shards", "pipeline_model_parallel_*"),
    *("context_parallel_size", "hierarchical_context_parallel_sizes", "cp_comm_type"),
    *("hybrid_context_parallel", "max_seqlen_per_dp_cp_rank", "sequence_parallel"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "mtp_standalone"),
    *("decoder_*_pipeline_num_layers", "num_layers_per_virtual_pipeline_stage"),
    *("num_virtual_stages_per_pipeline_rank", "microbatch_group_size_per_vp_stage"),
    *("account_for_*_in_pipeline_split", "*overlap*", "tp_comm_*", "defer_embedding_*"),
    *("wgrad_deferral_limit", "delay_wgrad_compute", "use_ring_exchange_p2p", "align_*"),
    *("*recompute*", "distribute_saved_activations", "*offload*", "moe_paged_stash*"),
    *("use_distributed_optimizer", "num_distributed_optimizer_instances", "ddp_*"),
    *("optimizer", "optimizer_cuda_graph", "nccl_ub", "use_sharp", "use_tp_pp_dp_mapping"),
    *("high_priority_*", "symmetric_ar_type", "moe_token_dispatcher_type", "moe_flex_*"),
    *("moe_enable_deepep", "moe_deepep_*", "moe_hybridep_*", "moe_ncclep_*"),
    *("load", "pretrained_checkpoint", "use_checkpoint_args", "load_main_params_from_ckpt"),
)

_LEARNING_RATE = 1e-5  # any will do: no weight is changed


def prepare_both(
    args: argparse.Namespace, parser: argparse.ArgumentParser, *, num_batches: int, dtype: str
) -> list[str]:
    """Fit the flags of either run to the check, in place; returns what the user should know.

    dtype: "float32", or "given" for what the flags say.
    """
    from megatron_multiturn.megatron_compat import scheduled_batch_sizes  # after cpu.install

    if getattr(args, "use_megatron_fsdp", False):
        raise ConfigError(
            "--use-megatron-fsdp: its parameters have no names that hold on every layout, so they "
            "cannot be compared; check the job with --use-distributed-optimizer in its place"
        )
    notices = []
    sizes = scheduled_batch_sizes(args)
    if sizes:
        args.step_batch_size_schedule, args.global_batch_size = None, max(sizes)
        notices.append(f"in batches of {max(sizes)} rows, the largest that are scheduled")
    given = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    if dtype == "float32":
        if args.packed_attention == "te" and args.context_parallel_size > 1:
            raise ConfigError(
                "--packed-attention te with --context-parallel-size: Transformer Engine's context "
                "parallelism does not run in float32; check the job with --check-dtype given, or "
                "with --packed-attention auto, which cuts rows over ranks in another way"
            )
        _reset(args, parser, _LOW_PRECISION)
        if given != "float32":
            notices.append(f"in float32; the job's own is {given} (--check-dtype given)")
    elif args.fp16 and not args.loss_scale:
        # Megatron would look for a scale over many steps, and end near this: the gradients are
        # those of a sum over all turns.
        args.initial_loss_scale = args.min_loss_scale
    if args.hidden_dropout:
        notices.append("without dropout")
    if _drop_layout_dependent_losses(args):
        notices.append(
            "without global_aux_loss: Megatron itself computes it from the ranks' own batches"
        )
    _reset(args, parser, (*_NEEDLESS, *_RANDOM))
    args.hidden_dropout = args.attention_dropout = 0.0
    args.train_iters = num_batches
    args.lr, args.lr_decay_style = _LEARNING_RATE, "constant"
    args.eval_iters, args.log_interval, args.num_workers = 0, 1, 0
    args.enable_one_logger, args.rerun_mode = False, "disabled"
    args.finetune = args.no_load_optim = args.no_load_rng = True  # `--load` brings weights only
    args.override_ckpt_iteration = None
    return notices


def limit_global_batch(args: argparse.Namespace, max_micro_batches: int) -> int:
    """Cut the global batch to so many micro-batches a data parallel rank; returns their number.

    More if the pipeline needs more of them, less if the job has less; 0 for all.
    """
    model_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    data_parallel_size = args.world_size // (model_size * args.context_parallel_size)
    rows_at_once = max(args.micro_batch_size * data_parallel_size, 1)
    num_given = max((args.global_batch_size or rows_at_once) // rows_at_once, 1)
    if max_micro_batches == 0:
        return num_given
    stages = args.pipeline_model_parallel_size
    at_most = -(-max_micro_batches // stages) * stages
    if num_given > at_most:
        args.global_batch_size = at_most * rows_at_once
    return min(num_given, at_most)


def prepare_one_rank(
    args: argparse.Namespace, parser: argparse.ArgumentParser, *, global_batch_size: int
) -> None:
    """Fit the flags to the reference: the same model and rows on one rank, in float32."""
    # Megatron pads the vocabulary to a multiple of this times the tensor parallel size.
    args.make_vocab_size_divisible_by *= args.tensor_model_parallel_size
    _reset(args, parser, (*_LOW_PRECISION, *_DISTRIBUTED))
    args.global_batch_size = global_batch_size
    args.perform_initialization = False  # the weights come from the recording


def _drop_layout_dependent_losses(args: argparse.Namespace) -> bool:
    """Leave out the load balancing whose value depends on the layout; whether there was any."""
    kinds, coefficients = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    if args.num_experts is None or "global_aux_loss" not in kinds:
        return False
    if isinstance(kinds, str):
        kinds = [kinds]
    if not isinstance(coefficients, list):
        coefficients = [coefficients] * len(kinds)
    kept = [
        (kind, coefficient)
        for kind, coefficient in zip(kinds, coefficients, strict=True)
        if kind != "global_aux_loss"
    ] or [("none", 0.0)]
    args.moe_router_load_balancing_type = [kind for kind, _ in kept]
    args.moe_aux_loss_coeff = [coefficient for _, coefficient in kept]
    return True


def _reset(
    args: argparse.Namespace, parser: argparse.ArgumentParser, patterns: Sequence[str]
) -> None:
    for name in vars(args):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            setattr(args, name, parser.get_default(name))
