"""What must hold for a batch of encoded sessions, and what there is to learn in it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn import modes as mode_bits
from megatron_multiturn.encoded_sessions import EncodedBatch
from megatron_multiturn.errors import DatasetError


def session_lengths(batch: EncodedBatch) -> NDArray[np.int64]:
    """Tokens of each session, (num_sessions,)."""
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(batch.segment_lengths)])
    return np.diff(ends[batch.first_segments])


def count_targets(batch: EncodedBatch) -> tuple[int, int]:
    """(turns, target tokens) of the sessions of a batch.

    The first token of a session is predicted by nothing, so it is no target, and a turn of that
    token alone is none: tokens [a b], one target segment, has 1 turn and 1 target token.
    """
    targets = mode_bits.is_target(batch.modes)
    num_targets = batch.segment_lengths.astype(np.int64) * targets
    opening = batch.first_segments[:-1]
    num_targets[opening] -= targets[opening]
    # A turn is its first segment and those that continue it; what continues none, at the head of
    # a session, begins one.
    begins = targets & mode_bits.begins_turn(batch.modes)
    first_targets = np.flatnonzero(targets)
    session = np.searchsorted(batch.first_segments, first_targets, side="right")
    begins[first_targets[np.diff(session, prepend=0) != 0]] = True
    turns = np.cumsum(begins)[targets & (num_targets > 0)]
    return int(np.count_nonzero(np.diff(turns, prepend=0))), int(num_targets.sum())


def check_batch(
    batch: EncodedBatch,
    locations: Sequence[str] | None,
    *,
    first_session: int,
    vocab_size: int,
    num_turn_weights: int,
) -> None:
    """Raise DatasetError for the first session that is malformed.

    locations: of each session; without them it is named by its number, from first_session.
    """

    def where(session: int) -> str:
        return locations[session] if locations else f"session {first_session + session}"

    lengths, modes, firsts = batch.segment_lengths, batch.modes, batch.first_segments
    num_segments = np.diff(firsts)
    if firsts[0] != 0 or firsts[-1] != len(lengths) or len(lengths) != len(modes):
        raise DatasetError(f"{where(0)}: the batch has {len(lengths)} lengths, {len(modes)} modes")
    empty = np.flatnonzero(num_segments < 1).tolist()
    empty += _sessions_of(firsts, np.flatnonzero(lengths < 1))[:1]
    if empty:
        raise DatasetError(
            f"{where(min(empty))}: a session needs tokens, and every segment at least one"
        )
    ends = np.cumsum(lengths, dtype=np.int64)
    num_tokens = int(ends[-1]) if len(ends) else 0
    if num_tokens != len(batch.tokens):
        raise DatasetError(
            f"{where(0)}: the segments from here on have {num_tokens} tokens, the sessions have "
            f"{len(batch.tokens)}"
        )
    if num_tokens and not 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < vocab_size:
        at = int(np.flatnonzero((batch.tokens < 0) | (batch.tokens >= vocab_size))[0])
        (session,) = _sessions_of(firsts, np.searchsorted(ends, [at], side="right"))
        raise DatasetError(
            f"{where(session)}: token id {batch.tokens[at]} is not in the vocabulary of "
            f"{vocab_size:,} tokens; the tokenizer's files do not fit together"
        )
    weights = (modes >> mode_bits.WEIGHT_SHIFT) * mode_bits.is_target(modes)
    heavy = np.flatnonzero(weights >= num_turn_weights)
    if len(heavy):
        (session,) = _sessions_of(firsts, heavy[:1])
        raise DatasetError(
            f"{where(session)}: turn weight number {weights[heavy[0]]} of {num_turn_weights} "
            "weights"
        )


def _sessions_of(first_segments: NDArray[np.int64], segments: NDArray[np.int64]) -> list[int]:
    """The session that each segment lies in."""
    return (np.searchsorted(first_segments, segments, side="right") - 1).tolist()
