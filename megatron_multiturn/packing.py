"""Packs pieces into rows: best-fit-decreasing on the histogram of piece lengths.

Best-fit-decreasing takes the pieces from the longest to the shortest and puts each one where the
least room is left that still holds it. Pieces of one length are alike, and so are rows with the
same room left, so both are kept as counts: the work depends on the sequence length, not on the
number of sessions. Worked example, rows of 10 positions and pieces 6 6 4 3 3 3:

    length 6, 2 pieces   no row yet: two new rows                 room 4 4
    length 4, 1 piece    room 4 fits best, one of two             room 0 4
    length 3, 3 pieces   one into room 4, two into a new row      room 0 1 4

The layout says how many pieces of which length lie in which row. Each epoch deals the pieces of
each length anew into the slots of that length and shuffles the rows; the numbers of an epoch
depend on the seed and the epoch alone, so a longer plan begins with the shorter one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.windows import LONG_SESSION_POLICIES, PieceTable

__all__ = ["LONG_SESSION_POLICIES", "PackPlan", "PackStats", "PieceTable", "pack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackStats:
    """How well one epoch is packed."""

    num_pieces: int
    num_positions: int  # positions that the pieces fill
    num_positions_rounded: int  # the same, each piece rounded up to the piece multiple
    num_rows: int  # rows of one epoch
    min_num_rows: int  # no plan has fewer: ceil(num_positions_rounded / sequence_length)
    max_pieces_per_row: int
    fill: float  # num_positions / (num_rows * sequence_length)

    def __str__(self) -> str:
        return (
            f"{self.num_pieces:,} pieces in {self.num_rows:,} rows (at least "
            f"{self.min_num_rows:,}), {self.fill:.2%} full, at most "
            f"{self.max_pieces_per_row:,} pieces a row"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Which pieces lie in which row, in which order, for all epochs one after the other."""

    row_offsets: NDArray[np.int64]  # (num_rows + 1,): where each row begins in row_pieces
    row_pieces: NDArray[np.int64]  # (num_row_pieces,): indices into pieces
    pieces: PieceTable
    stats: PackStats

    @property
    def num_rows(self) -> int:
        """Rows of all epochs together."""
        return len(self.row_offsets) - 1

    def pieces_of_row(self, row: int) -> NDArray[np.int64]:
        """Indices into `pieces` of the pieces that lie in the row, in order."""
        return self.row_pieces[self.row_offsets[row] : self.row_offsets[row + 1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One epoch of rows. Slots are in order of falling length, as the pieces are dealt."""

    num_rows: int
    row_of_slot: NDArray[np.int64]  # (num_pieces,)
    place_in_row: NDArray[np.int64]  # (num_pieces,): pieces that lie before it in the row


def pack(
    pieces: PieceTable,
    *,
    sequence_length: int,
    piece_multiple: int = 1,
    seed: int,
    num_epochs: int = 1,
) -> PackPlan:
    """Plans `num_epochs` epochs; every epoch holds every piece exactly once.

    Each piece fills `piece_multiple * ceil(positions / piece_multiple)` positions. Raises
    ConfigError for a sequence length that is no multiple of `piece_multiple` and DatasetError
    for a piece longer than a row (`cut_sessions` makes none).
    """
    if sequence_length < 1 or piece_multiple < 1 or sequence_length % piece_multiple:
        raise ConfigError(
            f"--seq-length {sequence_length} is no multiple of {piece_multiple}, the multiple "
            "that the parallel sizes ask of every piece; change --seq-length"
        )
    if num_epochs < 1:
        raise ConfigError(f"a plan needs at least one epoch, not {num_epochs}")
    positions = pieces.num_positions()
    units = -(-positions // piece_multiple)
    capacity = sequence_length // piece_multiple
    if len(units) and not 1 <= int(units.min()) <= int(units.max()) <= capacity:
        raise DatasetError(
            f"pieces fill {positions.min():,} to {positions.max():,} positions, and a row has 1 "
            f"to {sequence_length:,}; cut the sessions at this sequence length first"
        )
    num_per_length = np.bincount(units, minlength=capacity + 1)
    layout = _best_fit_decreasing(num_per_length)
    row_offsets, row_pieces = _deal(units, num_per_length, layout, seed, num_epochs)
    num_positions = int(positions.sum(dtype=np.int64))
    num_positions_rounded = int(units.sum(dtype=np.int64)) * piece_multiple
    pieces_per_row = np.diff(row_offsets[: layout.num_rows + 1])
    stats = PackStats(
        num_pieces=len(pieces),
        num_positions=num_positions,
        num_positions_rounded=num_positions_rounded,
        num_rows=layout.num_rows,
        min_num_rows=-(-num_positions_rounded // sequence_length),
        max_pieces_per_row=int(pieces_per_row.max(initial=0)),
        fill=num_positions / max(1, layout.num_rows * sequence_length),
    )
    return PackPlan(row_offsets=row_offsets, row_pieces=row_pieces, pieces=pieces, stats=stats)


def _best_fit_decreasing(num_per_length: NDArray[np.int64]) -> _Layout:
    """Best-fit-decreasing on a histogram; `num_per_length` is (capacity + 1,).

    Rows with the same room left are numbered in runs that have grown alike, and the run that
    came to a room first is filled first. A row of room r takes r // length pieces of a length
    before the next row is looked at, because it stays the best fit until no more go in.
    """
    capacity = len(num_per_length) - 1
    runs_by_room: dict[int, list[tuple[int, int, int]]] = {}  # (first row, rows, pieces in each)
    rooms = 0  # bit r is set where a row has room r
    placed: list[tuple[int, int, int, int]] = []  # first row, rows, pieces before, pieces a row
    num_rows = 0
    for length in np.flatnonzero(num_per_length)[::-1].tolist():
        left = int(num_per_length[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                first, rows, before = runs_by_room[room].pop(0)
            else:
                room, first, rows, before = capacity, num_rows, left, 0
            each = min(left, room // length)
            filled = min(rows, left // each)
            if not fitting:
                num_rows += filled
            elif filled < rows:
                runs_by_room[room].insert(0, (first + filled, rows - filled, before))
            elif not runs_by_room[room]:
                rooms ^= 1 << room
            placed.append((first, filled, before, each))
            left -= filled * each
            new_room = room - each * length
            runs_by_room.setdefault(new_room, []).append((first, filled, before + each))
            rooms |= 1 << new_room
    return _number_slots(num_rows, np.array(placed, dtype=np.int64).reshape(-1, 4))


def _number_slots(num_rows: int, placed: NDArray[np.int64]) -> _Layout:
    """`placed` is (num_steps, 4): first row, rows, pieces before them, pieces a row."""
    first, rows, before, each = placed.T
    slots = rows * each
    within = np.arange(slots.sum()) - np.repeat(np.cumsum(slots) - slots, slots)
    each_of_slot = np.repeat(each, slots)
    row_in_run = within // each_of_slot
    return _Layout(
        num_rows=num_rows,
        row_of_slot=row_in_run + np.repeat(first, slots),
        place_in_row=within - row_in_run * each_of_slot + np.repeat(before, slots),
    )


def _deal(
    units: NDArray[np.int32],
    num_per_length: NDArray[np.int64],
    layout: _Layout,
    seed: int,
    num_epochs: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """row_offsets (num_epochs * num_rows + 1,), row_pieces (num_epochs * num_pieces,)."""
    num_pieces, num_rows = len(units), layout.num_rows
    capacity = len(num_per_length) - 1
    falling = (capacity - units).astype(np.uint16 if capacity < 2**16 else np.int32)
    by_length = np.argsort(falling, kind="stable")  # in linear time on 16-bit integers
    class_stops = np.cumsum(num_per_length[::-1])
    classes = [
        slice(stop - num, stop)
        for stop, num in zip(class_stops.tolist(), num_per_length[::-1].tolist(), strict=True)
        if num > 1
    ]
    pieces_per_row = np.bincount(layout.row_of_slot, minlength=num_rows)
    row_offsets = np.zeros(num_epochs * num_rows + 1, dtype=np.int64)
    row_pieces = np.empty(num_epochs * num_pieces, dtype=np.int64)
    new_row_start = np.empty(num_rows, dtype=np.int64)
    for epoch in range(num_epochs):
        rng = np.random.default_rng([seed, epoch])
        dealt = by_length.copy()
        for pieces_of_length in classes:
            rng.shuffle(dealt[pieces_of_length])
        row_order = rng.permutation(num_rows)
        stops = np.cumsum(pieces_per_row[row_order]) + epoch * num_pieces
        row_offsets[epoch * num_rows + 1 : (epoch + 1) * num_rows + 1] = stops
        new_row_start[row_order] = stops - pieces_per_row[row_order]
        row_pieces[new_row_start[layout.row_of_slot] + layout.place_in_row] = dealt
    return row_offsets, row_pieces
