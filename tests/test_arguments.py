"""The plugin's flags on Megatron's own parser, and what they set."""

import argparse
import copy
from typing import Any

import pytest

from megatron_multiturn import arguments
from megatron_multiturn.arguments import add_multiturn_args, prepare_args
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


def test_what_is_prepared(args: argparse.Namespace) -> None:
    notices = prepare_args(args, on_cpu=True)
    assert args.calculate_per_token_loss
    assert args.eval_interval == 1000
    assert args.packed_attention == "torch"
    assert args.distributed_backend == "gloo"
    assert args.transformer_impl == "local"
    assert any("NO GPU" in notice for notice in notices)


def test_megatrons_own_provider_keeps_its_loss_and_layers(args: argparse.Namespace) -> None:
    args.dataset_provider, args.sft = "megatron", True
    prepare_args(args, on_cpu=True)
    assert not args.calculate_per_token_loss


def test_megatrons_own_provider_is_left_as_it_was(args: argparse.Namespace) -> None:
    args.dataset_provider = "megatron"
    before = copy.deepcopy(vars(args))
    assert prepare_args(args, on_cpu=False) == []
    assert vars(args) == before


def test_what_a_checkpoint_brings_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron takes over a checkpoint's arguments between parsing and validation."""
    from megatron.training import arguments

    from megatron_multiturn.megatron_hooks import hook_arguments

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


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(arguments, "has_module", lambda name: name in names)


@pytest.mark.parametrize(
    ("installed", "flags", "kernels"),
    [
        (["transformer_engine"], {"bf16": True}, "auto"),
        (["transformer_engine"], {"fp16": True}, "auto"),
        (["transformer_engine"], {}, "torch"),
        ([], {"bf16": True}, "torch"),
        ([], {"bf16": True, "packed_attention": "torch"}, "torch"),
        (["transformer_engine"], {"bf16": True, "packed_attention": "te"}, "te"),
        (["flash_attn.cute"], {"bf16": True, "packed_attention": "fa4"}, "fa4"),
    ],
)
def test_the_kernels_of_attention_are_those_that_run_here(
    args: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    installed: list[str],
    flags: dict[str, Any],
    kernels: str,
) -> None:
    install(monkeypatch, *installed)
    vars(args).update(flags)
    prepare_args(args, on_cpu=False)
    assert args.packed_attention == kernels
    assert args.piece_multiple == 1


@pytest.mark.parametrize("kernels", ["te", "fa4"])
def test_kernels_that_are_missing_are_asked_for_in_vain(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    install(monkeypatch)
    args.packed_attention, args.bf16 = kernels, True
    with pytest.raises(
        ConfigError, match=rf"--packed-attention {kernels} needs .*install it.*auto"
    ):
        prepare_args(args, on_cpu=False)
    args.attention_dropout = 0.1  # first of all that is wrong with the flags
    with pytest.raises(ConfigError, match="--attention-dropout above 0"):
        prepare_args(args, on_cpu=False)


@pytest.mark.parametrize("kernels", ["te", "fa4"])
def test_a_dry_run_on_a_cpu_takes_what_is_there(args: argparse.Namespace, kernels: str) -> None:
    args.packed_attention, args.bf16, args.context_parallel_size = kernels, True, 2
    args.seq_length, args.num_attention_heads, args.micro_batch_size = 4096, 16, 2
    notices = prepare_args(args, on_cpu=True)
    assert args.packed_attention == "torch"
    assert args.piece_multiple == 1
    assert f"NO GPU: --packed-attention torch in place of {kernels}" in notices
    assert any("rows are packed otherwise" in notice for notice in notices) == (kernels == "te")


@pytest.mark.parametrize("name", ["deterministic_mode", "apply_query_key_layer_scaling"])
def test_auto_leaves_alone_what_transformer_engine_has_conditions_for(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    install(monkeypatch, "transformer_engine")
    args.bf16 = True
    setattr(args, name, True)
    prepare_args(args, on_cpu=False)
    assert args.packed_attention == "torch"


@pytest.mark.parametrize(("kernels", "multiple"), [("te", 8), ("auto", 1), ("torch", 1)])
def test_pieces_are_rounded_up_where_ranks_share_them(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, kernels: str, multiple: int
) -> None:
    install(monkeypatch, "transformer_engine")
    args.packed_attention, args.bf16, args.context_parallel_size = kernels, True, 4
    args.seq_length, args.num_attention_heads, args.micro_batch_size = 4096, 16, 1
    prepare_args(args, on_cpu=False)
    assert args.piece_multiple == multiple


@pytest.mark.parametrize(
    ("installed", "flags", "loss_fused", "gradients_fused"),
    [
        ([], {"bf16": True}, True, True),
        (["transformer_engine"], {"bf16": True}, False, True),
        ([], {"bf16": True, "deterministic_mode": True}, False, True),
        ([], {"fp16": True}, False, True),  # the fused loss gives bf16 gradients
        ([], {}, False, True),
        ([], {"bf16": True, "use_megatron_fsdp": True}, True, False),
        ([], {"bf16": True, "defer_embedding_wgrad_compute": True}, True, False),
    ],
)
def test_what_is_fused_without_the_libraries_that_do_it(
    args: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    installed: list[str],
    flags: dict[str, Any],
    loss_fused: bool,
    gradients_fused: bool,
) -> None:
    install(monkeypatch, *installed)
    vars(args).update(flags)
    prepare_args(args, on_cpu=False)
    assert args.cross_entropy_loss_fusion == loss_fused
    assert args.gradient_accumulation_fusion == gradients_fused


def test_nothing_is_fused_on_a_cpu(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "transformer_engine", "fused_weight_gradient_mlp_cuda")
    args.bf16 = True
    prepare_args(args, on_cpu=True)
    assert not args.cross_entropy_loss_fusion
    assert not args.gradient_accumulation_fusion
    assert args.packed_attention == "torch"
