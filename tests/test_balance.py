"""The order of rows: whole batches of like cost on any layout, and every row once."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_multiturn.balance import (
    balanced_order,
    choose_group_size,
    keep_epochs,
    measure_imbalance,
    row_costs,
    row_in_batch,
)
from megatron_multiturn.batches import BatchSchedule
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.packing import PieceTable, pack

SEQUENCE_LENGTH = 32_768
BATCH_SIZE = 64

# (rows consumed, batch size), the first from 0 on.
thresholds = st.builds(
    lambda first, later: [(0, first), *sorted(later.items())],
    st.integers(1, 12),
    st.dictionaries(st.integers(1, 200), st.integers(1, 24), max_size=3),
)


def batch_starts(given_thresholds: list[tuple[int, int]], stop: int) -> list[int]:
    """Where batches begin, by Megatron's rule: the size depends on the rows consumed so far."""
    starts = [0]
    while starts[-1] < stop:
        sizes = [size for threshold, size in given_thresholds if starts[-1] >= threshold]
        starts.append(starts[-1] + sizes[-1])
    return starts


@given(thresholds, st.integers(0, 300), st.integers(1, 300))
def test_batches_begin_where_megatrons_do(
    given_thresholds: list[tuple[int, int]], begin: int, num_rows: int
) -> None:
    schedule = BatchSchedule.from_thresholds(given_thresholds)
    starts = batch_starts(given_thresholds, begin + num_rows)
    event(f"{len(schedule.steps)} sizes of {len(given_thresholds)}")
    for start, after in pairwise(starts):
        for row in {start, after - 1}:
            assert schedule.batch_of(row) == (start, after - start)
    for number in range(len(starts)):
        assert schedule.end_of_batches(0, number) == starts[number]
    stretches = schedule.stretches(begin, begin + num_rows)
    covered = [row for s in stretches for row in range(s.begin, s.begin + s.num_rows)]
    assert covered == list(range(begin, begin + num_rows))
    for stretch in stretches:
        first, size = schedule.batch_of(stretch.begin)
        assert (first, size) == (stretch.begin - stretch.offset, stretch.batch_size)
        last = schedule.batch_of(stretch.begin + stretch.num_rows - 1)
        assert last[1] == size
        if stretch.is_whole:
            assert stretch.begin in starts
            assert last[0] + size == stretch.begin + stretch.num_rows
        else:
            assert last[0] == first  # a part of one batch


@pytest.mark.parametrize("bad", [[], [(1, 4)], [(0, 0)], [(0, 4), (8, -1)]])
def test_batch_sizes_that_cannot_be(bad: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError, match="must be positive, the first from 0"):
        BatchSchedule.from_thresholds(bad)


@settings(max_examples=200)
@given(thresholds, st.integers(1, 120), st.sampled_from(["equal", "heavy", "few"]), st.data())
def test_every_epoch_trains_every_row_once(
    given_thresholds: list[tuple[int, int]], num_rows: int, kind: str, data: st.DataObject
) -> None:
    schedule = BatchSchedule.from_thresholds(given_thresholds)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    costs = {
        "equal": np.ones(num_rows),
        "heavy": rng.pareto(1, num_rows),
        "few": rng.integers(0, 3, num_rows).astype(float),
    }[kind]
    sizes = {size: choose_group_size(costs, size) for size in schedule.sizes()}
    parts = Counter[str]()
    for epoch in range(3):
        stretches = schedule.stretches(epoch * num_rows, (epoch + 1) * num_rows)
        parts.update("whole" if stretch.is_whole else "part" for stretch in stretches)
        order = balanced_order(costs, stretches, group_sizes=sizes, seed=[5, epoch])
        assert sorted(order.tolist()) == list(range(num_rows))
        again = balanced_order(costs, stretches, group_sizes=sizes, seed=[5, epoch])
        assert np.array_equal(again, order)
    event(f"{kind}, {'+'.join(sorted(parts))}")
    assert all(size % group == 0 for size, group in sizes.items())


def test_the_cases_above_hold_whole_batches_and_parts_of_some() -> None:
    schedule = BatchSchedule.from_thresholds([(0, 4), (20, 8)])
    kinds = [(s.is_whole, s.offset, s.num_rows) for s in schedule.stretches(13, 53)]
    assert kinds == [(False, 1, 3), (True, 0, 4), (True, 0, 32), (False, 0, 1)]


