"""The order of a whole run, over epochs, of one packed dataset and of blends of several."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_multiturn import row_order
from megatron_multiturn.batches import BatchSchedule
from megatron_multiturn.blends import leaves_of, plan_digest
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.packing import PieceTable, pack
from megatron_multiturn.row_order import BalancedRows, balance_rows, end_of_window

SHARES_A_FOLDER = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Packed:
    """A packed dataset: only its plan, and rows that say which they are."""

    index_split = "train"

    def __init__(self, num_sessions: int, num_epochs: int, seed: int = 0, name: str = "a") -> None:
        rng = np.random.default_rng([seed, num_sessions])
        pieces = PieceTable(
            session=np.arange(num_sessions, dtype=np.int32),
            num_tokens=rng.geometric(1 / 60, num_sessions).clip(1, 256).astype(np.int32) + 1,
            cut_spans=np.zeros((0, 4), dtype=np.int32),
        )
        self.plan = pack(pieces, sequence_length=256, seed=seed, num_epochs=num_epochs)
        self.config = argparse.Namespace(sequence_length=256, piece_multiple=1)
        self.dataset = argparse.Namespace(manifest=argparse.Namespace(to_json=lambda: name))
        self.name = name

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, row: int) -> tuple[str, int]:
        return self.name, row


class Blend:
    """A blend as Megatron's: which dataset each row is from, and which of its rows it is."""

    split = "train"

    def __init__(self, datasets: list[Packed], dataset_index: Any) -> None:
        self.datasets = datasets
        self.dataset_index = np.asarray(dataset_index, dtype=np.int16)
        self.dataset_sample_index = np.zeros(len(self.dataset_index), dtype=np.int64)
        for index in range(len(datasets)):
            here = self.dataset_index == index
            self.dataset_sample_index[here] = np.arange(here.sum())
        self.unique_description_hash = f"{len(dataset_index)} rows"

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, row: int) -> tuple[str, int]:
        return self.datasets[self.dataset_index[row]][int(self.dataset_sample_index[row])]


def ordered(
    rows: Any, schedule: BatchSchedule, folder: Path, *, micro_batch_size: int = 1, **given: Any
) -> BalancedRows:
    fields = {"seed": 3, "has_weights": False, **given}
    return balance_rows(rows, schedule, micro_batch_size=micro_batch_size, folder=folder, **fields)


def batches_of(rows: BalancedRows) -> list[Counter[Any]]:
    """The rows of every whole batch."""
    found, begin = [], 0
    while (stop := rows.schedule.end_of_batches(begin, 1)) <= len(rows):
        found.append(Counter(rows[index] for index in range(begin, stop)))
        begin = stop
    return found


schedules = st.sampled_from(
    [((0, 8),), ((0, 6),), ((0, 1),), ((0, 4), (12, 8), (44, 16)), ((0, 500),)]
)


