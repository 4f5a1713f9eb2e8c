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
    "mixture-of-experts": {"num_experts": 4, "moe_router_load_balancing_type": "aux_loss"},
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


def test_unknown_loss_average_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    parser = add_multiturn_args(argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--loss-average", "tokens"])
    assert "'session-token', 'prefix', 'sqrt'" in capsys.readouterr().err
