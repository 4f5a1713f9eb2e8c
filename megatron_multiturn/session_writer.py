"""Writes a dataset: PREFIX.bin, PREFIX.idx, PREFIX.json, as `store` describes them."""

import contextlib
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn import modes as mode_bits
from megatron_multiturn._version import __version__
from megatron_multiturn.encoding import EncodedBatch
from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.index_file import smallest_token_dtype, write_index
from megatron_multiturn.manifest import (
    FORMAT_VERSION,
    Counts,
    InputFile,
    Manifest,
    TemplateIdentity,
    file_hash,
    manifest_path,
)
from megatron_multiturn.vocabulary import TokenizerIdentity


def output_paths(prefix: str) -> tuple[str, str, str]:
    """(.bin, .idx, .json), in the order in which they come into being."""
    return prefix + ".bin", prefix + ".idx", manifest_path(prefix)


class SessionWriter:
    """Writes a dataset; it appears when the `with` block ends well, and not otherwise.

        with SessionWriter(prefix, tokenizer=identity, template=template) as writer:
            writer.add(encoder.encode(sessions))

    The three files lie under temporary names until then. A process killed in between leaves
    those behind, never a manifest.
    """

    def __init__(
        self,
        prefix: str,
        *,
        tokenizer: TokenizerIdentity,
        template: TemplateIdentity,
        turn_weights: Sequence[float] = (1.0,),
    ) -> None:
        if not 1 <= len(turn_weights) <= mode_bits.MAX_TURN_WEIGHTS:
            raise ConfigError(
                f"{len(turn_weights)} turn weights; a dataset has 1 to {mode_bits.MAX_TURN_WEIGHTS}"
            )
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._template = template
        self._turn_weights = tuple(float(weight) for weight in turn_weights)
        self._dtype = smallest_token_dtype(tokenizer.vocab_size)
        self._temporary = [f"{path}.{os.getpid()}.tmp" for path in output_paths(prefix)]
        self._lengths = array("i")
        self._modes = array("b")
        self._first_segments = array("q", [0])
        self._num_tokens = 0
        self._num_target_tokens = 0
        self._num_turns = 0
        self._rejected: dict[str, int] = {}
        self._inputs: tuple[InputFile, ...] = ()

    def __enter__(self) -> Self:
        try:
            Path(self._prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._temporary[0], "wb", buffering=1 << 20)
        except OSError as error:
            raise DatasetError(
                f"{self._temporary[0]}: cannot be written ({error.strerror}); choose another "
                "--output-prefix"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._bin.close()
            for path in self._temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def add(self, batch: EncodedBatch, locations: Sequence[str] | None = None) -> None:
        """Append the sessions of a batch.

        locations: where each came from, for errors. Raises DatasetError for the first session that
        is malformed or has an id beyond the vocabulary; nothing of the batch is written then.
        """
        check_batch(
            batch,
            locations,
            first_session=len(self._first_segments) - 1,
            vocab_size=self._tokenizer.vocab_size,
            num_turn_weights=len(self._turn_weights),
        )
        if not batch.num_sessions:
            return
        self._bin.write(batch.tokens.astype(self._dtype).tobytes())
        first = len(self._lengths)
        self._lengths.frombytes(batch.segment_lengths.astype(np.int32).tobytes())
        self._modes.frombytes(batch.modes.astype(np.int8).tobytes())
        ends = batch.first_segments[1:].astype(np.int64) + first
        self._first_segments.frombytes(ends.tobytes())
        num_turns, num_target_tokens = count_targets(batch)
        self._num_turns += num_turns
        self._num_target_tokens += num_target_tokens
        self._num_tokens += len(batch.tokens)

    def describe(self, *, rejected: Mapping[str, int], inputs: Sequence[InputFile]) -> None:
        """What the manifest shall say about where the sessions came from."""
        self._rejected = dict(sorted(rejected.items()))
        self._inputs = tuple(inputs)

    @property
    def counts(self) -> Counts:
        """What has been added so far."""
        return Counts(
            sessions=len(self._first_segments) - 1,
            segments=len(self._lengths),
            turns=self._num_turns,
            tokens=self._num_tokens,
            target_tokens=self._num_target_tokens,
            rejected=self._rejected,
        )

    def _commit(self) -> None:
        """Make the dataset appear: .bin, .idx, then the manifest."""
        if len(self._first_segments) == 1:
            raise DatasetError(f"{self._prefix}: there is no session to write")
        self._bin.flush()
        os.fsync(self._bin.fileno())
        with open(self._temporary[1], "wb") as stream:
            write_index(
                stream,
                token_dtype=self._dtype,
                segment_lengths=np.frombuffer(self._lengths, dtype=np.int32),
                first_segments=np.frombuffer(self._first_segments, dtype=np.int64),
                modes=np.frombuffer(self._modes, dtype=np.int8),
            )
            _sync(stream)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool_version=__version__,
            tokenizer=self._tokenizer,
            template=self._template,
            turn_weights=self._turn_weights,
            counts=self.counts,
            inputs=self._inputs,
            bin_bytes=os.stat(self._temporary[0]).st_size,
            idx_bytes=os.stat(self._temporary[1]).st_size,
            idx_sha256=file_hash(self._temporary[1]),
        )
        with open(self._temporary[2], "wb") as stream:
            stream.write(manifest.to_json().encode("utf-8"))
            _sync(stream)
        # A manifest of before must not vouch for new data while the files change places.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(manifest_path(self._prefix))
        for temporary, path in zip(self._temporary, output_paths(self._prefix), strict=True):
            os.replace(temporary, path)
        _sync_folder(Path(self._prefix).parent)


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


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the new names last; a file's own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
