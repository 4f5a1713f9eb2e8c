"""Where sessions that are longer than their window are cut; see `windows` for what pieces are.

`window` on u1 A u2 B u3 C u4 D, with room for the system message and two exchanges:

    piece 0   system u1 A u2 B
    piece 1   system u2 B u3 C        u2 and B are replayed as context, C is the new target
    piece 2   system u3 C u4 D

All sessions are cut at the same time: each step cuts the next piece of every session that has
turns left. Their offsets are counted from the start of the first session, all sessions laid end
to end, so that one sorted array serves them all; `LongSessions.begin` leads back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.modes import LEADING_SYSTEM, MESSAGE_START, is_context_with
from megatron_multiturn.targets import target_runs

# (document_indices (num_sessions + 1,), segment lengths (num_segments,), modes (num_segments,))
type SegmentIndex = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int8]]

# Bounds the memory that cutting takes.
_SEGMENTS_AT_A_TIME = 1 << 21


@dataclass(slots=True, kw_only=True)
class CutTally:
    """What the cutting did, added up over sessions; the fields of CutReport explain them."""

    num_turns_cut: int = 0
    num_turns_lost: int = 0
    num_targets_lost: int = 0
    num_tokens_replayed: int = 0
    num_context_tokens_lost: int = 0
    num_pieces_opened_inside_message: int = 0
    num_pieces_without_system: int = 0

    def add(self, other: "CutTally") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    capacity: int  # tokens of a piece at most
    context: int  # tokens of preceding messages that a piece repeats at most


@dataclass(frozen=True, slots=True, kw_only=True)
class LongSessions:
    """Where some sessions may be cut. Offsets are in tokens, all sessions laid end to end."""

    begin: NDArray[np.int64]  # (num_sessions,)
    length: NDArray[np.int64]  # (num_sessions,)
    system_length: NDArray[np.int64]  # (num_sessions,): leading system message; 0 without one
    openings: NDArray[np.int64]  # ascending; where a piece may open
    run_begin: NDArray[np.int64]  # (num_runs,): target runs, without a session's first token
    run_end: NDArray[np.int64]  # (num_runs,)
    turn_begin: NDArray[np.int64]  # (num_turns,): from the first target of each turn
    turn_end: NDArray[np.int64]  # (num_turns,): to its last
    first_turn: NDArray[np.int64]  # (num_sessions + 1,)

    def first_opening(
        self, begin: NDArray[np.int64], end: NDArray[np.int64], otherwise: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The first place in [begin, end) where a piece may open, or `otherwise`."""
        index = np.searchsorted(self.openings, begin)
        opening = self.openings[np.minimum(index, len(self.openings) - 1)]
        return np.where((opening >= begin) & (opening < end), opening, otherwise)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPieces:
    """The pieces of cut sessions, in the order of their sessions."""

    session: NDArray[np.int64]  # (num_pieces,): an index into the sessions that were cut
    spans: NDArray[np.int32]  # (num_pieces, 4): system_stop, start, target_start, stop


