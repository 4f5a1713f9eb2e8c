"""Turns one row of a pack plan into the arrays that a training step takes.

Position i of a row predicts the next token of the same piece. With a, b, c the targets of three
turns of one piece, and `.` everything else, the default average gives

    labels           .  .  a  a  a  .  b  b  .  .  c  c  c  .  .
    loss_mask        0  0  1  1  1  0  1  1  0  0  1  1  1  0  0
    loss_token_num   0  0  3  3  3  0  2  2  0  0  3  3  3  0  0
    turn_num         3

and the loss is sum_i losses[i] * loss_mask[i] / loss_token_num[i], divided by the turn_num of
the global batch: the mean over its turns of the mean over each turn's target tokens. The other
averages are other numbers in the same arrays, see `averages`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.averages import (
    LOSS_AVERAGES,
    fixed_point,
    largest_divisor_unit,
    weigh_turns,
)
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.row_pieces import RowPieces
from megatron_multiturn.targets import target_runs
from megatron_multiturn.turn_weights import UNWEIGHTED

__all__ = [
    "LOSS_AVERAGES",
    "RowFormat",
    "RowTurns",
    "build_row",
    "largest_divisor_unit",
    "row_turns",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """What all rows of a run have in common.

    `divisor_unit`, a power of two, is what turn_num counts in: turn_num is multiplied and
    loss_token_num divided by it, so that a sum of fractions can be an integer (see
    `largest_divisor_unit`).

    `sessions_end_with_piece` is for sessions cut by truncation: what was cut off does not count
    in T and n_t, so that `session`, `session-token` and `prefix` are means over what is trained.
    """

    sequence_length: int
    max_pieces_per_row: int
    pad_token: int  # any id will do: nothing is inferred from ids
    piece_multiple: int = 1
    loss_average: str = "turn"
    divisor_unit: int = 1
    sessions_end_with_piece: bool = False
    turn_weights: tuple[float, ...] = UNWEIGHTED  # what the modes of targets number

    def __post_init__(self) -> None:
        if self.loss_average not in LOSS_AVERAGES:
            raise ConfigError(
                f"--loss-average is {self.loss_average!r}; it must be one of "
                f"{', '.join(LOSS_AVERAGES)}"
            )
        if self.sequence_length % self.piece_multiple:
            raise ConfigError(
                f"--seq-length {self.sequence_length} is no multiple of {self.piece_multiple}, "
                "the multiple that the parallel sizes ask of every piece; change --seq-length"
            )
        if self.divisor_unit < 1 or self.divisor_unit & (self.divisor_unit - 1):
            raise ConfigError(f"the divisor unit is {self.divisor_unit}, not a power of two")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTurns:
    """The turns of the sessions of a row, and the runs of target positions they have in it.

    Turns without a target in the whole session are left out; turns whose targets lie in other
    pieces have num_targets 0.
    """

    piece: NDArray[np.int64]  # (num_turns,): place in the row of the piece
    turn_in_session: NDArray[np.int64]  # (num_turns,): from 0
    num_targets: NDArray[np.int64]  # (num_turns,): in this piece
    loss_token_num: NDArray[np.float64]  # (num_turns,)
    divisor: float  # the sum of the weights of the row's targets; not yet in units
    run_turn: NDArray[np.int64]  # (num_runs,): the turn of each run, an index into the above
    run_begin: NDArray[np.int64]  # (num_runs,): first position in the row; ascending
    run_length: NDArray[np.int64]  # (num_runs,)


def build_row(
    pieces: RowPieces, spans: NDArray[np.int32], row_format: RowFormat
) -> dict[str, NDArray[Any]]:
    """The arrays of one row.

    `spans` is (num_pieces, 4): system_stop, start, target_start and stop of each piece, as
    `windows` describes them. Returns

        tokens, labels    int64 (s,)       the pad token where there is none
        loss_mask         float32 (s,)     1 where labels[i] is a target
        loss_token_num    float32 (s,)     what the loss at i is divided by; 0 off target
        turn_num          int64 (1,)       what the row adds to the divisor
        turn_index        int64 (s,)       1 where labels[i] is a target of its session's first
                                           turn, 2 of the second, ...; 0 off target
        turn_token_num    float32 (s,)     targets that this turn has in the row; 0 off target
        position_ids      int64 (s,)       from 0 in every piece, and in the padding at the end
        padding_mask      bool (s,)        True where there is no token to predict
        cu_seqlens        int32 (max_pieces_per_row + 2,): where the pieces begin and end; the
                          padding at the end of a row is a piece, then s is repeated
        max_seqlen        int32 (1,)       positions of the longest piece
    """
    length = row_format.sequence_length
    columns = spans.T.astype(np.int64)
    num_positions = _num_positions(columns)
    piece_lengths = _round_up(num_positions, row_format.piece_multiple)
    stops = piece_lengths.cumsum()
    starts = stops - piece_lengths
    used = int(stops[-1])
    assert len(pieces.num_segments) == len(spans) <= row_format.max_pieces_per_row
    assert used <= length
    turns = _row_turns(pieces, columns, starts, row_format)
    turn_num, factor = fixed_point(turns.divisor, row_format.divisor_unit)
    per_turn = turns.loss_token_num / (row_format.divisor_unit * factor)
    counts = _run_counts(turns, length)
    loss_token_num = _spread(per_turn.astype(np.float32)[turns.run_turn], counts)
    cu_seqlens = np.full(row_format.max_pieces_per_row + 2, length, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(stops) + 1] = stops
    position_ids = np.arange(length)
    position_ids[:used] -= starts.repeat(piece_lengths)
    position_ids[used:] -= used
    tokens, labels, padding_mask = _fill(pieces, num_positions, piece_lengths, row_format)
    run_turn = turns.run_turn
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (loss_token_num > 0).astype(np.float32),
        "loss_token_num": loss_token_num,
        "turn_num": np.array([turn_num], dtype=np.int64),
        "turn_index": _spread(turns.turn_in_session[run_turn] + 1, counts),
        "turn_token_num": _spread(turns.num_targets.astype(np.float32)[run_turn], counts),
        "position_ids": position_ids,
        "padding_mask": padding_mask,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": np.array([max(piece_lengths.max(), length - used)], dtype=np.int32),
    }


def row_turns(pieces: RowPieces, spans: NDArray[np.int32], row_format: RowFormat) -> RowTurns:
    """The turns of the row's sessions under the row format's loss average."""
    columns = spans.T.astype(np.int64)
    piece_lengths = _round_up(_num_positions(columns), row_format.piece_multiple)
    return _row_turns(pieces, columns, piece_lengths.cumsum() - piece_lengths, row_format)


def _row_turns(
    pieces: RowPieces,
    columns: NDArray[np.int64],  # (4, num_pieces): the spans
    piece_starts: NDArray[np.int64],  # (num_pieces,): positions in the row
    row_format: RowFormat,
) -> RowTurns:
    system_stop, start, target_start, stop = columns
    runs = target_runs(
        pieces.num_segments,
        pieces.segment_lengths,
        pieces.modes,
        session_stops=stop if row_format.sessions_end_with_piece else None,
    )
    piece, run_begin = runs.session, runs.begin
    shift = piece_starts - 1
    if columns[:3].any():
        # Targets of a piece lie in [first, stop): its first token is predicted by nothing.
        first = np.maximum(target_start, start + (system_stop == 0))
        run_begin = np.maximum(run_begin, first[piece])
        shift += system_stop - start
    run_length = np.minimum(runs.end, stop[piece]) - run_begin
    run_begin_in_row = run_begin + shift[piece]
    run_turn, run_length_in_row = runs.turn, run_length
    if len(run_length) and run_length.min() <= 0:  # some runs lie in other pieces
        run_length = np.maximum(run_length, 0)
        here = run_length.nonzero()[0]
        run_turn, run_begin_in_row = run_turn[here], run_begin_in_row[here]
        run_length_in_row = run_length[here]

    piece_of_turn = piece[runs.first_run]
    turns_per_piece = np.bincount(piece_of_turn, minlength=len(piece_starts))
    turns_before = turns_per_piece.cumsum() - turns_per_piece
    turn_in_session = np.arange(len(piece_of_turn)) - turns_before[piece_of_turn]
    num_targets = runs.sum_by_turn(run_length)
    loss_token_num, divisor = weigh_turns(
        row_format.loss_average,
        num_targets=num_targets,
        session_targets=runs.sum_by_turn(runs.end - runs.begin),
        turn_in_session=turn_in_session,
        turns_per_piece=turns_per_piece,
        turn_weights=runs.weights(pieces.modes, row_format.turn_weights),
    )
    return RowTurns(
        piece=piece_of_turn,
        turn_in_session=turn_in_session,
        num_targets=num_targets,
        loss_token_num=loss_token_num,
        divisor=divisor,
        run_turn=run_turn,
        run_begin=run_begin_in_row,
        run_length=run_length_in_row,
    )


def _num_positions(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of each piece that have a token to predict; (num_pieces,)."""
    system_stop, start, _, stop = columns
    return system_stop + stop - start - 1


