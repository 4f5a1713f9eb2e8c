"""What the log and TensorBoard show, against the rows, and equal on every layout."""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_jobs import make_dataset, train_and_record, train_sentencepiece, word_sessions

STEPS, GLOBAL_BATCH_SIZE, NUM_TURN_INDICES = 2, 4, 6
SPLIT = "70,30,0"
FLAGS = (
    "--seq-length 64 --max-position-embeddings 64 "
    f"--global-batch-size {GLOBAL_BATCH_SIZE} --log-turn-index {NUM_TURN_INDICES} "
    f"--split {SPLIT} --eval-iters 1 --eval-interval {STEPS}"
)
LAYOUTS = {
    "micro-batch 4": (1, "--micro-batch-size 4"),
    "CP2": (2, "--micro-batch-size 1 --context-parallel-size 2"),
    "DP2, PP2": (4, "--micro-batch-size 1 --pipeline-model-parallel-size 2"),
    "TP2, evaluated by 2": (
        2,
        "--micro-batch-size 1 --tensor-model-parallel-size 2 --eval-micro-batch-size 2",
    ),
}


def sessions() -> list[dict[str, object]]:
    """40 sessions of 1 to 5 turns, of 1 to 7 words each."""
    return word_sessions(
        [[1 + (index + 3 * turn) % 7 for turn in range(1 + index % 5)] for index in range(40)]
    )


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    texts = [m["content"] for s in sessions() for m in s["messages"]]  # type: ignore[attr-defined]
    return make_dataset(folder, sessions(), train_sentencepiece(folder, texts, vocab_size=60))


Curves = dict[str, list[float]]


def train(
    folder: Path, data_flags: list[str], layout: str, ranks: int, initial: Path | None = None
) -> Curves:
    """Train and evaluate; what TensorBoard then shows, by name, a value a step.

    Of the evaluations the first alone: Megatron flushes TensorBoard before the last.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = folder / "tensorboard"
    train_and_record(
        folder,
        [*data_flags, *FLAGS.split(), *layout.split(), "--tensorboard-dir", str(board)],
        train_iters=STEPS,
        num_ranks=ranks,
        env={"INITIAL_PARAMETERS": str(initial)} if initial else None,
    )
    events = EventAccumulator(str(board))
    events.Reload()
    curves = {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return {name: c[:1] if "validation" in name else c for name, c in curves.items()}


@pytest.fixture(scope="module")
def one_rank(
    data_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Curves]:
    folder = tmp_path_factory.mktemp("one-rank")
    return folder, train(folder, data_flags, "--micro-batch-size 1", 1)


def rows_of_step(prefix: str, folder: Path, step: int, split: str) -> list[dict[str, Any]]:
    from megatron.core.datasets.utils import Split

    from megatron_multiturn.batches import BatchSchedule
    from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
    from megatron_multiturn.row_order import balance_rows

    config = MultiTurnDatasetConfig(
        random_seed=7,
        sequence_length=64,
        blend=([prefix], None),
        split=SPLIT,
        path_to_cache=str(folder / "cache"),
    )
    store = MultiTurnDataset.build_low_level_dataset(prefix, config)
    bounds = {"train": (0, 28), "valid": (28, 40)}[split]
    rows: Any = MultiTurnDataset(
        store,
        prefix,
        np.arange(*bounds, dtype=np.int32),
        STEPS * GLOBAL_BATCH_SIZE,
        Split[split],
        config,
    )
    if split == "train":
        rows = balance_rows(
            rows,
            BatchSchedule(((0, GLOBAL_BATCH_SIZE),)),
            seed=7,
            micro_batch_size=1,
            has_weights=False,
            folder=folder / "cache",
        )
    return [rows[step * GLOBAL_BATCH_SIZE + k] for k in range(GLOBAL_BATCH_SIZE)]


def turns_by_index(rows: list[dict[str, Any]]) -> dict[int, int]:
    """Number of first, second, ... turns: a turn of n targets is n-th of a turn at each."""
    shares: dict[int, float] = defaultdict(float)
    for row in rows:
        for index, length in zip(row["turn_index"], row["turn_token_num"], strict=True):
            if index:
                shares[int(index)] += 1 / length
    return {index: round(share) for index, share in shares.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("step", range(STEPS))
def test_training_shows_what_the_rows_hold(
    step: int, data_flags: list[str], one_rank: tuple[Path, Curves]
) -> None:
    folder, curves = one_rank
    rows = rows_of_step(data_flags[-1], folder, step, "train")
    numbers = turns_by_index(rows)
    assert curves["turns"][step] == pytest.approx(sum(numbers.values()), rel=1e-6)
    assert curves["turns"][step] == pytest.approx(sum(int(row["turn_num"][0]) for row in rows))
    assert curves["target tokens"][step] == sum(row["loss_mask"].sum() for row in rows)
    # The mean over all turns is the mean of the means over the first, second, ... turns.
    assert len(numbers) >= 3
    total = sum(numbers[k] * curves[f"turn {k} loss"][step] for k in numbers)
    assert total / sum(numbers.values()) == pytest.approx(curves["lm loss"][step], rel=1e-5)
    assert max(numbers) < NUM_TURN_INDICES
    assert math.isnan(curves[f"turn {NUM_TURN_INDICES} loss"][step])


@pytest.mark.distributed
def test_evaluation_shows_the_same(data_flags: list[str], one_rank: tuple[Path, Curves]) -> None:
    folder, curves = one_rank
    rows = rows_of_step(data_flags[-1], folder, 0, "valid")
    numbers = turns_by_index(rows)
    shown = {name: curves[f"{name} validation"][0] for name in ("turns", "target tokens")}
    assert shown["turns"] == pytest.approx(sum(numbers.values()), rel=1e-6)
    assert shown["target tokens"] == sum(row["loss_mask"].sum() for row in rows)
    total = sum(numbers[k] * curves[f"turn {k} loss validation"][0] for k in numbers)
    expected = curves["lm loss validation"][0]
    assert total / sum(numbers.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_show_the_same(
    layout: str, data_flags: list[str], one_rank: tuple[Path, Curves], tmp_path: Path
) -> None:
    folder, expected = one_rank
    num_ranks, flags = LAYOUTS[layout]
    curves = train(tmp_path, data_flags, flags, num_ranks, folder / "initial")
    reported = [name for name in expected if re.search(r"loss|turns|target tokens", name)]
    assert len(reported) > 2 * (2 + NUM_TURN_INDICES)
    for name in set(reported) - {"loss-scale", "loss-scale vs samples"}:
        assert curves[name] == pytest.approx(expected[name], rel=1e-6, nan_ok=True), name


@pytest.mark.distributed
def test_the_log_shows_no_perplexity_of_a_count(one_rank: tuple[Path, Curves]) -> None:
    log = (one_rank[0] / "rank-0.log").read_text()
    line = re.search(r"validation loss at iteration.*", log)
    assert line is not None
    assert "turns value: " in line[0]
    assert "token loss PPL: " in line[0]
    assert "turns PPL" not in log
    assert "target tokens PPL" not in log
