"""What encoding hands on: documents as tokens, segments and modes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_multiturn.errors import SessionError
from megatron_multiturn.turn_weights import UNWEIGHTED


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSession:
    """A document as tokens."""

    tokens: NDArray[np.int32]  # (num_tokens,)
    segment_lengths: NDArray[np.int32]  # (num_segments,), none is 0
    modes: NDArray[np.int8]  # (num_segments,)
    location: str = ""  # "file.jsonl:17", where it came from; not stored


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """What became of a batch of sessions; all arrays are of the sessions one after another."""

    tokens: NDArray[np.integer[Any]]  # (num_tokens,)
    segment_lengths: NDArray[np.int32]  # (num_segments,), none is 0
    modes: NDArray[np.int8]  # (num_segments,)
    first_segments: NDArray[np.int64]  # (num_sessions + 1,), from 0
    # (num_sessions,): which of the given sessions each came from, ascending; one can become several
    # documents, or none.
    sources: NDArray[np.int32]
    errors: list[tuple[int, SessionError]]  # (source, why it could not be encoded), ascending
    # num_unknown_tokens: text that the vocabulary cannot write
    # num_lossy_sessions: some run does not decode to its text
    # num_recut_sessions: some token lies across an edge
    # num_open_turns: whose end is text, so that nothing says that the answer is over
    # num_rewritten_sessions: their template rewrites history
    totals: Counter[str]
    turn_weights: tuple[float, ...] = UNWEIGHTED  # what the modes of targets number

    @property
    def num_sessions(self) -> int:
        return len(self.sources)

    def session(self, index: int) -> EncodedSession:
        """Session `index` of the batch; a view."""
        start, stop = self.first_segments[index : index + 2].tolist()
        first_token = int(self.segment_lengths[:start].sum())
        lengths = self.segment_lengths[start:stop]
        tokens = self.tokens[first_token : first_token + int(lengths.sum())]
        return EncodedSession(
            tokens=tokens.astype(np.int32, copy=False),
            segment_lengths=lengths,
            modes=self.modes[start:stop],
        )


def join_encoded(
    sessions: Sequence[EncodedSession],
    *,
    sources: Sequence[int] | None = None,
    errors: Sequence[tuple[int, SessionError]] = (),
    totals: Mapping[str, int] | None = None,
    turn_weights: Sequence[float] = UNWEIGHTED,
) -> EncodedBatch:
    """A batch of sessions that are encoded already; without `sources`, each is a source."""
    ends = np.cumsum([len(session.modes) for session in sessions], dtype=np.int64)
    return EncodedBatch(
        tokens=_concatenate([session.tokens for session in sessions], np.int32),
        segment_lengths=_concatenate([session.segment_lengths for session in sessions], np.int32),
        modes=_concatenate([session.modes for session in sessions], np.int8),
        first_segments=np.concatenate([np.zeros(1, dtype=np.int64), ends]),
        sources=np.array(range(len(sessions)) if sources is None else sources, dtype=np.int32),
        errors=list(errors),
        totals=Counter(totals),
        turn_weights=tuple(turn_weights),
    )


def _concatenate(arrays: Sequence[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype, copy=False)