def _round_up(num_positions: NDArray[np.int64], piece_multiple: int) -> NDArray[np.int64]:
    """Positions that each piece fills, (num_pieces,)."""
    if piece_multiple == 1:
        return num_positions
    return -(-num_positions // piece_multiple) * piece_multiple


def _run_counts(turns: RowTurns, length: int) -> NDArray[np.int64]:
    """Positions before the first run, in it, until the next one, ...; (2 * num_runs + 1,)."""
    counts = np.empty(2 * len(turns.run_begin) + 1, dtype=np.int64)
    stop = turns.run_begin + turns.run_length
    counts[1::2] = turns.run_length
    counts[0:-1:2] = turns.run_begin
    counts[2:-1:2] -= stop[:-1]
    counts[-1] = length - (stop[-1] if len(stop) else 0)
    return counts


def _spread(value: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[Any]:
    """value[r] at the positions of run r, else 0; (counts.sum(),)."""
    values = np.zeros(len(counts), dtype=value.dtype)
    values[1::2] = value
    return values.repeat(counts)


def _fill(
    pieces: RowPieces,
    num_positions: NDArray[np.int64],  # (num_pieces,)
    piece_lengths: NDArray[np.int64],  # (num_pieces,): the same, rounded up
    row_format: RowFormat,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """tokens, labels, padding_mask: (s,) each.

    The tokens of the pieces lie end to end. Every one but the last of its piece is shown, and
    every one but the first is a label; row position i shows token i + (pieces before it).
    """
    length, pad = row_format.sequence_length, row_format.pad_token
    number = np.arange(num_positions.sum())
    source = number + np.arange(len(num_positions)).repeat(num_positions)
    shown, used = pieces.tokens.take(source), len(number)
    source += 1
    predicted = pieces.tokens.take(source)
    tokens, labels = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    padding_mask = np.zeros(length, dtype=np.bool_)
    if row_format.piece_multiple == 1:
        tokens[:used], labels[:used] = shown, predicted
        tokens[used:] = labels[used:] = pad
        padding_mask[used:] = True
        return tokens, labels, padding_mask
    rounding = piece_lengths - num_positions
    number += (rounding.cumsum() - rounding).repeat(num_positions)
    tokens[:], labels[:], padding_mask[:] = pad, pad, True
    tokens[number], labels[number], padding_mask[number] = shown, predicted, False
    return tokens, labels, padding_mask
