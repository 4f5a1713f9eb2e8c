"""The plugin's flags on Megatron's own parser, and what they set."""

import argparse
import copy

import pytest

from megatron_multiturn.arguments import add_multiturn_args, layer_spec, prepare_args
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
    assert args.spec == layer_spec("torch")
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
