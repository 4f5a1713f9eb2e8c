"""Refused settings of attention and of context parallelism; see `refusals`."""

import math

from megatron_multiturn.refusal import OWN_LOSS, Flags, Refusal, as_set, cp_size, tp_size


def _is_another_model(a: Flags) -> bool:
    patterns = (a.hybrid_layer_pattern, a.hybrid_override_pattern, a.mtp_hybrid_override_pattern)
    configs = (a.heterogeneous_layers_config_path, a.heterogeneous_layers_config_encoded_json)
    return any((a.experimental_attention_variant, *patterns, *configs, a.use_legacy_models))


def _uses_cuda_graphs(a: Flags) -> bool:
    # Megatron turns the two deprecated flags into the first when it validates the arguments.
    deprecated = a.enable_cuda_graph or a.external_cuda_graph
    return bool(deprecated) or a.cuda_graph_impl not in (None, "none")


def _rings(a: Flags) -> bool:
    return cp_size(a) > 1 and a.packed_attention == "te"


def _embeds_positions_slowly(a: Flags) -> bool:
    rotary = a.use_rotary_position_embeddings or a.position_embedding_type in ("rope", "yarn")
    fused = a.apply_rope_fusion and a.position_embedding_type != "yarn"
    return bool(_rings(a) and rotary and not fused)


def _sees_later_positions(a: Flags) -> bool:
    return a.window_size is not None and a.window_size[1] > 0


def _splits_heads(a: Flags) -> bool:
    if _rings(a) and as_set(a.cp_comm_type) <= {"p2p"}:
        return False
    return (a.num_attention_heads or 0) // tp_size(a) % cp_size(a) != 0


def _splits_groups(a: Flags) -> bool:
    if not a.group_query_attention:
        return False
    # With fewer groups than tensor parallel ranks each rank computes one.
    groups, ranks = max(1, (a.num_query_groups or 1) // tp_size(a)), cp_size(a)
    if _rings(a):
        return "a2a" in as_set(a.cp_comm_type) and groups % ranks != 0
    return groups % ranks != 0 and ranks % groups != 0


def _splits_rows_unevenly(a: Flags) -> bool:
    multiple = 2 * cp_size(a) if cp_size(a) > 1 else 1
    if a.sequence_parallel:
        multiple = math.lcm(multiple, cp_size(a) * tp_size(a))
    return (a.seq_length or 0) % multiple != 0


def _cuts_rows_otherwise(a: Flags) -> bool:
    other = a.hierarchical_context_parallel_sizes or not as_set(a.cp_comm_type) <= {"p2p", "a2a"}
    return bool(a.hybrid_context_parallel or (cp_size(a) > 1 and other))


ATTENTION_REFUSALS = (
    # Attention that ignores the boundaries of pieces.
    Refusal(
        "--spec",
        lambda a: a.spec is not None,
        "only Megatron's own layers are known to keep the pieces of a row apart",
        OWN_LOSS,
    ),
    Refusal(
        "another model than GPT",
        _is_another_model,
        "only layers of softmax attention keep the pieces of a row apart",
        "remove the experimental, hybrid, heterogeneous or legacy flags",
    ),
    Refusal(
        "--attention-backend local",
        lambda a: "local" in str(a.attention_backend),
        "it puts Megatron's own attention back, which sees across pieces",
    ),
    Refusal(
        "--attention-dropout above 0",
        lambda a: (a.attention_dropout or 0) > 0,
        "the variable-length attention kernel has no dropout (Megatron's default is 0.1)",
        "pass --attention-dropout 0, and the model's flags in place of --use-checkpoint-args, "
        "which brings the checkpoint's dropout back",
    ),
    Refusal(
        "--softmax-type other than vanilla",
        lambda a: a.softmax_type not in (None, "vanilla"),
        "packed attention has no attention sink",
    ),
    Refusal(
        "--packed-attention te or fa4 in 32 bits",
        lambda a: a.packed_attention in ("te", "fa4") and not (a.bf16 or a.fp16),
        "they have no packed kernel for it",
        "pass --bf16, or --packed-attention auto",
    ),
    Refusal(
        "--window-size with a second number above 0",
        _sees_later_positions,
        "a position would see later ones, which it is to predict",
        "pass --window-size N,0",
    ),
    Refusal(
        "--multi-latent-attention",
        lambda a: a.multi_latent_attention,
        "packed attention wants keys and values of one head size",
        "use --group-query-attention",
    ),
    Refusal(
        "--qk-clip or --log-max-attention-logit",
        lambda a: a.qk_clip or a.log_max_attention_logit,
        "packed attention does not keep the largest logit, which they read after every step",
    ),
    Refusal(
        "--cuda-graph-impl, --enable-cuda-graph or --external-cuda-graph",
        _uses_cuda_graphs,
        "a captured graph would replay the first batch's piece boundaries",
    ),
    # Context parallelism.
    Refusal(
        "--hybrid-context-parallel, --hierarchical-context-parallel-sizes, or a --cp-comm-type "
        "other than p2p or a2a",
        _cuts_rows_otherwise,
        "every row is cut alike, and packed attention exchanges among all context parallel ranks",
    ),
    Refusal(
        "--num-attention-heads with --context-parallel-size",
        _splits_heads,
        "{num_attention_heads} heads over {tensor_model_parallel_size} tensor parallel ranks leave "
        "each a number that {context_parallel_size} context parallel ranks cannot share evenly",
        "make heads / TP a multiple of CP",
    ),
    Refusal(
        "--num-query-groups with --context-parallel-size",
        _splits_groups,
        "{num_query_groups} groups over {tensor_model_parallel_size} tensor parallel ranks leave "
        "each a number that {context_parallel_size} context parallel ranks cannot share evenly",
        "make groups / TP a multiple of CP (or, without --packed-attention te, a divisor)",
    ),
    Refusal(
        "--seq-length with --context-parallel-size or --sequence-parallel",
        _splits_rows_unevenly,
        "the ranks cannot share {seq_length} positions evenly",
        "pass a multiple of 2 * CP, and with --sequence-parallel of CP * TP",
    ),
    Refusal(
        "--packed-attention te with --context-parallel-size, and --micro-batch-size or "
        "--eval-micro-batch-size above 1",
        lambda a: _rings(a) and max(a.micro_batch_size or 1, a.eval_micro_batch_size or 1) > 1,
        "Transformer Engine's ranks share the pieces of one row",
        "pass 1 and a longer --seq-length, or --packed-attention auto",
    ),
    Refusal(
        "--packed-attention te with --context-parallel-size, and --transformer-impl local, "
        "--no-rope-fusion or --position-embedding-type yarn",
        _embeds_positions_slowly,
        "without its kernel Megatron waits for the device in every layer to embed the positions",
        "pass --packed-attention auto",
    ),
    Refusal(
        "--packed-attention te and --window-size with --context-parallel-size",
        lambda a: _rings(a) and a.window_size is not None and as_set(a.cp_comm_type) != {"a2a"},
        "Transformer Engine's ring has no sliding window",
        "pass --cp-comm-type a2a, or --packed-attention auto",
    ),
)