def batches_of_sessions(
    segment_index: SegmentIndex, sessions: NDArray[np.int64]
) -> Iterator[tuple[int, LongSessions]]:
    """Read `sessions`, so many at a time that memory stays bounded.

    Yields the place in `sessions` of the first one of the batch, and the batch.
    """
    first_segments = segment_index[0]
    num_segments = first_segments[sessions + 1] - first_segments[sessions]
    batch_of_session = np.cumsum(num_segments) // _SEGMENTS_AT_A_TIME
    bounds = np.flatnonzero(np.diff(batch_of_session, prepend=-1, append=-1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield start, read_long_sessions(segment_index, sessions[start:stop])


def read_long_sessions(segment_index: SegmentIndex, sessions: NDArray[np.int64]) -> LongSessions:
    first_segments, all_lengths, all_modes = segment_index
    num_segments = first_segments[sessions + 1] - first_segments[sessions]
    stops = np.cumsum(num_segments)
    starts = stops - num_segments
    segments = np.arange(stops[-1]) + np.repeat(first_segments[sessions] - starts, num_segments)
    segment_lengths, modes = all_lengths[segments], all_modes[segments]

    ends = np.cumsum(segment_lengths, dtype=np.int64)
    begins = ends - segment_lengths
    session_end = ends[stops - 1]
    session_begin = begins[starts]
    session_of_segment = np.repeat(np.arange(len(sessions)), num_segments)
    last_system = starts - 1  # the last segment of the leading system message
    system = np.flatnonzero(is_context_with(modes, LEADING_SYSTEM))
    last_system[session_of_segment[system]] = system  # of several the last one stays
    system_stop = np.where(last_system < starts, session_begin, ends[last_system])
    may_open = np.append(is_context_with(modes, MESSAGE_START), False)
    may_open[starts] = True
    may_open[last_system + 1] = True  # of the next session, if this one is all system message

    runs = target_runs(num_segments, segment_lengths, modes)
    run_end = runs.end + session_begin[runs.session]
    run_begin = runs.begin + session_begin[runs.session]
    turns_per_session = np.bincount(runs.session[runs.first_run], minlength=len(sessions))
    return LongSessions(
        begin=session_begin,
        length=session_end - session_begin,
        system_length=system_stop - session_begin,
        openings=begins[may_open[:-1]],
        run_begin=run_begin,
        run_end=run_end,
        turn_begin=run_begin[runs.first_run],
        turn_end=run_end[np.append(runs.first_run[1:], len(run_end))[: len(runs.first_run)] - 1],
        first_turn=np.concatenate([[0], np.cumsum(turns_per_session)]),
    )


def cut_windows(sessions: LongSessions, window: Window) -> tuple[CutPieces, CutTally]:
    tally = CutTally()
    active = np.flatnonzero(np.diff(sessions.first_turn))
    turn = sessions.first_turn[active]
    covered = sessions.begin[active]  # every target before this offset is in a piece
    inside_turn = np.zeros(len(active), dtype=np.bool_)
    is_first = True
    made: list[tuple[NDArray[np.int64], ...]] = []
    while len(active):
        begin = sessions.begin[active]
        first_target = sessions.turn_begin[turn]
        run = np.searchsorted(sessions.run_end, covered[inside_turn], side="right")
        first_target[inside_turn] = np.maximum(sessions.run_begin[run], covered[inside_turn])
        system, start = _open_pieces(sessions, window, active, turn, first_target, covered)
        limit = start + window.capacity - system
        next_turn = np.minimum(
            np.searchsorted(sessions.turn_end, limit, side="right"),
            sessions.first_turn[active + 1],
        )
        cut_inside = next_turn == turn
        stop = np.where(cut_inside, limit, sessions.turn_end[next_turn - 1])
        tally.num_turns_cut += int(np.sum(cut_inside & ~inside_turn))
        without_system = (sessions.system_length[active] > 0) & (system == 0) & (start > begin)
        tally.num_pieces_without_system += int(without_system.sum())
        opened = sessions.first_opening(start, start + 1, otherwise=np.full_like(start, -1))
        tally.num_pieces_opened_inside_message += int((opened < 0).sum())
        plain = start == begin + system  # nothing is left out in between: one run from the start
        system, start = np.where(plain, 0, system), np.where(plain, begin, start)
        target_start = np.where(is_first & (start == begin), begin, first_target)
        made.append((active, system, start, target_start, stop))
        left = next_turn < sessions.first_turn[active + 1]
        active, turn, covered = active[left], next_turn[left], stop[left]
        inside_turn = cut_inside[left]
        is_first = False
    pieces = _in_order_of_sessions(made, sessions)
    _count_shown(pieces, sessions, tally)
    return pieces, tally


def _open_pieces(
    sessions: LongSessions,
    window: Window,
    active: NDArray[np.int64],  # (num_active,): the sessions
    turn: NDArray[np.int64],  # (num_active,)
    first_target: NDArray[np.int64],  # (num_active,)
    covered: NDArray[np.int64],  # (num_active,)
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(system tokens, start) of the pieces whose first new target is `first_target`.

    In this order, as far as there is room beside the turn: the messages since the turn before
    (its prompt), the leading system message, whole messages before the prompt (the replay, at
    most window.context tokens). The system message is repeated if it and the whole prompt fit,
    or if it takes at most half of the room; a turn that alone does not fit leaves half of the
    window for context. A prompt that does not fit is cut at the front: at a message if that
    keeps half of what would fit, else inside one. The token before the first target is always
    there, for it is what predicts the target.
    """
    begin, system = sessions.begin[active], sessions.system_length[active]
    turn_begin = sessions.turn_begin[turn]
    turn_length = sessions.turn_end[turn] - turn_begin
    opens_turn = first_target == turn_begin
    prompt_begin = np.where(opens_turn, covered, first_target)
    turn_fits = opens_turn & (turn_length < window.capacity)
    room = np.where(turn_fits, window.capacity - turn_length, window.capacity // 2)
    least_start = np.maximum(begin + system, np.minimum(prompt_begin, first_target - 1))
    crowded = (system + first_target - least_start > room) & (2 * system > room)
    system = np.where(crowded, 0, system)
    system_stop = begin + system
    prompt_begin = np.maximum(prompt_begin, system_stop)
    earliest_fit = np.maximum(system_stop, first_target - (room - system))
    whole_prompt = sessions.first_opening(prompt_begin, first_target, otherwise=first_target - 1)
    replay = np.maximum(earliest_fit, prompt_begin - window.context)
    replay = np.minimum(replay, whole_prompt)
    with_replay = sessions.first_opening(replay, first_target, otherwise=replay)
    cut_prompt = sessions.first_opening(earliest_fit, first_target, otherwise=first_target)
    keeps_half = 2 * (first_target - cut_prompt) >= first_target - earliest_fit
    cut_prompt = np.where(keeps_half & (cut_prompt < first_target), cut_prompt, earliest_fit)
    return system, np.where(whole_prompt >= earliest_fit, with_replay, cut_prompt)


def truncate(sessions: LongSessions, window: Window) -> tuple[CutPieces, CutTally]:
    first, end_turn = sessions.first_turn[:-1], sessions.first_turn[1:]
    limit = sessions.begin + window.capacity
    next_turn = np.minimum(np.searchsorted(sessions.turn_end, limit, side="right"), end_turn)
    fits = next_turn > first
    stop = sessions.begin.copy()
    stop[fits] = sessions.turn_end[next_turn[fits] - 1]
    alone = np.flatnonzero(~fits & (end_turn > first))  # where no whole turn fits
    begin_of_first = sessions.turn_begin[first[alone]]
    length_of_first = sessions.turn_end[first[alone]] - begin_of_first
    cut = alone[(length_of_first >= window.capacity) & (begin_of_first < limit[alone])]
    stop[cut] = limit[cut]

    session_of_run, session_of_turn = _sessions_of(sessions)
    run_length = sessions.run_end - sessions.run_begin
    kept = np.minimum(sessions.run_end, stop[session_of_run]) - sessions.run_begin
    lost = run_length - np.maximum(kept, 0)
    shown = np.flatnonzero(stop > sessions.begin)
    context = sessions.begin + sessions.length - stop
    context -= np.bincount(session_of_run, lost, minlength=len(stop)).astype(np.int64)
    zero = np.zeros(len(shown), dtype=np.int64)
    spans = np.stack([zero, zero, zero, stop[shown] - sessions.begin[shown]], axis=1)
    return CutPieces(session=shown, spans=spans.astype(np.int32)), CutTally(
        num_turns_cut=len(cut),
        num_turns_lost=int((sessions.turn_begin >= stop[session_of_turn]).sum()),
        num_targets_lost=int(lost.sum()),
        num_context_tokens_lost=int(context[shown].sum()),
    )


def drop(sessions: LongSessions, window: Window) -> tuple[CutPieces, CutTally]:
    del window
    no_pieces = CutPieces(session=np.zeros(0, np.int64), spans=np.zeros((0, 4), np.int32))
    return no_pieces, CutTally(
        num_turns_lost=len(sessions.turn_begin),
        num_targets_lost=int((sessions.run_end - sessions.run_begin).sum()),
    )


def _sessions_of(sessions: LongSessions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The session of each run, (num_runs,), and of each turn, (num_turns,)."""
    of_turn = np.repeat(np.arange(len(sessions.begin)), np.diff(sessions.first_turn))
    turn_of_run = np.searchsorted(sessions.turn_begin, sessions.run_begin, side="right") - 1
    return of_turn[turn_of_run], of_turn


def _in_order_of_sessions(
    made: list[tuple[NDArray[np.int64], ...]], sessions: LongSessions
) -> CutPieces:
    """Sort pieces made step by step: (session, system tokens, start, target_start, stop)."""
    if not made:
        return CutPieces(session=np.zeros(0, np.int64), spans=np.zeros((0, 4), np.int32))
    session, system, *offsets = (np.concatenate(column) for column in zip(*made, strict=True))
    begin = sessions.begin[session]
    spans = np.stack([system, *(offset - begin for offset in offsets)], axis=1)
    order = np.argsort(session, kind="stable")
    return CutPieces(session=session[order], spans=spans[order].astype(np.int32))


def _count_shown(pieces: CutPieces, sessions: LongSessions, tally: CutTally) -> None:
    """Tokens of all pieces together, and how many different tokens of the sessions these are."""
    base = sessions.begin[pieces.session]
    system_stop, start, _, stop = pieces.spans.T + base
    begin, end = np.concatenate([base, start]), np.concatenate([system_stop, stop])
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    seen_until = np.maximum.accumulate(np.concatenate([[0], end]))[:-1]
    shown_once = int(np.maximum(0, end - np.maximum(begin, seen_until)).sum())
    tally.num_tokens_replayed += int((end - begin).sum()) - shown_once
    cut = np.zeros(len(sessions.begin), dtype=np.bool_)
    cut[pieces.session] = True
    tally.num_context_tokens_lost += int(sessions.length[cut].sum()) - shown_once
