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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.averages import (
    LOSS_AVERAGES,
    fixed_point,
    largest_divisor_unit,
    weigh_turns,
)
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.modes import begins_turn, is_target

__all__ = [
    "LOSS_AVERAGES",
    "RowFormat",
    "RowTurns",
    "SessionArrays",
    "TargetRuns",
    "build_row",
    "largest_divisor_unit",
    "row_turns",
    "target_runs",
]


class SessionArrays(Protocol):
    """What a row needs of a session; `EncodedSession` has it."""

    @property
    def tokens(self) -> NDArray[Any]: ...  # (num_tokens,)

    @property
    def segment_lengths(self) -> NDArray[Any]: ...  # (num_segments,)

    @property
    def modes(self) -> NDArray[np.int8]: ...  # (num_segments,)


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
class TargetRuns:
    """Where the targets of some sessions are, in tokens from the start of each session.

    The first token of a session is no target, and a run or a turn without a target is not here.
    """

    session: NDArray[np.int64]  # (num_runs,)
    begin: NDArray[np.int64]  # (num_runs,)
    end: NDArray[np.int64]  # (num_runs,)
    turn: NDArray[np.int64]  # (num_runs,): from 0, over all sessions
    first_run: NDArray[np.int64]  # (num_turns,)

    def sum_by_turn(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """(num_runs,) -> (num_turns,)."""
        return np.add.reduceat(values, self.first_run) if len(values) else values


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
    sessions: Sequence[SessionArrays], spans: NDArray[np.int32], row_format: RowFormat
) -> dict[str, NDArray[Any]]:
    """The arrays of one row.

    `sessions` holds the whole session of each piece of the row, in row order (twice, if two of
    its pieces share the row); `spans` is (num_pieces, 4), as in PieceTable. Returns

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
    piece_lengths = _piece_lengths(spans, row_format.piece_multiple)
    used = int(piece_lengths.sum())
    assert len(sessions) == len(spans) <= row_format.max_pieces_per_row
    assert used <= length
    turns = row_turns(sessions, spans, row_format)
    turn_num, factor = fixed_point(turns.divisor, row_format.divisor_unit)
    per_turn = turns.loss_token_num / (row_format.divisor_unit * factor)
    loss_token_num, turn_index, turn_token_num = (
        _spread(turns.run_begin, turns.run_length, value[turns.run_turn], length)
        for value in (per_turn, turns.turn_in_session + 1, turns.num_targets)
    )
    num_positions = _num_positions(spans)
    if used < length:
        piece_lengths = np.append(piece_lengths, length - used)
        num_positions = np.append(num_positions, 0)
    stops = np.cumsum(piece_lengths)
    cu_seqlens = np.full(row_format.max_pieces_per_row + 2, length, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(stops) + 1] = stops
    position_ids = np.arange(length) - np.repeat(stops - piece_lengths, piece_lengths)
    tokens, labels = _tokens_and_labels(sessions, spans, piece_lengths, row_format)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (loss_token_num > 0).astype(np.float32),
        "loss_token_num": loss_token_num,
        "turn_num": np.array([turn_num], dtype=np.int64),
        "turn_index": turn_index.astype(np.int64),
        "turn_token_num": turn_token_num,
        "position_ids": position_ids,
        "padding_mask": position_ids >= np.repeat(num_positions, piece_lengths),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": np.array([piece_lengths.max()], dtype=np.int32),
    }


def row_turns(
    sessions: Sequence[SessionArrays], spans: NDArray[np.int32], row_format: RowFormat
) -> RowTurns:
    """The turns of the row's sessions under the row format's loss average."""
    system_stop, start, target_start, stop = spans.T.astype(np.int64)
    # Targets of a piece lie in [first, stop): a token that opens a piece is predicted by nothing.
    first = np.maximum(target_start, start + (system_stop == 0))
    piece_lengths = _piece_lengths(spans, row_format.piece_multiple)
    runs = target_runs(
        np.array([len(session.modes) for session in sessions]),
        np.concatenate([session.segment_lengths for session in sessions]),
        np.concatenate([session.modes for session in sessions]),
        session_stops=stop if row_format.sessions_end_with_piece else None,
    )
    piece = runs.session
    run_begin = np.maximum(runs.begin, first[piece])
    run_length = np.maximum(np.minimum(runs.end, stop[piece]) - run_begin, 0)
    here = np.flatnonzero(run_length)

    piece_of_turn = piece[runs.first_run]
    turns_per_piece = np.bincount(piece_of_turn, minlength=len(spans))
    turns_before = np.cumsum(turns_per_piece) - turns_per_piece
    turn_in_session = np.arange(len(piece_of_turn)) - turns_before[piece_of_turn]
    num_targets = runs.sum_by_turn(run_length)
    loss_token_num, divisor = weigh_turns(
        row_format.loss_average,
        num_targets=num_targets,
        session_targets=runs.sum_by_turn(runs.end - runs.begin),
        turn_in_session=turn_in_session,
        turns_per_piece=turns_per_piece,
    )
    shift = np.cumsum(piece_lengths) - piece_lengths + system_stop - start - 1
    return RowTurns(
        piece=piece_of_turn,
        turn_in_session=turn_in_session,
        num_targets=num_targets,
        loss_token_num=loss_token_num,
        divisor=divisor,
        run_turn=runs.turn[here],
        run_begin=(run_begin + shift[piece])[here],
        run_length=run_length[here],
    )


def target_runs(
    num_segments: NDArray[np.int64],  # (num_sessions,)
    segment_lengths: NDArray[np.int32],  # of all sessions, one after the other
    modes: NDArray[np.int8],  # the same
    *,
    session_stops: NDArray[np.int64] | None = None,  # (num_sessions,)
) -> TargetRuns:
    """The targets of any number of sessions; those from `session_stops` on are left out."""
    targets = np.flatnonzero(is_target(modes))
    ends = np.cumsum(segment_lengths, dtype=np.int64)
    tokens_before = np.zeros(len(num_segments), dtype=np.int64)
    tokens_before[1:] = ends[np.cumsum(num_segments)[:-1] - 1]
    session = np.repeat(np.arange(len(num_segments)), num_segments)[targets]
    end = ends[targets] - tokens_before[session]
    begin = np.maximum(end - segment_lengths[targets], 1)
    if session_stops is not None:
        end = np.minimum(end, session_stops[session])
    turn_mark = np.cumsum(begins_turn(modes))[targets]
    kept = np.flatnonzero(begin < end)
    session, turn_mark = session[kept], turn_mark[kept]
    opens_turn = np.ones(len(kept), dtype=np.bool_)
    opens_turn[1:] = (turn_mark[1:] != turn_mark[:-1]) | (session[1:] != session[:-1])
    return TargetRuns(
        session=session,
        begin=begin[kept],
        end=end[kept],
        turn=np.cumsum(opens_turn) - 1,
        first_run=np.flatnonzero(opens_turn),
    )


def _num_positions(spans: NDArray[np.int32]) -> NDArray[np.int64]:
    """Positions of each piece that have a token to predict; (num_pieces,)."""
    return (spans[:, 0] + spans[:, 3] - spans[:, 1] - 1).astype(np.int64)


def _piece_lengths(spans: NDArray[np.int32], piece_multiple: int) -> NDArray[np.int64]:
    """Positions that each piece fills, rounded up; (num_pieces,)."""
    return -(-_num_positions(spans) // piece_multiple) * piece_multiple


def _spread(
    begin: NDArray[np.int64], run_length: NDArray[np.int64], value: NDArray[Any], length: int
) -> NDArray[np.float32]:
    """float32 (length,): value[r] at positions begin[r] : begin[r] + run_length[r], else 0."""
    counts = np.empty(2 * len(begin) + 1, dtype=np.int64)
    stop = begin + run_length
    counts[1::2] = run_length
    counts[0:-1:2] = begin
    counts[2:-1:2] -= stop[:-1]
    counts[-1] = length - (stop[-1] if len(stop) else 0)
    values = np.zeros(len(counts), dtype=np.float32)
    values[1::2] = value
    return values.repeat(counts)


def _tokens_and_labels(
    sessions: Sequence[SessionArrays],
    spans: NDArray[np.int32],
    piece_lengths: NDArray[np.int64],  # (num_pieces,) or, with the padding at the end, one more
    row_format: RowFormat,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """tokens, labels: int64 (s,) each.

    All pieces are laid end to end, every one with the token after its last position; tokens and
    labels are then one gather each.
    """
    length, pad = row_format.sequence_length, row_format.pad_token
    padding = np.full(length + 1, pad, dtype=np.int64)
    parts: list[NDArray[Any]] = []
    pad_positions: list[int] = []
    row_stop = 0
    for session, (system_stop, start, _, stop), piece_length in zip(
        sessions, spans.tolist(), piece_lengths.tolist(), strict=False
    ):
        if system_stop:
            parts.append(session.tokens[:system_stop])
        parts.append(session.tokens[start:stop])
        row_stop += piece_length
        missing = piece_length - (system_stop + stop - start - 1)
        if missing:
            parts.append(padding[:missing])
            pad_positions.append(row_stop - missing)  # would show the piece's last token
    parts.append(padding[: length - row_stop + 1])
    laid_out = np.concatenate(parts, dtype=np.int64)
    source = np.arange(length) + np.arange(len(piece_lengths)).repeat(piece_lengths)
    tokens = laid_out[source]
    tokens[pad_positions] = pad
    return tokens, laid_out[1:][source]
