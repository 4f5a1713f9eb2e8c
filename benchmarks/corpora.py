"""Datasets of random tokens on disk, with real indices, written as whole arrays."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.index_file import write_index
from megatron_multiturn.manifest import (
    FORMAT_VERSION,
    Counts,
    Manifest,
    TemplateIdentity,
    file_hash,
)
from megatron_multiturn.modes import (
    CONTEXT,
    LEADING_SYSTEM,
    MESSAGE_START,
    TARGET_BEGIN,
)
from megatron_multiturn.vocabulary import TokenizerIdentity

_TOKENS_AT_A_TIME = 1 << 24
_DTYPE = np.dtype(np.uint16)

# A system message, three questions and answers, and an end: the modes of a session's segments.
MODES = np.array(
    [
        CONTEXT | MESSAGE_START | LEADING_SYSTEM,
        *[CONTEXT | MESSAGE_START, TARGET_BEGIN] * 3,
        CONTEXT,
    ],
    dtype=np.int8,
)
NUM_SEGMENTS = len(MODES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Sessions' lengths in tokens: log-normal, between `shortest` and `longest`."""

    median: float
    sigma: float
    shortest: int
    longest: int

    def draw(self, num_sessions: int, seed: int) -> NDArray[np.int32]:
        rng = np.random.default_rng(seed)
        lengths = np.empty(num_sessions, dtype=np.int32)
        for start in range(0, num_sessions, 1 << 20):
            part = lengths[start : start + (1 << 20)]
            drawn = rng.lognormal(np.log(self.median), self.sigma, len(part))
            part[:] = drawn.clip(self.shortest, self.longest)
        return lengths


def write_corpus(prefix: Path, lengths: NDArray[np.int32], tokenizer: TokenizerIdentity) -> int:
    """Sessions of these lengths, of NUM_SEGMENTS segments each; returns the number of tokens.

    Token ids are random and 3 or more; 2 closes every session. `lengths` are at least
    NUM_SEGMENTS.
    """
    num_sessions = len(lengths)
    num_tokens = int(lengths.sum(dtype=np.int64))
    _write_tokens(prefix.with_suffix(".bin"), lengths, tokenizer.vocab_size)
    share = lengths // NUM_SEGMENTS
    segment_lengths = np.repeat(share, NUM_SEGMENTS).reshape(-1, NUM_SEGMENTS)
    segment_lengths[:, -2] += lengths - share * NUM_SEGMENTS
    with prefix.with_suffix(".idx").open("wb") as stream:
        write_index(
            stream,
            token_dtype=_DTYPE,
            segment_lengths=segment_lengths.ravel(),
            first_segments=np.arange(num_sessions + 1, dtype=np.int64) * NUM_SEGMENTS,
            modes=np.tile(MODES, num_sessions),
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tool_version="benchmark",
        tokenizer=tokenizer,
        template=TemplateIdentity(name="random", content_hash="0"),
        turn_weights=(1.0,),
        counts=Counts(
            sessions=num_sessions,
            segments=num_sessions * NUM_SEGMENTS,
            turns=3 * num_sessions,
            tokens=num_tokens,
            target_tokens=int(segment_lengths[:, 2::2].sum(dtype=np.int64)),
            rejected={},
        ),
        inputs=(),
        bin_bytes=num_tokens * _DTYPE.itemsize,
        idx_bytes=prefix.with_suffix(".idx").stat().st_size,
        idx_sha256=file_hash(str(prefix.with_suffix(".idx"))),
    )
    prefix.with_suffix(".json").write_text(manifest.to_json())
    return num_tokens


def write_documents(prefix: Path, source: Path, lengths: NDArray[np.int32]) -> None:
    """The tokens of `source` as Megatron's pretraining wants them: a sequence a session."""
    prefix.with_suffix(".bin").hardlink_to(source.with_suffix(".bin"))
    with prefix.with_suffix(".idx").open("wb") as stream:
        write_index(
            stream,
            token_dtype=_DTYPE,
            segment_lengths=lengths,
            first_segments=np.arange(len(lengths) + 1, dtype=np.int64),
            modes=np.zeros(len(lengths), dtype=np.int8),
        )


def _write_tokens(path: Path, lengths: NDArray[np.int32], vocab_size: int) -> None:
    """Random ids from one block that is repeated from a random place, the last of each a 2."""
    rng = np.random.default_rng(1)
    block = rng.integers(3, vocab_size, 2 * _TOKENS_AT_A_TIME, dtype=_DTYPE.type)
    ends = np.cumsum(lengths, dtype=np.int64)
    num_tokens = int(ends[-1])
    with path.open("wb") as stream:
        for start in range(0, num_tokens, _TOKENS_AT_A_TIME):
            stop = min(start + _TOKENS_AT_A_TIME, num_tokens)
            first = int(rng.integers(_TOKENS_AT_A_TIME))
            part = block[first : first + stop - start].copy()
            first_end, last_end = np.searchsorted(ends, [start + 1, stop + 1])
            part[ends[first_end:last_end] - 1 - start] = 2
            stream.write(part.tobytes())
