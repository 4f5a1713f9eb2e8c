"""What is refused, with which message, and what is not."""

import argparse
import copy
import re

import pytest

from megatron_multiturn.arguments import add_multiturn_args
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.refusals import REFUSALS, check_args, refused

Change = dict[str, object]

_MOE: Change = {"num_experts": 4}
_CP2: Change = {"context_parallel_size": 2}
_TE_RING: Change = {**_CP2, "packed_attention": "te", "bf16": True}
_FP16: Change = {"fp16": True, "loss_average": "session", "min_loss_scale": 1e-5}

# Changes of Megatron's arguments, each of which is refused, by the start of the refusal's setting.
REFUSED: dict[str, list[Change]] = {
    "--sft": [{"sft": True}],
    "--perform-rl-step": [
        {"perform_rl_step": True},
        {"modelopt_enabled": True},
        {"export_kd_teacher_load": "teacher"},
        {"logits_load_dir": "teacher"},
    ],
    "--mock-data": [{"mock_data": True}, {"fim_data": True}],
    "--reset-position-ids": [
        {"reset_position_ids": True},
        {"reset_attention_mask": True},
        {"eod_mask_loss": True},
    ],
    "--yaml-cfg": [{"yaml_cfg": "config.yaml"}],
    "--dataloader-type": [{"dataloader_type": "cyclic"}, {"dataloader_type": "external"}],
    "--decrease-batch-size-if-needed": [
        {
            "decrease_batch_size_if_needed": True,
            "global_batch_size": 1024,
            "micro_batch_size": 1,
            "world_size": 448,
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "context_parallel_size": 2,
        }
    ],
    "--rampup-batch-size": [{"rampup_batch_size": ["16", "8", "300000"]}],
    "--step-batch-size-schedule": [{"step_batch_size_schedule": "0:2,512:4", "train_iters": 9}],
    "--phase-transition-iterations": [{"phase_transition_iterations": [4]}],
    "--iterations-to-skip": [{**_CP2, "iterations_to_skip": [7]}],
    "--full-validation": [{"full_validation": True}],
    "--spec": [{"spec": ["local"]}, {"spec": ["their.module", "spec"]}, {"spec": []}],
    "another model": [
        {"experimental_attention_variant": "gated_delta_net"},
        {"hybrid_layer_pattern": "M*"},
        {"hybrid_override_pattern": "M*"},
        {"mtp_hybrid_override_pattern": "M*"},
        {"heterogeneous_layers_config_path": "config.json"},
        {"heterogeneous_layers_config_encoded_json": "{}"},
        {"use_legacy_models": True},
    ],
    "--attention-backend local": [{"attention_backend": "AttnBackend.local"}],
    "--attention-dropout": [{"attention_dropout": 0.1}],
    "--softmax-type": [{"softmax_type": "learnable"}],
    "--packed-attention te or fa4 in 32": [{"packed_attention": "te"}, {"packed_attention": "fa4"}],
    "--window-size with a second": [{"window_size": (128, 5)}],
    "--multi-latent-attention": [{"multi_latent_attention": True}],
    "--qk-clip": [{"qk_clip": True}, {"log_max_attention_logit": True}],
    "--cuda-graph-impl": [
        {"cuda_graph_impl": "local"},
        {"enable_cuda_graph": True},
        {"external_cuda_graph": True},
    ],
    "--hybrid-context-parallel": [
        {"hybrid_context_parallel": True},
        {**_CP2, "hierarchical_context_parallel_sizes": [1, 2]},
        {**_CP2, "cp_comm_type": ["allgather"]},
        {**_CP2, "cp_comm_type": ["p2p", "a2a+p2p"]},
    ],
    "--num-attention-heads": [{**_CP2, "num_attention_heads": 12, "tensor_model_parallel_size": 4}],
    "--num-query-groups": [
        {
            "context_parallel_size": 4,
            "num_attention_heads": 24,
            "group_query_attention": True,
            "num_query_groups": 6,
        },
        {
            **_TE_RING,
            "context_parallel_size": 4,
            "num_attention_heads": 24,
            "group_query_attention": True,
            "num_query_groups": 2,
            "cp_comm_type": ["a2a"],
        },
    ],
    "--seq-length": [
        {**_CP2, "seq_length": 4098},
        {"sequence_parallel": True, "tensor_model_parallel_size": 8, "seq_length": 4092},
        {
            **_CP2,
            "sequence_parallel": True,
            "tensor_model_parallel_size": 8,
            "seq_length": 4104,
        },
    ],
    "--packed-attention te with --context-parallel-size, and --micro": [
        {**_TE_RING, "micro_batch_size": 2},
        {**_TE_RING, "micro_batch_size": 1, "eval_micro_batch_size": 2},
    ],
    "--packed-attention te with --context-parallel-size, and --tr": [
        {**_TE_RING, "position_embedding_type": "rope", "apply_rope_fusion": False},
        {**_TE_RING, "use_rotary_position_embeddings": True, "apply_rope_fusion": False},
        {**_TE_RING, "position_embedding_type": "yarn", "apply_rope_fusion": True},
    ],
    "--packed-attention te and --window-size": [
        {**_TE_RING, "window_size": (128, 0), "cp_comm_type": "p2p"},
        {**_TE_RING, "window_size": (128, 0), "cp_comm_type": ["a2a", "p2p"]},
        {**_TE_RING, "window_size": (128, 0)},
    ],
    "--moe-router-load-balancing-type": [
        {**_MOE, "moe_router_load_balancing_type": "sinkhorn"},
        {**_MOE, "moe_router_load_balancing_type": ["quantile_balancing"]},
    ],
    "--moe-expert-capacity-factor": [{**_MOE, "moe_expert_capacity_factor": 1.0}],
    "--overlap-moe-expert-parallel-comm": [{"overlap_moe_expert_parallel_comm": True}],
    "--mtp-num-layers": [
        {**_CP2, "mtp_num_layers": 1},
        {"mtp_num_layers": 2, "mtp_hsm": True},
    ],
    "fully sharded": [
        {"use_torch_fsdp2": True},
        {"use_megatron_fsdp": True, "num_distributed_optimizer_instances": 2},
        {"use_megatron_fsdp": True, "megatron_fsdp_version": 2},
    ],
    "--ddp-average-in-collective": [{"ddp_average_in_collective": True}],
    "--tensor-parallel-num-weight-shards": [
        {
            "tensor_parallel_num_weight_shards": 4,
            "tensor_model_parallel_size": 2,
            "eval_iters": 100,
        }
    ],
    "--fp16": [{**_FP16, "loss_scale": 128.0}, {**_FP16, "min_loss_scale": 1.0}],
}
CASES = [(setting, change) for setting, changes in REFUSED.items() for change in changes]

