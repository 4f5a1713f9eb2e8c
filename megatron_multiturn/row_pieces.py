"""What is read of a dataset for one row: the tokens of its pieces, and where their targets are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class SessionArrays(Protocol):
    """What a row needs of a session; `EncodedSession` has it."""

    @property
    def tokens(self) -> NDArray[Any]: ...  # (num_tokens,)

    @property
    def segment_lengths(self) -> NDArray[Any]: ...  # (num_segments,)

    @property
    def modes(self) -> NDArray[np.int8]: ...  # (num_segments,)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPieces:
    """The pieces of a row, one after the other.

    The tokens are those of the pieces, the segments those of their whole sessions: a turn may
    have targets in other pieces too.
    """

    tokens: NDArray[Any]  # (num_tokens,): of each piece session[:system_stop], session[start:stop]
    num_segments: NDArray[np.int64]  # (num_pieces,)
    segment_lengths: NDArray[np.int32]  # (num_segments.sum(),)
    modes: NDArray[np.int8]  # (num_segments.sum(),)


def join_sessions(sessions: Sequence[SessionArrays], spans: NDArray[np.int32]) -> RowPieces:
    """The pieces of a row from the whole session of each, and their spans, (num_pieces, 4)."""
    parts = []
    for session, (system_stop, start, _, stop) in zip(sessions, spans.tolist(), strict=True):
        parts += [session.tokens[:system_stop], session.tokens[start:stop]]
    return RowPieces(
        tokens=np.concatenate(parts),
        num_segments=np.array([len(session.modes) for session in sessions]),
        segment_lengths=np.concatenate([session.segment_lengths for session in sessions]),
        modes=np.concatenate([session.modes for session in sessions]),
    )


def token_runs(
    first_tokens: NDArray[np.int64],  # (num_pieces,): where each piece's session begins
    spans: NDArray[np.int32],  # (num_pieces, 4)
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(start, length) of the runs of tokens that the pieces are made of, in order.

    One run for a piece, or a second one before it where it repeats the system message.
    """
    system_stop, start, _, stop = spans.T
    if not system_stop.any():
        return first_tokens + start, (stop - start).astype(np.int64)
    starts = np.stack([first_tokens, first_tokens + start], axis=1).ravel()
    lengths = np.stack([system_stop, stop - start], axis=1).ravel().astype(np.int64)
    filled = np.flatnonzero(lengths)
    return starts[filled], lengths[filled]


def indices_of_runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... for lengths[0] numbers, then the next run."""
    indices = (starts - (lengths.cumsum() - lengths)).repeat(lengths)
    indices += np.arange(len(indices))
    return indices