@given(st.integers(1, 96), st.data())
def test_a_micro_batch_size_changes_no_batch(batch_size: int, data: st.DataObject) -> None:
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    group_size = data.draw(st.sampled_from(divisors))
    micro_batch_size = data.draw(st.sampled_from(divisors))
    rows = [
        row_in_batch(
            place,
            batch_size=batch_size,
            group_size=group_size,
            micro_batch_size=micro_batch_size,
        )
        for place in range(batch_size)
    ]
    assert sorted(rows) == list(range(batch_size))
    if micro_batch_size == 1:
        assert rows == list(range(batch_size))
    # A rank's rows are of as many groups as can be.
    num_groups = batch_size // group_size
    for begin in range(0, batch_size, micro_batch_size):
        groups = {row // group_size for row in rows[begin : begin + micro_batch_size]}
        assert len(groups) >= np.gcd(num_groups, micro_batch_size)


def test_groups_are_interleaved_for_larger_micro_batches() -> None:
    def order(micro_batch_size: int) -> str:
        return "".join(
            "aaabbbcccddd"[
                row_in_batch(place, batch_size=12, group_size=3, micro_batch_size=micro_batch_size)
            ]
            for place in range(12)
        )

    assert order(1) == "aaabbbcccddd"
    assert order(2) == "acacacbdbdbd"
    assert order(4) == "abcdabcdabcd"


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=60),
    st.integers(0, 99),
)
def test_epochs_stay_one_after_the_other(drawn: list[tuple[int, int]], seed: int) -> None:
    """Of each dataset, at the places it had, whatever the order was."""
    rng = np.random.default_rng(seed)
    datasets = np.array([dataset for dataset, _ in drawn])
    epochs = np.array([epoch for _, epoch in drawn])
    costs = rng.random(len(drawn))
    order = rng.permutation(len(drawn))
    kept = keep_epochs(order, costs, epochs, datasets)
    assert sorted(kept.tolist()) == list(range(len(drawn)))
    assert np.array_equal(datasets[kept], datasets[order])
    for dataset in set(datasets.tolist()):
        of_dataset = epochs[kept[datasets[kept] == dataset]]
        assert np.all(np.diff(of_dataset) >= 0)
        event("several epochs" if len(set(of_dataset.tolist())) > 1 else "one epoch")


def test_a_place_keeps_its_cost() -> None:
    """Two epochs of the same costs, in an order of falling cost: the costs stay as they are."""
    costs = np.repeat([8.0, 4.0, 2.0, 1.0], 4)
    epochs = np.tile([0, 1], 8)
    order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
    rng = np.random.default_rng(0)
    mixed = np.concatenate([rng.permutation([0, 4, 8, 12]) + shift for shift in (1, 0, 3, 2)])
    assert np.array_equal(keep_epochs(order, costs, epochs, np.zeros(16, dtype=int)), order)
    kept = keep_epochs(mixed, costs, epochs, np.zeros(16, dtype=int))
    assert np.array_equal(costs[kept], costs[mixed])


def test_the_cost_of_a_row_is_that_of_its_attention() -> None:
    """Of its pieces, rounded up where ranks share them, and of the padding at its end."""
    offsets, positions = np.array([2, 4, 5]), np.array([3, 4, 5])
    assert row_costs(offsets, positions, sequence_length=7).tolist() == [9 + 16, 25 + 4]
    rounded = row_costs(offsets, positions, sequence_length=12, piece_multiple=4)
    assert rounded.tolist() == [16 + 16 + 16, 64 + 16]
    assert row_costs(np.array([0]), positions[:0], sequence_length=7).tolist() == []


def test_the_measure_is_megatrons_sampler() -> None:
    """By hand: ranks 0 and 1 read rows 0 1 | 2 3 and then 4 5 | 6 7."""
    costs = np.array([[1.0, 1, 2, 2, 3, 3, 1, 1]])
    measured = measure_imbalance(costs, data_parallel_size=2, micro_batch_size=2)
    assert measured.mean == measured.worst == pytest.approx(8 / 7)  # 2 + 6 against 4 + 2
    assert measured.micro_steps == pytest.approx((4 + 6) / 7)
    assert measure_imbalance(costs, data_parallel_size=1).mean == 1


def corpus_costs(sigma: float, near_row: float) -> NDArray[np.float64]:
    """Row costs of 10^5 sessions, log-normal around 700 tokens; some as long as a row, nearly."""
    rng = np.random.default_rng(1)
    lengths = np.exp(np.log(700) + sigma * rng.standard_normal(100_000)).round()
    is_near = rng.random(100_000) < near_row
    lengths[is_near] = rng.integers(int(0.9 * SEQUENCE_LENGTH), SEQUENCE_LENGTH + 1, is_near.sum())
    pieces = PieceTable(
        session=np.arange(len(lengths), dtype=np.int32),
        num_tokens=lengths.clip(2, SEQUENCE_LENGTH).astype(np.int32) + 1,
        cut_spans=np.zeros((0, 4), dtype=np.int32),
    )
    plan = pack(pieces, sequence_length=SEQUENCE_LENGTH, seed=0)
    assert plan.stats.fill >= 0.999
    positions = pieces.num_positions()[plan.row_pieces]
    return row_costs(plan.row_offsets, positions, sequence_length=SEQUENCE_LENGTH)