# Arguments of other versions of Megatron, or of its training scripts.
FOREIGN = {
    *("modelopt_enabled", "export_kd_teacher_load"),
    *("use_legacy_models", "mtp_hsm", "megatron_fsdp_version"),
    *("world_size",),  # set when the arguments have been parsed
}

ACCEPTED = {
    "dense": "",
    "tensor and sequence parallel": "--tensor-model-parallel-size 4 --sequence-parallel",
    "virtual pipeline": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "context parallel": "--context-parallel-size 2 --cp-comm-type a2a",
    "more context parallel ranks than groups": "--context-parallel-size 8",
    "fewer groups than tensor parallel ranks": "--tensor-model-parallel-size 8 "
    "--num-query-groups 2 --context-parallel-size 4 --sequence-parallel",
    "a ring of ranks": "--context-parallel-size 16 --packed-attention te --bf16 "
    "--micro-batch-size 1 --num-attention-heads 40 --position-embedding-type rope",
    "Transformer Engine's exchange": "--context-parallel-size 4 --packed-attention te --fp16 "
    "--micro-batch-size 1 --cp-comm-type a2a --window-size 128,0",
    "a sliding window": "--window-size 128,0 --context-parallel-size 2",
    "no groups": "--num-attention-heads 30 --num-query-groups 7 --context-parallel-size 5 "
    "--seq-length 4000 --no-group-query-attention",
    "sharded optimizer": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--num-distributed-optimizer-instances 2",
    "fully sharded": "--use-megatron-fsdp",
    "experts": "--num-experts 8 --expert-model-parallel-size 2 --moe-z-loss-coeff 1e-3 "
    "--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss "
    "--moe-aux-loss-coeff 0.1 0.1 0.1 --moe-expert-capacity-factor -1",
    "no experts to drop from": "--moe-expert-capacity-factor 1",
    "experts without losses": "--num-experts 8 --moe-router-load-balancing-type none",
    "multi-token prediction": "--mtp-num-layers 2 --mtp-use-repeated-layer --mtp-detach-heads",
    "iterations to skip": "--iterations-to-skip 3 4",
    "batches that grow": "--step-batch-size-schedule 0:128,1M:256 --train-samples 4096",
    "a batch that fits": "--decrease-batch-size-if-needed --global-batch-size 256",
    "weight shards without evaluation": "--tensor-parallel-num-weight-shards 2 --eval-iters 0",
    "fp16": "--fp16",
    "fp16 with a static scale": "--fp16 --loss-scale 128 --loss-average token",
    "fp16 in a unit": "--fp16 --loss-average prefix --min-loss-scale 1e-5",
    "bf16 in a unit": "--bf16 --loss-average sqrt",
    "recomputation": "--recompute-granularity selective --recompute-modules core_attn mlp",
}
_MODEL = (
    "--attention-dropout 0 --micro-batch-size 2 --seq-length 4096 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8"
)


