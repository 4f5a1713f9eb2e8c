"""The pack plan: best-fit-decreasing, exactly, and every piece once an epoch."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.packing import PackPlan, PieceTable, pack


def pieces_of(positions: list[int] | NDArray[np.int64]) -> PieceTable:
    """One whole session of `positions[i] + 1` tokens a piece."""
    return PieceTable(
        session=np.arange(len(positions), dtype=np.int32),
        num_tokens=np.array(positions, dtype=np.int32) + np.int32(1),
        cut_spans=np.zeros((0, 4), dtype=np.int32),
    )


def rows_of(plan: PackPlan, epoch: int = 0) -> list[list[int]]:
    """The pieces of each row of one epoch."""
    rows = range(epoch * plan.stats.num_rows, (epoch + 1) * plan.stats.num_rows)
    return [plan.pieces_of_row(row).tolist() for row in rows]


def row_contents(plan: PackPlan, epoch: int = 0) -> list[list[int]]:
    """The lengths of the pieces of each row of one epoch, sorted: what the rows are made of."""
    positions = plan.pieces.num_positions()
    return sorted([positions[row].tolist() for row in rows_of(plan, epoch)])


def naive_best_fit_decreasing(positions: list[int], capacity: int) -> list[list[int]]:
    """One piece after the other, looking at every row; of two rows with the same room left, the
    one that came to it first is taken."""
    rows: list[list[int]] = []
    arrived: list[int] = []
    for step, length in enumerate(sorted(positions, reverse=True)):
        fitting = [row for row in range(len(rows)) if sum(rows[row]) + length <= capacity]
        if fitting:
            best = min(fitting, key=lambda row: (capacity - sum(rows[row]), arrived[row]))
            rows[best].append(length)
            arrived[best] = step
        else:
            rows.append([length])
            arrived.append(step)
    return sorted(rows)


def test_the_worked_example() -> None:
    plan = pack(pieces_of([3, 6, 3, 4, 6, 3]), sequence_length=10, seed=0)
    assert row_contents(plan) == [[3, 3], [6, 3], [6, 4]]


def test_it_is_best_fit_decreasing_exactly() -> None:
    rng = np.random.default_rng(2)
    differs_from_first_fit = 0
    for _ in range(250):
        capacity = int(rng.integers(1, 60))
        longest = int(rng.integers(1, capacity + 1))
        positions = rng.integers(1, longest + 1, size=int(rng.integers(1, 120))).tolist()
        expected = naive_best_fit_decreasing(positions, capacity)
        plan = pack(pieces_of(positions), sequence_length=capacity, seed=0)
        assert row_contents(plan) == expected
        differs_from_first_fit += expected != _first_fit_decreasing(positions, capacity)
    assert differs_from_first_fit > 20


def _first_fit_decreasing(positions: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for length in sorted(positions, reverse=True):
        row = next((row for row in rows if sum(row) + length <= capacity), None)
        if row is None:
            rows.append([length])
        else:
            row.append(length)
    return sorted(rows)


def test_pieces_are_rounded_up_to_the_multiple_before_packing() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        multiple = int(rng.integers(2, 9))
        units = int(rng.integers(1, 20))
        positions = rng.integers(1, units * multiple + 1, size=60).tolist()
        plan = pack(
            pieces_of(positions), sequence_length=units * multiple, piece_multiple=multiple, seed=0
        )
        rounded = [-(-length // multiple) * multiple for length in positions]
        expected = naive_best_fit_decreasing(rounded, units * multiple)
        got = sorted([[rounded[piece] for piece in row] for row in rows_of(plan)])
        assert got == expected
        assert plan.stats.num_positions_rounded == sum(rounded)
        assert plan.stats.num_positions == sum(positions)


def test_a_piece_as_long_as_the_row_fits_whatever_the_multiple() -> None:
    plan = pack(pieces_of([15, 16, 1]), sequence_length=16, piece_multiple=4, seed=0)
    assert row_contents(plan) == [[1], [15], [16]]


@pytest.fixture(scope="module")
def plan() -> PackPlan:
    lengths = np.random.default_rng(4).geometric(1 / 150, size=20_000).clip(1, 1024)
    return pack(pieces_of(lengths), sequence_length=1024, seed=7, num_epochs=3)


def test_every_epoch_holds_every_piece_once(plan: PackPlan) -> None:
    for epoch in range(3):
        pieces = [piece for row in rows_of(plan, epoch) for piece in row]
        assert sorted(pieces) == list(range(20_000))


def test_no_row_overflows(plan: PackPlan) -> None:
    filled = np.add.reduceat(
        plan.pieces.num_positions()[plan.row_pieces].astype(np.int64), plan.row_offsets[:-1]
    )
    assert filled.max() <= 1024
    assert plan.num_rows == 3 * plan.stats.num_rows == len(filled)


def test_rows_are_within_a_thousandth_of_the_lower_bound(plan: PackPlan) -> None:
    lower_bound = -(-int(plan.pieces.num_positions().sum()) // 1024)
    assert plan.stats.min_num_rows == lower_bound
    assert lower_bound <= plan.stats.num_rows <= lower_bound * 1.001


def test_the_statistics(plan: PackPlan) -> None:
    stats = plan.stats
    assert stats.num_pieces == 20_000
    assert stats.fill == pytest.approx(
        plan.pieces.num_positions().sum() / (stats.num_rows * 1024), rel=1e-12
    )
    assert stats.max_pieces_per_row == max(map(len, rows_of(plan)))
    assert f"{stats.num_rows:,} rows" in str(stats)


def test_epochs_have_the_same_rows_of_other_pieces(plan: PackPlan) -> None:
    assert row_contents(plan, 0) == row_contents(plan, 1) == row_contents(plan, 2)
    neighbours = [
        {frozenset(row) for row in rows_of(plan, epoch) if len(row) > 1} for epoch in range(3)
    ]
    assert len(neighbours[0]) > 1000
    assert len(neighbours[0] & neighbours[1]) < len(neighbours[0]) / 20
    lengths_in_order = [
        [len(row) for row in rows_of(plan, epoch)] for epoch in range(3)
    ]  # the rows are shuffled too
    assert lengths_in_order[0] != lengths_in_order[1]


def test_a_longer_plan_begins_with_the_shorter_one(plan: PackPlan) -> None:
    shorter = pack(plan.pieces, sequence_length=1024, seed=7, num_epochs=2)
    np.testing.assert_array_equal(shorter.row_pieces, plan.row_pieces[: len(shorter.row_pieces)])
    np.testing.assert_array_equal(shorter.row_offsets, plan.row_offsets[: len(shorter.row_offsets)])


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 7])
def test_there_are_as_many_epochs_as_rows_are_wanted(plan: PackPlan, wanted: int) -> None:
    rows = wanted * plan.stats.num_rows // 2
    made = pack(plan.pieces, sequence_length=1024, seed=7, at_least_rows=rows)
    assert made.num_rows == max(1, -(-wanted // 2)) * plan.stats.num_rows >= rows


def test_another_seed_is_another_plan(plan: PackPlan) -> None:
    other = pack(plan.pieces, sequence_length=1024, seed=8)
    assert row_contents(other) == row_contents(plan)
    assert rows_of(other) != rows_of(plan)


def test_every_piece_of_a_length_can_come_to_every_slot_of_it() -> None:
    neighbours: Counter[int] = Counter()
    plan = pack(pieces_of([9, 1, 1, 1]), sequence_length=10, seed=0, num_epochs=600)
    for epoch in range(600):
        (row,) = (row for row in rows_of(plan, epoch) if 0 in row)
        neighbours[row[1]] += 1
    assert set(neighbours) == {1, 2, 3}
    assert min(neighbours.values()) > 150


def test_long_rows_use_the_wide_sort() -> None:
    plan = pack(pieces_of([100_000, 30_000, 1, 70_000]), sequence_length=100_000, seed=0)
    assert row_contents(plan) == [[1], [70_000, 30_000], [100_000]]


def test_no_pieces_make_no_rows() -> None:
    plan = pack(pieces_of([]), sequence_length=8, seed=0, num_epochs=2)
    assert plan.num_rows == 0
    assert plan.row_offsets.tolist() == [0]
    assert plan.stats.fill == 0


def test_dtypes(plan: PackPlan) -> None:
    assert plan.row_offsets.dtype == np.int64
    assert plan.row_pieces.dtype == np.int32


@pytest.mark.parametrize(("sequence_length", "multiple"), [(10, 4), (0, 1), (8, 0)])
def test_sequence_length_must_be_a_multiple(sequence_length: int, multiple: int) -> None:
    with pytest.raises(ConfigError, match="--seq-length"):
        pack(pieces_of([1]), sequence_length=sequence_length, piece_multiple=multiple, seed=0)


@pytest.mark.parametrize("positions", [[3, 9], [0, 3]])
def test_pieces_that_were_not_cut_are_refused(positions: list[int]) -> None:
    with pytest.raises(DatasetError, match="cut the sessions"):
        pack(pieces_of(positions), sequence_length=8, seed=0)


def test_no_epochs() -> None:
    with pytest.raises(ConfigError, match="at least one epoch"):
        pack(pieces_of([1]), sequence_length=8, seed=0, num_epochs=0)
