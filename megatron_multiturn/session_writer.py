"""Writes a dataset: PREFIX.bin, PREFIX.idx, PREFIX.json, as `store` describes them."""

import contextlib
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megatron_multiturn import modes as mode_bits
from megatron_multiturn._version import __version__
from megatron_multiturn.encoding import EncodedSession
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
            writer.add(encoded_session)

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

    def add(self, session: EncodedSession) -> None:
        """Append a session; DatasetError if it is malformed or has an id beyond the vocabulary."""
        tokens = session.tokens
        where = session.location or f"session {len(self._first_segments) - 1}"
        self._check(session, where)
        self._bin.write(tokens.astype(self._dtype).tobytes())
        self._lengths.frombytes(session.segment_lengths.astype(np.int32).tobytes())
        self._modes.frombytes(session.modes.astype(np.int8).tobytes())
        self._first_segments.append(len(self._lengths))
        num_turns, num_target_tokens = count_targets(session)
        self._num_turns += num_turns
        self._num_target_tokens += num_target_tokens
        self._num_tokens += len(tokens)

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

    def _check(self, session: EncodedSession, where: str) -> None:
        tokens, lengths, modes = session.tokens, session.segment_lengths, session.modes
        if not len(tokens) or len(lengths) != len(modes) or lengths.min() < 1:
            raise DatasetError(f"{where}: a session needs tokens, and every segment at least one")
        if int(lengths.sum()) != len(tokens):
            raise DatasetError(
                f"{where}: the segments have {int(lengths.sum())} tokens, the session has "
                f"{len(tokens)}"
            )
        lowest, highest = int(tokens.min()), int(tokens.max())
        vocab_size = self._tokenizer.vocab_size
        if lowest < 0 or highest >= vocab_size:
            raise DatasetError(
                f"{where}: token id {lowest if lowest < 0 else highest} is not in the vocabulary "
                f"of {vocab_size:,} tokens; the tokenizer's files do not fit together"
            )
        weights = (modes[mode_bits.is_target(modes)] >> mode_bits.WEIGHT_SHIFT).max(initial=0)
        if weights >= len(self._turn_weights):
            raise DatasetError(
                f"{where}: turn weight number {weights} of {len(self._turn_weights)} weights"
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


def count_targets(session: EncodedSession) -> tuple[int, int]:
    """(turns, target tokens) of a session.

    Its first token is predicted by nothing, so it is no target, and a turn of that token alone is
    none: tokens [a b], one target segment, has 1 turn and 1 target token.
    """
    targets = mode_bits.is_target(session.modes)
    target_lengths = session.segment_lengths[targets]
    turn_ids = np.cumsum(mode_bits.begins_turn(session.modes[targets]))
    if targets[0]:
        target_lengths = target_lengths.copy()
        target_lengths[0] -= 1
    return len(np.unique(turn_ids[target_lengths > 0])), int(target_lengths.sum())


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