def parse(flags: str) -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_multiturn_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    parser.add_argument("--no-group-query-attention", action="store_true")
    args = parser.parse_args(flags.split())
    args.group_query_attention &= not args.no_group_query_attention
    return args


@pytest.fixture(scope="module")
def parsed_args() -> argparse.Namespace:
    return parse("--attention-dropout 0")


@pytest.fixture
def args(parsed_args: argparse.Namespace) -> argparse.Namespace:
    return copy.deepcopy(parsed_args)


def test_every_refusal_is_tested() -> None:
    assert len(REFUSED) == len(REFUSALS)
    for start, refusal in zip(REFUSED, REFUSALS, strict=True):
        assert refusal.setting.startswith(start)


@pytest.mark.parametrize(("setting", "change"), CASES)
def test_refused(args: argparse.Namespace, setting: str, change: Change) -> None:
    for name, value in change.items():
        assert hasattr(args, name) or name in FOREIGN
        setattr(args, name, value)
    with pytest.raises(ConfigError, match=f"(?m)^  {re.escape(setting)}.*: .*; "):
        check_args(args)
    assert len(refused(args)) == 1


@pytest.mark.parametrize(("setting", "change"), CASES)
def test_refused_where_other_arguments_do_not_exist(setting: str, change: Change) -> None:
    with pytest.raises(ConfigError, match=f"(?m)^  {re.escape(setting)}.*: .*; "):
        check_args(argparse.Namespace(**change))


@pytest.mark.parametrize("flags", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(flags: str) -> None:
    args = parse(f"{_MODEL} {flags}")
    args.world_size = 64
    check_args(args)


def test_an_argument_that_does_not_exist_is_no_reason(args: argparse.Namespace) -> None:
    assert refused(argparse.Namespace()) == []
    for name in vars(args):
        fewer = copy.copy(args)
        delattr(fewer, name)
        assert refused(fewer) == []


def test_a_message_has_the_numbers(args: argparse.Namespace) -> None:
    args.num_attention_heads, args.tensor_model_parallel_size = 12, 4
    args.context_parallel_size = 2
    with pytest.raises(ConfigError, match=r"12 heads over 4 tensor parallel ranks .* 2 context"):
        check_args(args)


def test_all_that_is_wrong_is_said_at_once(args: argparse.Namespace) -> None:
    args.sft, args.mock_data = True, True
    with pytest.raises(ConfigError, match=r"(?s)provider multiturn:.*--sft.*--mock-data"):
        check_args(args)
