"""Writes a dataset: PREFIX.bin, PREFIX.idx, PREFIX.json, as `store` describes them.

Until the dataset is whole it lies in a folder beside: the columns in files that grow (see
`spooled_columns`), at last the files that are moved to their places, the manifest the last.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megatron_multiturn._version import __version__
from megatron_multiturn.batch_checks import check_batch, count_targets, session_lengths
from megatron_multiturn.encoded_sessions import EncodedBatch
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.index_file import smallest_token_dtype, write_index_blocks
from megatron_multiturn.manifest import (
    FORMAT_VERSION,
    Counts,
    InputFile,
    Manifest,
    TemplateIdentity,
    file_hash,
    manifest_path,
)
from megatron_multiturn.spooled_columns import SpooledColumns
from megatron_multiturn.turn_weights import UNWEIGHTED, TurnWeights
from megatron_multiturn.vocabulary import TokenizerIdentity

# What lies in the folder -> what it is called at last, in the order in which they appear.
_PLACES = {
    "tokens": ".bin",
    "index": ".idx",
    "rejected": ".rejected.jsonl",
    "shard": ".shard.json",
    "manifest": ".json",
}


def output_paths(prefix: str) -> tuple[str, str, str]:
    """(.bin, .idx, .json), in the order in which they come into being."""
    return prefix + ".bin", prefix + ".idx", manifest_path(prefix)


def all_output_paths(prefix: str) -> list[str]:
    """Every file that a run may leave under a prefix."""
    return [prefix + suffix for suffix in _PLACES.values()]


def place_files(folder: str, prefix: str) -> None:
    """Move what lies in a folder to its places; again, if that broke off."""
    if os.path.exists(os.path.join(folder, "tokens")):
        # What was there before must not vouch for new data while the files change places.
        for suffix in (".json", ".shard.json", ".rejected.jsonl"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(prefix + suffix)
    for name, suffix in _PLACES.items():
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(folder, name), prefix + suffix)
    sync_folder(Path(prefix).parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterState:
    """How far a writer has come, so that another can go on."""

    column_bytes: dict[str, int]
    turns: int
    target_tokens: int
    turn_weights: Sequence[float]


class SessionWriter:
    """Writes a dataset; it appears when the `with` block ends well, and not otherwise.

        with SessionWriter(prefix, tokenizer=identity, template=template) as writer:
            writer.add(encoder.encode(sessions))

    Without a folder of the caller's it makes one and takes it away again.
    """

    def __init__(
        self,
        prefix: str,
        *,
        tokenizer: TokenizerIdentity,
        template: TemplateIdentity,
        folder: str | None = None,
        state: WriterState | None = None,
    ) -> None:
        """state: of a writer before, whose columns lie in the folder."""
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._template = template
        self._turn_weights = TurnWeights(state.turn_weights if state else UNWEIGHTED)
        self._dtype = smallest_token_dtype(tokenizer.vocab_size)
        self._owns_folder = folder is None
        self._folder = folder or f"{prefix}.{os.getpid()}.tmp"
        self._start = state
        self._num_turns = state.turns if state else 0
        self._num_target_tokens = state.target_tokens if state else 0
        sizes = state.column_bytes if state else {}
        self._num_tokens = sizes.get("tokens", 0) // self._dtype.itemsize
        self._num_segments = sizes.get("modes", 0)
        self._num_sessions = sizes.get("session_ends", 0) // 8
        self._rejected: dict[str, int] = {}
        self._inputs: tuple[InputFile, ...] = ()

    def __enter__(self) -> Self:
        try:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            sizes = self._start.column_bytes if self._start else None
            self._columns = SpooledColumns(self._folder, sizes)
        except OSError as error:
            raise DatasetError(
                f"{self._folder}: cannot be written ({error.strerror}); choose another "
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
            if kind is None and self._owns_folder:
                self.finish()
                place_files(self._folder, self._prefix)
        finally:
            self._columns.close()
            if self._owns_folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, batch: EncodedBatch, locations: Sequence[str] | None = None) -> None:
        """Append the sessions of a batch.

        locations: where each came from, for errors. Raises DatasetError for the first session that
        is malformed or has an id beyond the vocabulary; nothing of the batch is written then.
        """
        check_batch(
            batch,
            locations,
            first_session=self._num_sessions,
            vocab_size=self._tokenizer.vocab_size,
            num_turn_weights=len(batch.turn_weights),
        )
        if not batch.num_sessions:
            return
        self._columns.append("tokens", batch.tokens.astype(self._dtype))
        self._columns.append("segment_lengths", batch.segment_lengths.astype(np.int32))
        modes = self._turn_weights.renumber(batch.modes, batch.turn_weights)
        self._columns.append("modes", modes)
        self._columns.append("session_ends", batch.first_segments[1:] + self._num_segments)
        self._columns.append("session_lengths", session_lengths(batch).astype(np.int32))
        num_turns, num_target_tokens = count_targets(batch)
        self._num_turns += num_turns
        self._num_target_tokens += num_target_tokens
        self._num_tokens += len(batch.tokens)
        self._num_segments += len(batch.modes)
        self._num_sessions += batch.num_sessions

    def add_rejected(self, lines: bytes) -> None:
        """Append to the file of rejected sessions."""
        self._columns.append("rejected", lines)

    def describe(self, *, rejected: Mapping[str, int], inputs: Sequence[InputFile]) -> None:
        """What the manifest shall say about where the sessions came from."""
        self._rejected = dict(sorted(rejected.items()))
        self._inputs = tuple(inputs)

    @property
    def counts(self) -> Counts:
        """What has been added so far."""
        return Counts(
            sessions=self._num_sessions,
            segments=self._num_segments,
            turns=self._num_turns,
            tokens=self._num_tokens,
            target_tokens=self._num_target_tokens,
            rejected=self._rejected,
        )

    @property
    def columns(self) -> SpooledColumns:
        return self._columns

    def state(self) -> WriterState:
        return WriterState(
            column_bytes=self._columns.sizes(),
            turns=self._num_turns,
            target_tokens=self._num_target_tokens,
            turn_weights=self._turn_weights.values,
        )

    def finish_index(self) -> tuple[int, str]:
        """Write the index into the folder; (its bytes, its SHA-256). All columns are on the disk.

        What the dataset does not need of the columns is removed.
        """
        self._columns.sizes()
        self._columns.sync()
        path = os.path.join(self._folder, "index")
        columns = self._columns
        with open(path, "wb") as stream:
            write_index_blocks(
                stream,
                token_dtype=self._dtype,
                num_segments=self._num_segments,
                num_sessions=self._num_sessions,
                segment_lengths=lambda: columns.blocks("segment_lengths", np.int32),
                session_ends=lambda: columns.blocks("session_ends", np.int64),
                modes=lambda: columns.blocks("modes", np.int8),
            )
            _sync(stream)
        return os.path.getsize(path), file_hash(path)

    def finish(self) -> None:
        """Make the dataset whole in the folder: all that is left is to move the files."""
        if not self._num_sessions:
            raise DatasetError(f"{self._prefix}: there is no session to write")
        idx_bytes, idx_sha256 = self.finish_index()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool_version=__version__,
            tokenizer=self._tokenizer,
            template=self._template,
            turn_weights=self._turn_weights.values,
            counts=self.counts,
            inputs=self._inputs,
            bin_bytes=os.path.getsize(self._columns.path("tokens")),
            idx_bytes=idx_bytes,
            idx_sha256=idx_sha256,
        )
        self.write_last("manifest", manifest.to_json())

    def write_last(self, name: str, text: str) -> None:
        """Write the file that says that all is whole; an empty file of rejects is none."""
        if not os.path.getsize(self._columns.path("rejected")):
            os.unlink(self._columns.path("rejected"))
        with open(os.path.join(self._folder, name), "wb") as stream:
            stream.write(text.encode("utf-8"))
            _sync(stream)
        sync_folder(Path(self._folder))


def state_from_json(value: Mapping[str, object]) -> WriterState:
    """The state that `dataclasses.asdict` made a mapping of."""
    names = {field.name for field in dataclasses.fields(WriterState)}
    return WriterState(**{name: value[name] for name in names})  # type: ignore[arg-type]


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the new names last; a file's own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
