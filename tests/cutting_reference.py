"""How one long session is cut, step by step and without arrays: what `cutting` must come to."""

from dataclasses import dataclass, field

import numpy as np
from drawn_sessions import DrawnSession

from megatron_multiturn.modes import (
    LEADING_SYSTEM,
    MESSAGE_START,
    begins_turn,
    is_context_with,
    is_target,
)

type Span = tuple[int, int, int, int]  # system_stop, start, target_start, stop


@dataclass
class Cut:
    """The pieces of a session and the counts of CutTally."""

    spans: list[Span] = field(default_factory=list)
    num_turns_cut: int = 0
    num_turns_lost: int = 0
    num_targets_lost: int = 0
    num_tokens_replayed: int = 0
    num_context_tokens_lost: int = 0
    num_pieces_opened_inside_message: int = 0
    num_pieces_without_system: int = 0


class Reference:
    """One session and a window of `capacity` tokens, of which `context` may be a replay."""

    def __init__(self, session: DrawnSession, capacity: int, context: int) -> None:
        self.capacity, self.context = capacity, context
        self.length = len(session.tokens)
        ends = np.cumsum(session.segment_lengths)
        begins = ends - session.segment_lengths
        system_ends = ends[is_context_with(session.modes, LEADING_SYSTEM)]
        self.system_stop = int(system_ends[-1]) if len(system_ends) else 0
        starts = begins[is_context_with(session.modes, MESSAGE_START)].tolist()
        self.openings = sorted({0, self.system_stop, *starts})
        targets = is_target(session.modes)
        marks = np.cumsum(begins_turn(session.modes))[targets].tolist()
        bounds = zip(begins[targets].tolist(), ends[targets].tolist(), marks, strict=True)
        runs = [(max(begin, 1), end, mark) for begin, end, mark in bounds if max(begin, 1) < end]
        self.runs = [(begin, end) for begin, end, _ in runs]
        turns = {mark: [r[:2] for r in runs if r[2] == mark] for _, _, mark in runs}
        self.turns = [(parts[0][0], parts[-1][1]) for _, parts in sorted(turns.items())]

    def window(self) -> Cut:
        cut = Cut()
        turn = covered = 0
        inside = False
        while turn < len(self.turns):
            first_target = self.turns[turn][0]
            if inside:
                first_target = next(max(b, covered) for b, e in self.runs if e > covered)
            system_stop, start = self._open(turn, first_target, covered)
            limit = start + self.capacity - system_stop
            if self.turns[turn][1] > limit:
                cut.num_turns_cut += not inside
                inside, stop = True, limit
            else:
                inside = False
                while turn < len(self.turns) and self.turns[turn][1] <= limit:
                    stop = self.turns[turn][1]
                    turn += 1
            cut.num_pieces_without_system += self.system_stop > 0 == system_stop and start > 0
            cut.num_pieces_opened_inside_message += start not in self.openings
            if start == system_stop:
                system_stop = start = 0
            target_start = first_target if cut.spans or start else 0
            cut.spans.append((system_stop, start, target_start, stop))
            covered = stop
        shown = [[*range(s), *range(start, stop)] for s, start, _, stop in cut.spans]
        once = len({token for tokens in shown for token in tokens})
        cut.num_tokens_replayed = sum(map(len, shown)) - once
        cut.num_context_tokens_lost = self.length - once if cut.spans else 0
        return cut

    def _open(self, turn: int, first_target: int, covered: int) -> tuple[int, int]:
        begin, end = self.turns[turn]
        opens_turn = first_target == begin
        prompt_begin = covered if opens_turn else first_target
        turn_fits = opens_turn and end - begin < self.capacity
        room = self.capacity - (end - begin) if turn_fits else self.capacity // 2
        system_stop = self.system_stop
        least_start = max(system_stop, min(prompt_begin, first_target - 1))
        if system_stop + first_target - least_start > room and 2 * system_stop > room:
            system_stop = 0
        prompt_begin = max(prompt_begin, system_stop)
        earliest_fit = max(system_stop, first_target - (room - system_stop))
        whole_prompt = self._first_opening(prompt_begin, first_target, first_target - 1)
        if whole_prompt >= earliest_fit:
            replay = min(max(earliest_fit, prompt_begin - self.context), whole_prompt)
            return system_stop, self._first_opening(replay, first_target, replay)
        opening = self._first_opening(earliest_fit, first_target, first_target)
        keeps_half = 2 * (first_target - opening) >= first_target - earliest_fit
        if opening < first_target and keeps_half:
            return system_stop, opening
        return system_stop, earliest_fit

    def _first_opening(self, begin: int, end: int, otherwise: int) -> int:
        return next((opening for opening in self.openings if begin <= opening < end), otherwise)

    def truncate(self) -> Cut:
        cut = Cut()
        stop = max((end for _, end in self.turns if end <= self.capacity), default=0)
        if not stop and self.turns:
            begin, end = self.turns[0]
            if end - begin >= self.capacity > begin:
                stop = self.capacity
                cut.num_turns_cut = 1
        lost = sum(end - max(begin, min(end, stop)) for begin, end in self.runs)
        cut.num_targets_lost = lost
        cut.num_turns_lost = sum(begin >= stop for begin, _ in self.turns)
        if stop:
            cut.num_context_tokens_lost = self.length - stop - lost
            cut.spans.append((0, 0, 0, stop))
        return cut

    def drop(self) -> Cut:
        return Cut(
            num_turns_lost=len(self.turns),
            num_targets_lost=sum(end - begin for begin, end in self.runs),
        )
