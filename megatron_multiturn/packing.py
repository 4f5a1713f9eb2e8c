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

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.windows import LONG_SESSION_POLICIES, PieceTable

# Pieces at a time, so that temporary arrays stay in the processor's cache.
_CHUNK = 1 << 16

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
    row_pieces: NDArray[np.int32]  # (num_row_pieces,): indices into pieces
    pieces: PieceTable
    stats: PackStats

    @property
    def num_rows(self) -> int:
        """Rows of all epochs together."""
        return len(self.row_offsets) - 1

    def pieces_of_row(self, row: int) -> NDArray[np.int32]:
        """Indices into `pieces` of the pieces that lie in the row, in order."""
        return self.row_pieces[self.row_offsets[row] : self.row_offsets[row + 1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One epoch of rows, as helpings: pieces of one length that lie side by side in one row.

    Helpings are in order of falling length, as the pieces are dealt.
    """

    num_rows: int
    row: NDArray[np.int32]  # (num_helpings,)
    before: NDArray[np.int32]  # (num_helpings,): pieces that lie before it in the row
    size: NDArray[np.int32]  # (num_helpings,): pieces
    pieces_per_row: NDArray[np.int32]  # (num_rows,)


def pack(
    pieces: PieceTable,
    *,
    sequence_length: int,
    piece_multiple: int = 1,
    seed: int,
    num_epochs: int = 1,
    at_least_rows: int = 0,
) -> PackPlan:
    """Plans `num_epochs` epochs, or more until there are `at_least_rows` rows.

    Every epoch holds every piece exactly once.

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
    units = positions if piece_multiple == 1 else -(-positions // piece_multiple)
    capacity = sequence_length // piece_multiple
    if len(units) and not 1 <= int(units.min()) <= int(units.max()) <= capacity:
        raise DatasetError(
            f"pieces fill {positions.min():,} to {positions.max():,} positions, and a row has 1 "
            f"to {sequence_length:,}; cut the sessions at this sequence length first"
        )
    layout = _best_fit_decreasing(np.bincount(units, minlength=capacity + 1))
    if layout.num_rows:
        num_epochs = max(num_epochs, -(-at_least_rows // layout.num_rows))
    row_offsets, row_pieces = _deal(units, capacity, layout, seed, num_epochs)
    num_positions = int(positions.sum(dtype=np.int64))
    num_positions_rounded = int(units.sum(dtype=np.int64)) * piece_multiple
    stats = PackStats(
        num_pieces=len(pieces),
        num_positions=num_positions,
        num_positions_rounded=num_positions_rounded,
        num_rows=layout.num_rows,
        min_num_rows=-(-num_positions_rounded // sequence_length),
        max_pieces_per_row=int(layout.pieces_per_row.max(initial=0)),
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
    runs_by_room: dict[int, deque[tuple[int, int, int]]] = {}  # (first row, rows, pieces in each)
    rooms: list[int] = []  # ascending; those that some row has
    placed: list[tuple[int, int, int, int]] = []  # first row, rows, pieces before, pieces a row
    num_rows = 0
    for length in np.flatnonzero(num_per_length)[::-1].tolist():
        left = int(num_per_length[length])
        while left:
            best = bisect_left(rooms, length)
            if best < len(rooms):
                room = rooms[best]
                runs = runs_by_room[room]
                first, rows, before = runs[0]
                each = min(left, room // length)
                filled = min(rows, left // each)
                if filled < rows:
                    runs[0] = (first + filled, rows - filled, before)
                else:
                    runs.popleft()
                    if not runs:
                        del rooms[best]
            else:
                room, first, before = capacity, num_rows, 0
                each = min(left, room // length)
                filled = left // each
                num_rows += filled
            placed.append((first, filled, before, each))
            left -= filled * each
            new_room = room - each * length
            new_runs = runs_by_room.setdefault(new_room, deque())
            if not new_runs:
                rooms.insert(bisect_left(rooms, new_room), new_room)
            new_runs.append((first, filled, before + each))
    return _number_rows(num_rows, np.array(placed, dtype=np.int32).reshape(-1, 4))


def _number_rows(num_rows: int, placed: NDArray[np.int32]) -> _Layout:
    """`placed` is (num_steps, 4): first row, rows, pieces before them, pieces a row."""
    first, rows, before, each = placed.T
    steps_before = np.cumsum(rows, dtype=np.int32) - rows
    row = np.repeat(first - steps_before, rows)
    row += np.arange(len(row), dtype=np.int32)
    pieces_per_row = np.zeros(num_rows, dtype=np.int32)
    pieces_per_row[row] = np.repeat(before + each, rows)  # the last helping of a row stays
    return _Layout(
        num_rows=num_rows,
        row=row,
        before=np.repeat(before, rows),
        size=np.repeat(each, rows),
        pieces_per_row=pieces_per_row,
    )


def _deal(
    units: NDArray[np.int32],
    capacity: int,
    layout: _Layout,
    seed: int,
    num_epochs: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """row_offsets (num_epochs * num_rows + 1,), row_pieces (num_epochs * num_pieces,)."""
    num_pieces, num_rows = len(units), layout.num_rows
    # Where a helping lies in its row, less the place at which it is dealt.
    shift = layout.before + layout.size - np.cumsum(layout.size, dtype=np.int32)
    row_offsets = np.zeros(num_epochs * num_rows + 1, dtype=np.int64)
    row_pieces = np.empty(num_epochs * num_pieces, dtype=np.int32)
    new_row_start = np.empty(num_rows, dtype=np.int32)
    for epoch in range(num_epochs):
        rng = np.random.default_rng([seed, epoch])
        dealt = _shuffle_within_lengths(units, capacity, rng)
        row_order = rng.permutation(num_rows)
        pieces_in_order = layout.pieces_per_row[row_order]
        stops = np.cumsum(pieces_in_order, dtype=np.int32)
        new_row_start[row_order] = stops - pieces_in_order
        row_offsets[epoch * num_rows + 1 : (epoch + 1) * num_rows + 1] = stops
        row_offsets[epoch * num_rows + 1 : (epoch + 1) * num_rows + 1] += epoch * num_pieces
        place = np.repeat((new_row_start[layout.row] + shift).astype(np.intp), layout.size)
        place += np.arange(num_pieces)
        row_pieces[epoch * num_pieces : (epoch + 1) * num_pieces][place] = dealt
    return row_offsets, row_pieces


def _shuffle_within_lengths(
    units: NDArray[np.int32], capacity: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """The pieces from the longest to the shortest, those of one length in random order.

    int32 (num_pieces,). One sort of 64-bit numbers does both. From the highest bit they hold how
    much shorter than a row the piece is, random bits, and the piece: two pieces of a length that
    draw the same random bits stay in their order. There are 64 - 24 - 12 = 28 random bits for
    10^7 pieces in rows of 4,096, and at least 15 for 2^31 pieces and rows of 131,072.
    """
    index_bits = max(1, len(units) - 1).bit_length()
    random_bits = 64 - index_bits - capacity.bit_length()
    index_mask = np.uint64((1 << index_bits) - 1)
    keys = np.empty(len(units), dtype=np.uint64)
    for start in range(0, len(units), _CHUNK):
        part = units[start : start + _CHUNK]
        key = rng.integers(1 << random_bits, size=len(part), dtype=np.uint64)
        key |= (capacity - part).astype(np.uint64) << np.uint64(random_bits)
        key <<= np.uint64(index_bits)
        key |= np.arange(start, start + len(part), dtype=np.uint64)
        keys[start : start + _CHUNK] = key
    keys.sort()
    dealt = np.empty(len(units), dtype=np.int32)
    for start in range(0, len(units), _CHUNK):
        dealt[start : start + _CHUNK] = keys[start : start + _CHUNK] & index_mask
    return dealt
