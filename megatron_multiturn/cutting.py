"""Where one session that is longer than its window is cut; see `windows` for what pieces are.

`window` on u1 A u2 B u3 C u4 D, with room for the system message and two exchanges:

    piece 0   system u1 A u2 B
    piece 1   system u2 B u3 C        u2 and B are replayed as context, C is the new target
    piece 2   system u3 C u4 D
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.modes import (
    LEADING_SYSTEM,
    MESSAGE_START,
    begins_turn,
    is_context_with,
    is_target,
)

# (document_indices (num_sessions + 1,), segment lengths (num_segments,), modes (num_segments,))
type SegmentIndex = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int8]]


@dataclass(slots=True, kw_only=True)
class CutTally:
    """What the cutting did, added up over sessions; the fields of CutReport explain them."""

    num_turns_cut: int = 0
    num_targets_lost: int = 0
    num_tokens_replayed: int = 0
    num_context_tokens_lost: int = 0
    num_pieces_opened_inside_message: int = 0
    num_pieces_without_system: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LongSession:
    """Where a session may be cut. All offsets are in tokens from the start of the session."""

    length: int
    system_stop: int  # end of the leading system message; 0 without one
    openings: list[int]  # ascending; where a piece may open
    runs: list[tuple[int, int]]  # target runs, without the session's first token
    turns: list[tuple[int, int]]  # from the first to the last target of each turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    capacity: int  # tokens of a piece at most
    context: int  # tokens of preceding messages that a piece repeats at most


type Span = tuple[int, int, int, int]  # system_stop, start, target_start, stop


def read_long_session(segment_index: SegmentIndex, session: int) -> LongSession:
    document_indices, segment_lengths, all_modes = segment_index
    segments = slice(int(document_indices[session]), int(document_indices[session + 1]))
    modes = np.asarray(all_modes[segments])
    ends = np.cumsum(segment_lengths[segments], dtype=np.int64)
    begins = ends - segment_lengths[segments]
    system_ends = ends[is_context_with(modes, LEADING_SYSTEM)]
    system_stop = int(system_ends[-1]) if len(system_ends) else 0
    message_starts = begins[is_context_with(modes, MESSAGE_START)].tolist()
    targets = is_target(modes)
    # The session's first token is predicted by nothing, so it is no target.
    run_begins = np.maximum(begins[targets], 1).tolist()
    run_ends = ends[targets].tolist()
    turn_of_run = np.cumsum(begins_turn(modes))[targets].tolist()
    runs: list[tuple[int, int]] = []
    turns: list[tuple[int, int]] = []
    last_turn = -1
    for begin, end, turn in zip(run_begins, run_ends, turn_of_run, strict=True):
        if begin == end:
            continue
        runs.append((begin, end))
        if turn == last_turn:
            turns[-1] = (turns[-1][0], end)
        else:
            turns.append((begin, end))
        last_turn = turn
    return LongSession(
        length=int(ends[-1]),
        system_stop=system_stop,
        openings=sorted({0, system_stop, *message_starts}),
        runs=runs,
        turns=turns,
    )


def cut_windows(session: LongSession, window: Window, tally: CutTally) -> list[Span]:
    spans: list[Span] = []
    turn = 0
    covered = 0  # every target before this offset is in a piece
    inside_turn = False
    while turn < len(session.turns):
        first_target = session.turns[turn][0]
        if inside_turn:
            first_target = next(max(b, covered) for b, e in session.runs if e > covered)
        system_stop, start = _open_piece(session, window, turn, first_target, covered)
        limit = start + window.capacity - system_stop
        if session.turns[turn][1] > limit:
            tally.num_turns_cut += not inside_turn
            inside_turn, stop = True, limit
        else:
            inside_turn = False
            while turn < len(session.turns) and session.turns[turn][1] <= limit:
                stop = session.turns[turn][1]
                turn += 1
        tally.num_pieces_without_system += session.system_stop > 0 == system_stop and start > 0
        tally.num_pieces_opened_inside_message += start not in session.openings
        if start == system_stop:  # nothing is left out in between: one plain run from the start
            system_stop = start = 0
        target_start = first_target if spans or start else 0
        spans.append((system_stop, start, target_start, stop))
        covered = stop
    shown, shown_once = _count_shown(spans)
    tally.num_tokens_replayed += shown - shown_once
    tally.num_context_tokens_lost += session.length - shown_once if spans else 0
    return spans


def _count_shown(spans: list[Span]) -> tuple[int, int]:
    """Tokens of all pieces together, and how many different tokens of the session these are."""
    shown = shown_once = seen_until = 0
    runs = [(0, system_stop) for system_stop, *_ in spans]
    for begin, end in sorted(runs + [(start, stop) for _, start, _, stop in spans]):
        shown += end - begin
        shown_once += max(0, end - max(begin, seen_until))
        seen_until = max(seen_until, end)
    return shown, shown_once


def _open_piece(
    session: LongSession, window: Window, turn: int, first_target: int, covered: int
) -> tuple[int, int]:
    """(system_stop, start) of the piece whose first new target is `first_target`.

    In this order, as far as there is room beside the turn: the messages since the turn before
    (its prompt), the leading system message, whole messages before the prompt (the replay, at
    most window.context tokens). The system message is repeated if it and the whole prompt fit,
    or if it takes at most half of the room; a turn that alone does not fit leaves half of the
    window for context. A prompt that does not fit is cut at the front: at a message if that
    keeps half of what would fit, else inside one. The token before the first target is always
    there, for it is what predicts the target.
    """
    begin, end = session.turns[turn]
    prompt_begin = covered if first_target == begin else first_target
    turn_fits = first_target == begin and end - begin < window.capacity
    room = window.capacity - (end - begin) if turn_fits else window.capacity // 2
    system_stop = session.system_stop
    least_start = max(system_stop, min(prompt_begin, first_target - 1))
    if system_stop + first_target - least_start > room and 2 * system_stop > room:
        system_stop = 0
    prompt_begin = max(prompt_begin, system_stop)
    earliest_fit = max(system_stop, first_target - (room - system_stop))
    whole_prompt = _first_opening(session, prompt_begin, first_target)
    if whole_prompt is None:
        whole_prompt = first_target - 1
    if whole_prompt >= earliest_fit:
        replay = min(max(earliest_fit, prompt_begin - window.context), whole_prompt)
        opening = _first_opening(session, replay, first_target)
        return system_stop, replay if opening is None else opening
    opening = _first_opening(session, earliest_fit, first_target)
    if opening is not None and 2 * (first_target - opening) >= first_target - earliest_fit:
        return system_stop, opening
    return system_stop, earliest_fit


def _first_opening(session: LongSession, begin: int, end: int) -> int | None:
    """The first place in [begin, end) where a piece may open."""
    index = bisect_left(session.openings, begin)
    if index < len(session.openings) and session.openings[index] < end:
        return session.openings[index]
    return None


def truncate(session: LongSession, window: Window, tally: CutTally) -> list[Span]:
    stops = [end for _, end in session.turns if end <= window.capacity]
    stop = stops[-1] if stops else 0
    if not stops and session.turns:
        begin, end = session.turns[0]
        if end - begin >= window.capacity > begin:
            stop = window.capacity
            tally.num_turns_cut += 1
    kept = sum(max(0, min(end, stop) - begin) for begin, end in session.runs)
    all_targets = sum(end - begin for begin, end in session.runs)
    tally.num_targets_lost += all_targets - kept
    tally.num_context_tokens_lost += (session.length - stop) - (all_targets - kept) if stop else 0
    return [(0, 0, 0, stop)] if stop else []


def drop(session: LongSession, window: Window, tally: CutTally) -> list[Span]:
    del window
    tally.num_targets_lost += sum(end - begin for begin, end in session.runs)
    return []