@SHARES_A_FOLDER
@given(steps=schedules, num_sessions=st.integers(1, 400), seed=st.integers(0, 5))
def test_the_batches_of_a_run(
    steps: tuple[tuple[int, int], ...], num_sessions: int, seed: int, tmp_path: Path
) -> None:
    """Every epoch holds every row once; a longer run, or another layout, has the same batches."""
    schedule = BatchSchedule(steps)
    rows = ordered(Packed(num_sessions, 3, seed), schedule, tmp_path)
    per_epoch = len(rows) // 3
    seen = [rows.row_at(index) for index in range(len(rows))]
    for epoch in range(3):
        # A batch over the end of an epoch may hold the rows of both in any order.
        begin = schedule.batch_of(epoch * per_epoch)[0]
        stop = sum(schedule.batch_of((epoch + 1) * per_epoch - 1))
        of_epoch = [row for row in seen[begin:stop] if row // per_epoch == epoch]
        assert sorted(of_epoch) == list(range(epoch * per_epoch, (epoch + 1) * per_epoch))
    longer = ordered(Packed(num_sessions, 4, seed), schedule, tmp_path)
    assert batches_of(longer)[: len(batches_of(rows))] == batches_of(rows)
    assert longer.digest() == rows.digest()
    for micro_batch_size in (2, 4):
        other = ordered(
            Packed(num_sessions, 3, seed), schedule, tmp_path, micro_batch_size=micro_batch_size
        )
        assert batches_of(other) == batches_of(rows)


def read_by_ranks(
    rows: BalancedRows, ranks: int, micro_batch_size: int, consumed: int
) -> list[list[Any]]:
    """The rows that each rank reads, by Megatron's sampler, until there are no more."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    return [
        [
            rows[index]
            for micro_batch in MegatronPretrainingSampler(
                total_samples=len(rows),
                consumed_samples=consumed,
                micro_batch_size=micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
            for index in micro_batch
        ]
        for rank in range(ranks)
    ]


@SHARES_A_FOLDER
@given(layout=st.sampled_from([(1, 16), (2, 2), (4, 4), (8, 1), (16, 1)]), step=st.integers(0, 8))
def test_from_any_step_any_layout_reads_the_same_batches(
    layout: tuple[int, int], step: int, tmp_path: Path
) -> None:
    """Over the ends of two epochs of 70 rows or so, in batches of 16."""
    ranks, micro_batch_size = layout
    schedule = BatchSchedule(((0, 16),))
    expected = batches_of(ordered(Packed(300, 3), schedule, tmp_path))
    assert len(expected) > 8
    rows = ordered(Packed(300, 3), schedule, tmp_path, micro_batch_size=micro_batch_size)
    read = read_by_ranks(rows, ranks, micro_batch_size, 16 * step)
    share = 16 // ranks
    for number, batch in enumerate(expected[step:]):
        of_ranks = [of_rank[number * share : (number + 1) * share] for of_rank in read]
        assert Counter(row for of_rank in of_ranks for row in of_rank) == batch


def test_the_order_depends_on_seed_and_batch_size(tmp_path: Path) -> None:
    def batches(size: int, seed: int) -> list[Counter[Any]]:
        schedule = BatchSchedule(((0, size),))
        return batches_of(ordered(Packed(900, 2), schedule, tmp_path, seed=seed))

    assert batches(16, 1) == batches(16, 1) != batches(16, 2)
    pairs = batches(8, 1)
    merged = [one + two for one, two in zip(pairs[::2], pairs[1::2], strict=False)]
    assert merged != batches(16, 1)


def test_a_blend_by_weights_keeps_the_epochs_of_its_datasets(tmp_path: Path) -> None:
    """A small one is repeated often, also within a window; each in whole epochs, one by one."""
    schedule = BatchSchedule(((0, 8),))
    num_rows = end_of_window(schedule, 3000)
    assert num_rows == 4096
    index = (np.random.default_rng(0).random(num_rows) < 0.1).astype(int)
    datasets = [Packed(9000, 3, name="large"), Packed(150, 14, name="small")]
    large, small = (leaf.plan.stats.num_rows for leaf in datasets)
    assert small < 50 < 0.1 * num_rows / 8
    assert large < num_rows < len(datasets[0])
    rows = ordered(Blend(datasets, index), schedule, tmp_path, has_weights=True)
    assert len(rows) == num_rows
    for name, per_epoch, share in (("large", large, 0.9), ("small", small, 0.1)):
        epochs = [
            sorted(row // per_epoch for origin, row in batch.elements() if origin == name)
            for batch in batches_of(rows)
        ]
        flat = [epoch for batch in epochs for epoch in batch]
        assert flat == sorted(flat)
        assert len(set(flat)) > 1
        taken = Counter(
            row for batch in batches_of(rows) for origin, row in batch.elements() if origin == name
        )
        assert max(taken.values()) == 1
        assert set(taken) == set(range(len(taken)))  # the first so many rows, none left out
        assert len(taken) == pytest.approx(share * num_rows, rel=0.1)


def test_a_longer_blend_begins_with_the_shorter(tmp_path: Path) -> None:
    schedule = BatchSchedule(((0, 4),))
    index = (np.random.default_rng(0).random(2048) < 0.3).astype(int)
    datasets = [Packed(5000, 2, name="one"), Packed(2000, 2, name="two")]
    short, long = (
        ordered(Blend(datasets, index[:n]), schedule, tmp_path, has_weights=True)
        for n in (1024, 2048)
    )
    assert batches_of(long)[:256] == batches_of(short)
    assert len(batches_of(long)) == 512
    assert long.digest() == short.digest()


def test_a_blend_without_weights_is_balanced_as_a_whole(tmp_path: Path) -> None:
    datasets = [Packed(3000, 1, seed, name) for seed, name in enumerate(("one", "two", "three"))]
    lengths = [len(leaf) for leaf in datasets]
    index = np.random.default_rng(0).permutation(np.repeat(np.arange(3), lengths))
    rows = ordered(Blend(datasets, index), BatchSchedule(((0, 16),)), tmp_path)
    assert sorted(rows.row_at(i) for i in range(len(rows))) == list(range(sum(lengths)))
    measured = rows.imbalance(data_parallel_size=4)
    assert measured is not None
    before, after = measured
    assert after.mean < 1.02 < 1.1 < before.mean
    assert leaves_of(rows) == datasets


def test_batches_are_even_in_every_epoch(tmp_path: Path) -> None:
    """Epochs do not begin with a batch."""
    schedule = BatchSchedule(((0, 16),))
    rows = ordered(Packed(9000, 3), schedule, tmp_path)
    assert (len(rows) // 3) % 16
    for epoch in range(3):
        measured = rows.imbalance(8, begin=epoch * len(rows) // 3)
        assert measured is not None
        before, after = measured
        assert after.mean < 1.01 < 1.1 < before.mean
        assert after.worst < 1.03


def test_the_imbalance_is_of_the_batches_to_come(tmp_path: Path) -> None:
    schedule = BatchSchedule(((0, 4), (400, 16)))
    rows = ordered(Packed(9000, 1), schedule, tmp_path)
    assert rows.imbalance(4) != rows.imbalance(4, begin=400)
    assert rows.imbalance(8) is None  # 4 rows for 8 ranks
    late = rows.imbalance(8, begin=400)
    assert late is not None
    assert late[1].mean < late[0].mean
    assert rows.imbalance(4, begin=len(rows) - 1) is None


def test_the_order_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = BatchSchedule(((0, 8),))
    first = ordered(Packed(300, 2), schedule, tmp_path)

    def never(*arguments: object) -> None:
        raise AssertionError("the order was made again")

    monkeypatch.setattr(row_order, "_build", never)
    again = ordered(Packed(300, 2), schedule, tmp_path, micro_batch_size=4)
    assert again.digest() == first.digest()
    assert isinstance(again._order.base, np.memmap)
    for other in (Packed(301, 2), Packed(300, 3), Packed(300, 2, seed=1), Packed(300, 2, name="b")):
        with pytest.raises(AssertionError, match="made again"):
            ordered(other, schedule, tmp_path)
    with pytest.raises(AssertionError, match="made again"):
        ordered(Packed(300, 2), schedule, tmp_path, seed=4)


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"cannot keep the order of rows.*--data-cache-path"):
        ordered(Packed(30, 1), BatchSchedule(((0, 8),)), tmp_path / "file" / "cache")


def test_a_plan_is_named_by_its_first_epoch() -> None:
    assert plan_digest(Packed(300, 1).plan) == plan_digest(Packed(300, 3).plan)
    assert plan_digest(Packed(300, 1).plan) != plan_digest(Packed(300, 1, seed=1).plan)
