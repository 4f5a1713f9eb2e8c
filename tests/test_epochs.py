"""`--train-epochs`: how long a run is, counted from the plan, and what the log says of it."""

import argparse
import copy
import re
from pathlib import Path
from typing import Any

import pytest
from megatron_jobs import MODEL_FLAGS, make_dataset, run_ranks, train_sentencepiece, word_sessions

from megatron_multiturn.arguments import add_multiturn_args, prepare_args
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.megatron_compat import build_blended_datasets
from megatron_multiturn.provider import planning_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Two datasets: the flags with which a job trains on each, the prefix last."""
    folder = tmp_path_factory.mktemp("epochs")
    lengths = [[1 + (7 * index) % 13] * (1 + index % 3) for index in range(140)]
    sessions = word_sessions(lengths)
    texts = ["user assistant", *(str(session) for session in sessions)]
    model = train_sentencepiece(folder, texts, 120)
    return [
        make_dataset(folder / "one", sessions[:100], model),
        make_dataset(folder / "other", sessions[100:], model),
    ]


@pytest.fixture(scope="module")
def parsed_args() -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = add_multiturn_args(add_megatron_arguments(parser))
    args = parser.parse_args(["--attention-dropout", "0", "--seq-length", "64"])
    args.world_size, args.rank = 4, 0
    args.micro_batch_size, args.split = 2, "100,0,0"
    return args


@pytest.fixture
def args(
    parsed_args: argparse.Namespace, data: list[list[str]], tmp_path: Path
) -> argparse.Namespace:
    args = copy.deepcopy(parsed_args)
    args.data_path, args.data_cache_path = [data[0][-1]], str(tmp_path)
    return args


def prepared(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    vars(args).update(changes)
    prepare_args(args, on_cpu=True)
    return args


def built_rows(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of an epoch as Megatron's builder makes them."""
    from megatron_multiturn.dataset import MultiTurnDataset

    config = planning_config(prepared(copy.deepcopy(args)))
    return len(build_blended_datasets(MultiTurnDataset, [None, 0, 0], lambda: True, config)[0])


@pytest.mark.parametrize("split", ["100,0,0", "70,20,10", "33,33,34"])
@pytest.mark.parametrize("epochs", [1.0, 2.5, 0.75])
def test_iterations_come_from_the_plan(
    split: str, epochs: float, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    args.split = split
    rows = built_rows(args, monkeypatch)
    assert rows > 8
    length = prepared(args, train_epochs=epochs, global_batch_size=4)
    assert length.train_iters == int(epochs * rows) // 4
    assert length.train_samples is None


def test_without_a_global_batch_size_it_is_megatrons(args: argparse.Namespace) -> None:
    """One micro-batch of each data parallel rank: 4 ranks in 2 stages, 2 rows each."""
    by_default = prepared(
        copy.deepcopy(args), train_epochs=1.0, pipeline_model_parallel_size=2
    ).train_iters
    assert by_default == prepared(args, train_epochs=1.0, global_batch_size=4).train_iters


def test_a_growing_batch_is_counted_in_rows(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the last batch that the epochs fill: 4, 4, 4, then 8 rows at a time."""
    rows = 2 * built_rows(args, monkeypatch)
    args = prepared(args, train_epochs=2.0, step_batch_size_schedule=f"0:4,{64 * 10}:8")
    assert args.train_iters is None
    assert args.train_samples == 12 + (rows - 12) // 8 * 8


def test_an_epoch_of_a_blend_is_all_of_its_datasets(
    args: argparse.Namespace, data: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = built_rows(args, monkeypatch)
    args.data_path = [data[1][-1]]
    rows += built_rows(args, monkeypatch)
    weighted = ["0.9", data[0][-1], "0.1", data[1][-1]]
    length = prepared(
        copy.deepcopy(args), train_epochs=3.0, global_batch_size=1, data_path=weighted
    )
    assert length.train_iters == 3 * rows
    once = prepared(
        args, train_epochs=1.0, global_batch_size=1, data_path=[data[0][-1], data[1][-1]]
    )
    assert once.train_iters == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": 5}, "--train-epochs and --train-iters both say how long"),
        ({"train_samples": 5}, "--train-epochs and --train-samples both say how long"),
        ({"train_epochs": 0.0}, r"--train-epochs is 0.0; it must be above 0"),
        ({"train_epochs": float("inf")}, "--train-epochs is inf"),
        ({"train_epochs": 0.01}, r"do not fill a global batch of 8; lower --global-batch-size"),
        ({"data_path": None}, r"needs training data; pass --data-path"),
        ({"split": None}, r"needs --split"),
        ({"dataset_provider": "a:b"}, "does not say how long an epoch is; pass --train-iters"),
        ({"train_epochs": 2.0, "data_path": "both"}, "put a weight before each path"),
    ],
    ids=str,
)
def test_what_is_refused(
    changes: dict[str, Any], message: str, args: argparse.Namespace, data: list[list[str]]
) -> None:
    if changes.get("data_path") == "both":
        changes = {**changes, "data_path": [data[0][-1], data[1][-1]]}
    with pytest.raises(ConfigError, match=message):
        prepared(args, **{"train_epochs": 1.0, "global_batch_size": 8, **changes})


@pytest.mark.distributed
@pytest.mark.parametrize("interval", [1, 3])
def test_the_log_says_epoch_and_fraction(
    interval: int, tmp_path: Path, data: list[list[str]]
) -> None:
    """On a stage pipeline, whose last stage logs, and with tensor parallel ranks that read none."""
    flags = [*MODEL_FLAGS, *data[0][:-1], "0.7", data[0][-1], "0.3", data[1][-1]]
    flags += "--seq-length 64 --max-position-embeddings 64 --micro-batch-size 2".split()
    flags += "--global-batch-size 8 --lr 1e-3 --num-workers 0".split()
    flags += ["--log-interval", str(interval)]
    flags += "--split 100,0,0 --eval-iters 0 --no-one-logger --train-epochs 1.5".split()
    flags += ["--tensor-model-parallel-size", "2", "--data-cache-path", str(tmp_path / "cache")]
    run_ranks(flags, 2, {}, tmp_path)
    first, last = ((tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))
    found = re.search(r"--train-epochs 1.5: (\d+) rows an epoch, so --train-iters (\d+)", first)
    assert found is not None
    rows, iterations = map(int, found.groups())
    assert iterations == 3 * rows // 2 // 8
    epochs = f"{iterations * 8 / rows:.4g}"
    assert re.search(
        rf"> training: {epochs} epochs of {rows} rows; .*one/data [\d.]+ times; ", first
    )
    shown = [float(value) for value in re.findall(r"\| epoch: (\S+) \|", last)]
    trained = [8 * (step + 1) / rows for step in range(iterations)]
    trained = [trained[0], *trained[2::3]] if interval == 3 else trained
    assert shown == pytest.approx(trained, rel=1e-5)
