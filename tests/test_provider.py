"""The choice of a datasets provider and what is said of the datasets it gives."""

import argparse
from typing import Any

import pytest

from megatron_multiturn import megatron_compat, provider
from megatron_multiturn.batch import RowShape
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.provider import select_provider, train_valid_test_datasets_provider

SHAPE = RowShape(sequence_length=8, num_boundaries=4)


def stages_aware(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    return f"train of stage {vp_stage}", None, None


def stages_unaware(num_samples: list[int]) -> tuple[Any, Any, Any]:
    return "train", None, None


@pytest.fixture
def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_compat, "get_args", lambda: argparse.Namespace(seq_length=8))
    monkeypatch.setattr(provider, "agree_on_row_shape", lambda datasets, length: SHAPE)


@pytest.mark.usefixtures("without_ranks")
@pytest.mark.parametrize(
    ("function", "train"), [("stages_aware", "train of stage 1"), ("stages_unaware", "train")]
)
def test_a_virtual_stage_reaches_the_provider_that_wants_it(function: str, train: str) -> None:
    provide = select_provider(f"{__name__}:{function}")
    assert provide.is_distributed  # type: ignore[attr-defined]
    assert provide([1, 0, 0], vp_stage=1) == (train, None, None)
    assert provider.row_shape() == SHAPE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multiturns", "neither multiturn or megatron, nor MODULE:FUNCTION"),
        ("no.such.module:f", "No module named"),
        ("json:nothing", "no attribute 'nothing'"),
        ("json:__name__", "is not a function"),
    ],
)
def test_an_unknown_provider_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_provider(name)


def test_data_that_end_before_the_training_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron gives one epoch of several datasets without weights, whatever is asked for."""
    monkeypatch.setattr(megatron_compat, "get_args", argparse.Namespace)
    monkeypatch.setattr(provider, "dataset_config", lambda args: argparse.Namespace(mock=False))
    datasets: list[Any] = [[None] * 7, None, None]
    monkeypatch.setattr(megatron_compat, "build_blended_datasets", lambda *args: datasets)
    assert train_valid_test_datasets_provider([7, 0, 0]) == tuple(datasets)
    with pytest.raises(ConfigError, match=r"hold 7 rows, and --train-iters asks for 8.*weight"):
        train_valid_test_datasets_provider([8, 0, 0])
