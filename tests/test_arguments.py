"""The plugin's flags on Megatron's own parser: what they set and what is refused."""

import argparse
import copy

import pytest

from megatron_multiturn.arguments import (
    PACKED_LAYER_SPEC,
    REFUSALS,
    add_multiturn_args,
    check_args,
    prepare_args,
)
from megatron_multiturn.errors import ConfigError


@pytest.fixture(scope="module")
def parsed_args() -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = add_multiturn_args(add_megatron_arguments(parser))
    return parser.parse_args(["--attention-dropout", "0"])


@pytest.fixture
def args(parsed_args: argparse.Namespace) -> argparse.Namespace:
    return copy.deepcopy(parsed_args)


# One change of Megatron's arguments a refusal, by the start of the refusal's setting.
REFUSED: dict[str, dict[str, object]] = {
    "--sft": {"sft": True},
    "--spec": {"spec": ["local"]},
    "--attention-dropout": {"attention_dropout": 0.1},
    "--context-parallel-size": {"context_parallel_size": 2},
    "--sequence-parallel": {"sequence_parallel": True, "transformer_impl": "local"},
    "mixture-of-experts": {"num_experts": 4, "moe_router_load_balancing_type": "sinkhorn"},
    "--moe-expert-capacity-factor": {
        "num_experts": 4,
        "moe_router_load_balancing_type": "none",
        "moe_expert_capacity_factor": 1.0,
    },
    "--mtp-num-layers": {"mtp_num_layers": 1},
    "--multi-latent-attention": {"multi_latent_attention": True},
    "--window-size": {"window_size": (128, 0)},
    "--softmax-type": {"softmax_type": "learnable"},
    "another model": {"hybrid_layer_pattern": "M*"},
    "--attention-backend local": {"attention_backend": "AttnBackend.local"},
    "--yaml-cfg": {"yaml_cfg": "config.yaml"},
    "fully sharded": {"use_megatron_fsdp": True},
    "--ddp-average-in-collective": {"ddp_average_in_collective": True},
    "--overlap-moe-expert-parallel-comm": {"overlap_moe_expert_parallel_comm": True},
    "--cuda-graph-impl": {"cuda_graph_impl": "local"},
    "--dataloader-type": {"dataloader_type": "cyclic"},
    "--full-validation": {"full_validation": True},
    "--step-batch-size-schedule": {"step_batch_size_schedule": "0:2,512:4"},
    "--fp16 with --loss-scale": {"fp16": True, "loss_scale": 128.0, "loss_average": "sqrt"},
    "--mock-data": {"mock_data": True},
    "--reset-position-ids": {"eod_mask_loss": True},
    "--logits-load-dir": {"logits_load_dir": "teacher"},
}


def test_every_refusal_is_tested() -> None:
    assert len(REFUSED) == len(REFUSALS)
    for start, refusal in zip(REFUSED, REFUSALS, strict=True):
        assert refusal.setting.startswith(start)


@pytest.mark.parametrize("setting", REFUSED)
def test_refused(args: argparse.Namespace, setting: str) -> None:
    for name, value in REFUSED[setting].items():
        assert hasattr(args, name)
        setattr(args, name, value)
    with pytest.raises(ConfigError, match=f"(?m)^  {setting}.*: .*; "):
        check_args(args)


def test_the_plugins_own_layers_may_come_from_a_checkpoint(args: argparse.Namespace) -> None:
    args.spec = PACKED_LAYER_SPEC
    check_args(args)


def test_defaults_are_accepted_and_all_that_is_wrong_is_said_at_once(
    args: argparse.Namespace,
) -> None:
    check_args(args)
    args.sft, args.mock_data = True, True
    with pytest.raises(ConfigError, match=r"(?s)--sft.*--mock-data"):
        check_args(args)


def test_experts_without_auxiliary_losses_are_accepted(args: argparse.Namespace) -> None:
    args.num_experts, args.moe_router_load_balancing_type = 4, "none"
    check_args(args)
    args.moe_z_loss_coeff = 1e-3
    with pytest.raises(ConfigError, match="mixture-of-experts"):
        check_args(args)


def test_a_list_of_balancing_types_is_searched(args: argparse.Namespace) -> None:
    args.num_experts, args.moe_router_load_balancing_type = 4, ["none", "seq_aux_loss"]
    with pytest.raises(ConfigError, match="mixture-of-experts"):
        check_args(args)


def test_what_is_prepared(args: argparse.Namespace) -> None:
    notices = prepare_args(args, on_cpu=True)
    assert args.calculate_per_token_loss
    assert args.eval_interval == 1000
    assert args.spec == PACKED_LAYER_SPEC
    assert args.distributed_backend == "gloo"
    assert args.transformer_impl == "local"
    assert any("NO GPU" in notice for notice in notices)


def test_megatrons_own_provider_keeps_its_loss_and_layers(args: argparse.Namespace) -> None:
    args.dataset_provider, args.sft = "megatron", True
    prepare_args(args, on_cpu=True)
    assert not args.calculate_per_token_loss
    assert args.spec is None


def test_what_a_checkpoint_brings_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron takes over a checkpoint's arguments between parsing and validation."""
    from megatron.training import arguments

    from megatron_multiturn.megatron_compat import hook_arguments

    for name in ("parse_args", "validate_args"):
        monkeypatch.setattr(arguments, name, getattr(arguments, name))
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", "--attention-dropout", "0"])

    def prepare(args: argparse.Namespace) -> None:
        prepare_args(args, on_cpu=True)

    hook_arguments(add_multiturn_args, prepare)
    args = arguments.parse_args()
    assert args.loss_average == "turn"
    args.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="--attention-dropout above 0"):
        arguments.validate_args(args)


def test_unknown_loss_average_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    parser = add_multiturn_args(argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--loss-average", "tokens"])
    assert "'session-token', 'prefix', 'sqrt'" in capsys.readouterr().err
