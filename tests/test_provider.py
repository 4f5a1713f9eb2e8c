"""The choice of a datasets provider and what is said of the datasets it gives."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_multiturn import megatron_compat, provider
from megatron_multiturn.arguments import add_multiturn_args
from megatron_multiturn.batch import RowShape
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.provider import select_provider, train_valid_test_datasets_provider
from megatron_multiturn.provider_names import PROVIDERS_GROUP

SHAPE = RowShape(sequence_length=8, num_boundaries=4)


def stages_aware(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    return f"train of stage {vp_stage}", None, None


def stages_unaware(num_samples: list[int]) -> tuple[Any, Any, Any]:
    return "train", None, None


@pytest.fixture
def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_compat, "get_args", lambda: argparse.Namespace(seq_length=8))
    monkeypatch.setattr(provider, "agree_on_row_shape", lambda datasets, length: SHAPE)
    monkeypatch.setattr(provider, "agree_on_epoch", lambda train: 0)


@pytest.mark.usefixtures("without_ranks")
@pytest.mark.parametrize(
    ("function", "train"), [("stages_aware", "train of stage 1"), ("stages_unaware", "train")]
)
def test_a_virtual_stage_reaches_the_provider_that_wants_it(function: str, train: str) -> None:
    provide = select_provider(f"{__name__}:{function}")
    assert provide.is_distributed  # type: ignore[attr-defined]
    assert provide([1, 0, 0], vp_stage=1) == (train, None, None)
    assert provider.row_shape() == SHAPE


def install_distribution(folder: Path, name: str, entry: str) -> None:
    """As pip leaves it: a folder beside the modules that says what the distribution offers."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{PROVIDERS_GROUP}]\n{entry}\n")


def test_installed_distributions_offer_providers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_rows.py").write_text(
        "def provide(num_samples):\n    raise RuntimeError(f'asked for {num_samples}')\n"
    )
    install_distribution(tmp_path, "their-data", "theirs = their_rows:provide")
    with pytest.raises(RuntimeError, match="asked for 7"):
        select_provider("theirs")(7)
    help_text = add_multiturn_args(argparse.ArgumentParser()).format_help()
    assert "{multiturn,megatron,theirs,MODULE:FUNCTION}" in help_text

    install_distribution(tmp_path, "broken", "broken = their_rows:nothing")
    with pytest.raises(ConfigError, match="their_rows:nothing of broken cannot be loaded"):
        select_provider("broken")
    install_distribution(tmp_path, "rival", "theirs = their_rows:other")
    with pytest.raises(ConfigError, match=r"2 installed distributions offer .* their-data"):
        select_provider("theirs")
    with pytest.raises(ConfigError, match="one of multiturn, megatron, broken, theirs, "):
        select_provider("their")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multiturns", "none of this name; pass one of multiturn, megatron, or MODULE"),
        ("no.such.module:f", "No module named"),
        ("json:nothing", "no attribute 'nothing'"),
        ("json:__name__", "is not a function"),
    ],
)
def test_an_unknown_provider_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_provider(name)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the provider, all of whose datasets hold 7 rows; the row numbers it asked for."""
    asked: list[Any] = []
    datasets: list[Any] = [[None] * 7, None, None]

    def build_datasets(cls: type, num_samples: list[int | None], *others: object) -> list[Any]:
        asked[:] = num_samples
        return list(datasets)

    def call(num_rows: int, blend: Any, *, balance: bool = True, **args: Any) -> tuple[Any, Any]:
        fields = {"balance_data_parallel": balance, "global_batch_size": 4, **args}
        config = argparse.Namespace(mock=False, blend=blend, blend_per_split=None)
        monkeypatch.setattr(megatron_compat, "get_args", lambda: argparse.Namespace(**fields))
        monkeypatch.setattr(provider, "dataset_config", lambda args: config)
        return train_valid_test_datasets_provider([num_rows, 0, 0])[0], asked[0]

    monkeypatch.setattr(megatron_compat, "build_blended_datasets", build_datasets)
    monkeypatch.setattr(provider, "_put_in_order", lambda train, *others: (("ordered", train), {}))
    monkeypatch.setattr(provider, "agree_on_plan", lambda plan: None)
    return call


def test_data_that_end_before_the_training_are_refused(build: Any) -> None:
    """Megatron gives one epoch of several datasets without weights, whatever is asked for."""
    blend = (["a", "b"], None)
    assert build(7, blend)[0] == ("ordered", [None] * 7)
    with pytest.raises(ConfigError, match=r"hold 7 rows, and --train-iters asks for 8.*weight"):
        build(8, blend)


def test_as_many_rows_are_asked_for_as_the_order_needs(build: Any) -> None:
    """What is decided of a window of rows must not depend on where the training ends."""
    assert build(7, (["a"], None))[1] == 7
    assert build(7, (["a", "b"], None))[1] is None
    assert build(7, (["a", "b"], None), balance=False)[1] == 7
    growing = {"step_batch_size_schedule": "0:2 64:4", "seq_length": 8}
    assert build(7, (["a"], None), **growing)[1] == 7 + 4
    with pytest.raises(ConfigError, match="hold 7 rows"):
        build(1025, (["a", "b"], [0.5, 0.5]))
    assert build(7, (["a", "b"], [0.5, 0.5]))[1] == 1024
    assert build(7, (["a", "b"], [0.5, 0.5]), balance=False)[1] == 7
