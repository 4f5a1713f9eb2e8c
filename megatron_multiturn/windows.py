"""Cuts sessions that are longer than a row into pieces; a session that fits is one piece.

A piece is the part of a session that lies in one row. Its tokens are

    session[0:system_stop] ++ session[start:stop]

and only tokens at offsets >= target_start can be targets: what lies before is context that an
earlier piece has trained already. A piece of m tokens fills m - 1 positions of a row, because
position i predicts token i + 1 and the last token is only ever a label.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.cutting import (
    CutTally,
    SegmentIndex,
    Window,
    batches_of_sessions,
    cut_windows,
    drop,
    truncate,
)
from megatron_multiturn.errors import ConfigError, DatasetError

LONG_SESSION_POLICIES = ("window", "truncate", "drop", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceTable:
    """The pieces of a dataset: whole sessions, then the pieces of cut ones.

    Both are in the order of their sessions. Only pieces of cut sessions need a span each.
    """

    session: NDArray[np.int32]  # (num_pieces,); Megatron too numbers sessions in 32 bits
    num_tokens: NDArray[np.int32]  # (num_pieces,)
    cut_spans: NDArray[np.int32]  # (num_cut_pieces, 4): system_stop, start, target_start, stop

    def __len__(self) -> int:
        return len(self.session)

    def num_positions(self) -> NDArray[np.int32]:
        """Positions of a row that each piece fills: one fewer than its tokens; (num_pieces,)."""
        return self.num_tokens - np.int32(1)

    def spans_of(self, pieces: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """system_stop, start, target_start, stop of some pieces; (len(pieces), 4)."""
        spans = np.zeros((len(pieces), 4), dtype=np.int32)
        spans[:, 3] = self.num_tokens[pieces]
        num_whole = len(self.session) - len(self.cut_spans)
        if len(pieces) and pieces.max() >= num_whole:
            cut = pieces >= num_whole
            spans[cut] = self.cut_spans[pieces[cut] - num_whole]
        return spans


@dataclass(frozen=True, slots=True, kw_only=True)
class CutReport:
    """What became of the sessions; nothing is cut, replayed or lost without a count here."""

    num_sessions: int
    num_sessions_too_short: int  # fewer than two tokens: nothing to predict, no piece
    num_long_sessions: int  # did not fit the window
    num_sessions_dropped: int = 0  # long, and no piece came of them
    num_sessions_cut: int = 0  # long, and at least one piece came of them
    num_pieces_made: int = 0  # pieces of the cut sessions
    num_turns_cut: int = 0  # turns cut inside, because they alone do not fit the window
    num_turns_lost: int = 0  # turns of long sessions of which no piece trains a target
    num_targets_lost: int = 0  # target tokens of long sessions that no piece trains
    num_tokens_replayed: int = 0  # tokens that pieces repeat as context
    num_context_tokens_lost: int = 0  # context of cut sessions that no piece shows
    num_pieces_opened_inside_message: int = 0  # no message begins where the piece had to open
    num_pieces_without_system: int = 0  # the system message was too long to repeat

    def __str__(self) -> str:
        lines = [
            f"{self.num_sessions:,} sessions, {self.num_long_sessions:,} longer than the window"
        ]
        if self.num_long_sessions:
            lines[0] += (
                f": {self.num_sessions_cut:,} cut into {self.num_pieces_made:,} pieces, "
                f"{self.num_sessions_dropped:,} dropped"
            )
        rest = {
            "turns cut inside": self.num_turns_cut,
            "turns lost": self.num_turns_lost,
            "target tokens lost": self.num_targets_lost,
            "tokens replayed as context": self.num_tokens_replayed,
            "context tokens lost": self.num_context_tokens_lost,
            "pieces opened inside a message": self.num_pieces_opened_inside_message,
            "pieces without the leading system message": self.num_pieces_without_system,
            "sessions of fewer than 2 tokens": self.num_sessions_too_short,
        }
        lines += [f"{count:,} {what}" for what, count in rest.items() if count]
        return "; ".join(lines)


def cut_sessions(
    session_lengths: NDArray[np.integer[Any]],  # (num_sessions,)
    *,
    sequence_length: int,
    long_session: str,
    segment_index: SegmentIndex,
    window_context: int | None = None,
    session_window: int | None = None,
) -> tuple[PieceTable, CutReport]:
    """Cuts every session that fills more than `session_window` positions (default: a row's).

    `long_session` is one of
      window    cut between turns into pieces, each turn a target exactly once. A later piece
                opens with the leading system message and then whole preceding messages of at
                most `window_context` tokens (default: a quarter of the window)
      truncate  keep the leading part, up to the last whole turn that fits
      drop      leave the session out
      error     raise DatasetError at the first one

    A turn is cut inside only if it alone does not fit. The work is vectorised over sessions.
    """
    window = _window(sequence_length, session_window, window_context)
    if long_session not in LONG_SESSION_POLICIES:
        raise ConfigError(
            f"--long-session is {long_session!r}; it must be one of "
            f"{', '.join(LONG_SESSION_POLICIES)}"
        )
    lengths = np.asarray(session_lengths)
    long_ids = np.flatnonzero(lengths > window.capacity)
    if long_session == "error" and len(long_ids):
        first = int(long_ids[0])
        raise DatasetError(
            f"session {first} has {lengths[first]:,} tokens and the window holds "
            f"{window.capacity:,}, the last one as a label ({len(long_ids):,} sessions are too "
            "long); raise --seq-length or --session-window, or pass --long-session window, "
            "truncate or drop"
        )
    cut, cut_spans, tally = _cut_long(long_session, segment_index, long_ids, window)
    too_short = lengths < 2
    num_cut = int(np.count_nonzero(np.diff(cut, prepend=-1)))
    report = CutReport(
        num_sessions=len(lengths),
        num_sessions_too_short=int(too_short.sum()),
        num_long_sessions=len(long_ids),
        num_sessions_dropped=len(long_ids) - num_cut,
        num_sessions_cut=num_cut,
        num_pieces_made=len(cut),
        **{field.name: getattr(tally, field.name) for field in fields(tally)},
    )
    is_whole = ~(too_short | (lengths > window.capacity))
    system_stop, start, _, stop = cut_spans.T
    all_whole = bool(is_whole.all())  # most of a big corpus is; then nothing is copied twice
    whole = np.arange(len(lengths), dtype=np.int32) if all_whole else np.flatnonzero(is_whole)
    whole_lengths = lengths if all_whole else lengths[is_whole]
    pieces = PieceTable(
        session=_concatenate(whole, cut),
        num_tokens=_concatenate(whole_lengths, system_stop + stop - start),
        cut_spans=cut_spans,
    )
    return pieces, report


def _concatenate(*parts: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    return np.concatenate(parts, dtype=np.int32, casting="same_kind")


def _cut_long(
    long_session: str,
    segment_index: SegmentIndex,
    long_ids: NDArray[np.int64],
    window: Window,
) -> tuple[NDArray[np.int64], NDArray[np.int32], CutTally]:
    """(session of each piece, (num_pieces,); spans, (num_pieces, 4); what happened)."""
    cutter = {"window": cut_windows, "truncate": truncate}.get(long_session, drop)
    tally = CutTally()
    sessions, spans = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 4), dtype=np.int32)]
    for first, batch in batches_of_sessions(segment_index, long_ids):
        pieces, counts = cutter(batch, window)
        tally.add(counts)
        sessions.append(long_ids[first + pieces.session])
        spans.append(pieces.spans)
    return np.concatenate(sessions), np.concatenate(spans), tally


def _window(sequence_length: int, session_window: int | None, window_context: int | None) -> Window:
    window = sequence_length if session_window is None else session_window
    if not 1 <= window <= sequence_length:
        raise ConfigError(
            f"--session-window is {window}; it must be between 1 and --seq-length "
            f"({sequence_length})"
        )
    context = window // 4 if window_context is None else window_context
    if not 0 <= context < window:
        raise ConfigError(
            f"--window-context comes to {context} tokens; it must be at least 0 and smaller than "
            f"the window ({window}), or no room is left for new turns"
        )
    return Window(capacity=window + 1, context=context)
