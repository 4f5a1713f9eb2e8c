"""Where the targets of sessions are, from the index alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.modes import CONTEXT, KIND_MASK, TARGET_BEGIN, WEIGHT_SHIFT


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
    segment: NDArray[np.int64]  # (num_runs,): over all sessions

    def weights(
        self, modes: NDArray[np.int8], turn_weights: Sequence[float]
    ) -> NDArray[np.float64] | None:
        """Of each turn, (num_turns,); None if all turns weigh 1.

        modes: of all segments; turn_weights: what those of targets number.
        """
        if len(turn_weights) == 1:
            return None
        numbers = modes[self.segment[self.first_run]] >> WEIGHT_SHIFT
        return np.array(turn_weights)[numbers]

    def sum_by_turn(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """(num_runs,) -> (num_turns,)."""
        return np.add.reduceat(values, self.first_run) if len(values) else values


def target_runs(
    num_segments: NDArray[np.int64],  # (num_sessions,)
    segment_lengths: NDArray[np.int32],  # of all sessions, one after the other
    modes: NDArray[np.int8],  # the same
    *,
    session_stops: NDArray[np.int64] | None = None,  # (num_sessions,)
) -> TargetRuns:
    """The targets of any number of sessions; those from `session_stops` on are left out."""
    kind = modes & KIND_MASK
    targets = (kind != CONTEXT).nonzero()[0]
    target_lengths = segment_lengths[targets]
    ends = segment_lengths.cumsum(dtype=np.int64)
    session_begin = np.zeros(len(num_segments), dtype=np.int64)
    session_begin[1:] = ends[num_segments.cumsum()[:-1] - 1]
    session = np.arange(len(num_segments)).repeat(num_segments)[targets]
    end = ends[targets] - session_begin[session]
    begin = np.maximum(end - target_lengths, 1)
    if session_stops is not None:
        end = np.minimum(end, session_stops[session])
    turn_mark = (kind == TARGET_BEGIN).cumsum()[targets]
    kept = begin < end
    if not kept.all():
        targets = targets[kept]
        session, begin, end, turn_mark = session[kept], begin[kept], end[kept], turn_mark[kept]
    opens_turn = np.ones(len(session), dtype=np.bool_)
    opens_turn[1:] = (turn_mark[1:] != turn_mark[:-1]) | (session[1:] != session[:-1])
    return TargetRuns(
        session=session,
        begin=begin,
        end=end,
        turn=opens_turn.cumsum() - 1,
        first_run=opens_turn.nonzero()[0],
        segment=targets,
    )