def test_ranks_wait_little() -> None:
    """Under 1% on average at most, on up to 8 ranks, for several micro-batch sizes."""
    for sigma, near_row in ((1.0, 0.0), (1.5, 0.0), (1.0, 0.05)):
        costs = corpus_costs(sigma, near_row)
        num_rows = len(costs)
        schedule = BatchSchedule(((0, BATCH_SIZE),))
        group_sizes = {BATCH_SIZE: choose_group_size(costs, BATCH_SIZE)}
        read = []
        for epoch in range(3):
            shuffled = np.random.default_rng(epoch).permutation(costs)
            window = schedule.stretches(epoch * num_rows, (epoch + 1) * num_rows)
            order = balanced_order(shuffled, window, group_sizes=group_sizes, seed=[1, epoch])
            read.append(shuffled[order])
        # Batches over the end of an epoch, of rows of both, are among them.
        flat = np.concatenate(read)
        batches = flat[: len(flat) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
        assert len(batches) > 100
        assert num_rows % BATCH_SIZE
        for micro_batch_size in (1, 2, 4):
            places = [
                row_in_batch(
                    place,
                    batch_size=BATCH_SIZE,
                    group_size=group_sizes[BATCH_SIZE],
                    micro_batch_size=micro_batch_size,
                )
                for place in range(BATCH_SIZE)
            ]
            for ranks in (2, 4, 8):
                found = measure_imbalance(
                    batches[:, places],
                    data_parallel_size=ranks,
                    micro_batch_size=micro_batch_size,
                )
                assert found.mean <= 1.01
                assert found.worst <= 1.10
                assert found.micro_steps <= 1.02
                assert found.variation <= 1.5 * costs.std() / costs.mean() / BATCH_SIZE**0.5
        # The same figures of rows in shuffled order, so that the check can fail.
        unordered = np.random.default_rng(0).permutation(batches.ravel()).reshape(batches.shape)
        assert measure_imbalance(unordered, data_parallel_size=8).mean > 1.3
        assert measure_imbalance(unordered, data_parallel_size=8).worst > 1.5


def test_groups_are_as_large_as_variation_allows() -> None:
    assert choose_group_size(np.ones(1000), 32) == 32
    rng = np.random.default_rng(0)
    assert 1 < choose_group_size(rng.pareto(2, 10_000), 64) < 64
    # Of few batches nothing can be said: an eighth of one.
    assert choose_group_size(rng.random(70), 64) == 8
    assert choose_group_size(rng.random(3), 7) == 1


def test_batches_are_put_together_anew_in_every_epoch() -> None:
    costs = np.random.default_rng(0).pareto(2, 6400)
    schedule = BatchSchedule(((0, 64),))
    size = {64: choose_group_size(costs, 64)}
    first, second = (
        balanced_order(
            costs, schedule.stretches(begin, begin + 6400), group_sizes=size, seed=[0, begin]
        )
        for begin in (0, 6400)
    )
    batches = [{frozenset(batch) for batch in order.reshape(-1, 64)} for order in (first, second)]
    assert not batches[0] & batches[1]


def test_a_batch_over_the_end_of_an_epoch_has_groups_of_like_cost() -> None:
    """Its parts know nothing of each other, and share a group: 3 rows of one, 5 of the other."""
    num_rows, schedule = 1003, BatchSchedule(((0, 64),))
    costs = np.arange(1.0, num_rows + 1)
    read = [
        costs[
            balanced_order(
                costs,
                schedule.stretches(begin, begin + num_rows),
                group_sizes={64: 8},
                seed=[4, epoch],
            )
        ]
        for epoch, begin in enumerate(range(0, 3 * num_rows, num_rows))
    ]
    batches = np.concatenate(read)[: 3 * num_rows // 64 * 64].reshape(-1, 8, 8)
    assert num_rows % 8 == 3
    spread = np.ptp(batches, axis=2)
    assert spread.max() <= 0.02 * num_rows
    # And one group of each stratum, as every other batch.
    for batch in (num_rows // 64, 2 * num_rows // 64):
        strata = (batches[batch].mean(axis=1) / num_rows * 8).astype(int)
        assert sorted(strata.tolist()) == list(range(8))
