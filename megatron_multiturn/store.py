"""The disk format, known here and in `session_writer` only: PREFIX.bin, PREFIX.idx, PREFIX.json.

.bin and .idx are byte for byte what Megatron's IndexedDatasetBuilder writes with modes: document =
session, sequence = segment, mode = `modes.py`. They are written and read here without it, because
it keeps every segment as Python objects, wraps token ids that do not fit, and checks by `assert`.

    .bin   the tokens of all segments, one after the other, uint16 or int32
    .idx   see `index_file.py`
    .json  see `manifest.py`
"""

import os
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.encoded_sessions import EncodedSession
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.index_file import read_index
from megatron_multiturn.manifest import Manifest, read_manifest
from megatron_multiturn.object_storage import fetch_index, is_in_object_storage
from megatron_multiturn.row_pieces import RowPieces, indices_of_runs, token_runs
from megatron_multiturn.token_reader import FileTokens, MappedTokens, RemoteTokens, TokenReader

__all__ = ["Manifest", "SessionStore"]


class SessionStore:
    """A preprocessed dataset, memory-mapped. Picklable, and good after a fork."""

    def __init__(self, prefix: str, local_prefix: str, manifest: Manifest, *, mmap: bool) -> None:
        self._prefix = prefix
        self._local_prefix = local_prefix
        self._mmap = mmap
        self.manifest = manifest
        self._read_index()

    @classmethod
    def open(cls, prefix: str, *, mmap: bool = True, index_cache: str | None = None) -> Self:
        """Raises DatasetError unless the manifest is there and fits the two other files.

        mmap: map the tokens into memory; else each session is read from the file.
        index_cache: for a prefix in object storage (s3:// or msc://), the folder that its index
        is copied to; its tokens are read through Megatron's reader, which cannot check the .bin
        before it reads.
        """
        if is_in_object_storage(prefix):
            local_prefix = fetch_index(prefix, index_cache)
            return cls(prefix, local_prefix, read_manifest(local_prefix), mmap=False)
        manifest = read_manifest(prefix)
        for path, num_bytes in (
            (prefix + ".bin", manifest.bin_bytes),
            (prefix + ".idx", manifest.idx_bytes),
        ):
            try:
                found = os.stat(path).st_size
            except OSError as error:
                raise DatasetError(
                    f"{path}: cannot be read ({error.strerror}), but its manifest is there; copy "
                    "all of .bin, .idx and .json, or preprocess again"
                ) from None
            if found != num_bytes:
                raise DatasetError(
                    f"{path}: {found:,} bytes, but the manifest says {num_bytes:,}: the file is "
                    "cut off or of another run; copy it again or preprocess again"
                )
        return cls(prefix, prefix, manifest, mmap=mmap)

    @property
    def prefix(self) -> str:
        return self._prefix

    @property
    def local_prefix(self) -> str:
        """Where the index lies on this node: `prefix`, unless that is in object storage."""
        return self._local_prefix

    @property
    def num_sessions(self) -> int:
        return len(self._index.first_segments) - 1

    def session_lengths(self) -> NDArray[np.int64]:
        """Tokens of each session, from the .idx alone; int64 (num_sessions,)."""
        total = self.manifest.bin_bytes // self._index.token_dtype.itemsize
        starts = (
            self._index.byte_offsets[self._index.first_segments[:-1]]
            // self._index.token_dtype.itemsize
        )
        return np.diff(starts, append=total)

    def segment_index(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int8]]:
        """What the .idx says, memory-mapped.

        Returns the first segment of each session, int64 (num_sessions + 1,); the lengths of all
        segments, int32 (num_segments,); their modes, int8 (num_segments,).
        """
        return self._index.first_segments, self._index.segment_lengths, self._index.modes

    def session(self, index: int) -> EncodedSession:
        """Session `index`, from 0; raises IndexError beyond the last."""
        if not 0 <= index < self.num_sessions:
            raise IndexError(f"session {index} of {self.num_sessions:,} in {self._prefix}")
        segments = slice(
            int(self._index.first_segments[index]), int(self._index.first_segments[index + 1])
        )
        lengths = np.array(self._index.segment_lengths[segments])
        first_token = self._first_tokens(np.array([segments.start]))
        return EncodedSession(
            tokens=self._tokens.read(first_token, np.array([lengths.sum()])).astype(np.int32),
            segment_lengths=lengths,
            modes=np.array(self._index.modes[segments]),
            location=f"{self._prefix}[{index}]",
        )

    def read_pieces(
        self, sessions: NDArray[np.integer[Any]], spans: NDArray[np.int32]
    ) -> RowPieces:
        """The pieces of a row.

        sessions: (num_pieces,), numbered from 0 and not checked; spans: (num_pieces, 4).
        """
        first_segments = self._index.first_segments[sessions]
        num_segments = self._index.first_segments[sessions + 1] - first_segments
        segments = indices_of_runs(first_segments, num_segments)
        return RowPieces(
            tokens=self._tokens.read(*token_runs(self._first_tokens(first_segments), spans)),
            num_segments=num_segments,
            segment_lengths=self._index.segment_lengths[segments],
            modes=self._index.modes[segments],
        )

    def _first_tokens(self, segments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where some segments begin in the .bin, in tokens; (len(segments),)."""
        offsets = self._index.byte_offsets[segments]
        first_tokens: NDArray[np.int64] = offsets // self._index.token_dtype.itemsize
        return first_tokens

    def __getstate__(self) -> tuple[str, str, Manifest, bool]:
        return self._prefix, self._local_prefix, self.manifest, self._mmap

    def __setstate__(self, state: tuple[str, str, Manifest, bool]) -> None:
        self._prefix, self._local_prefix, self.manifest, self._mmap = state
        self._read_index()

    def _read_index(self) -> None:
        index = read_index(self._local_prefix + ".idx")
        counts = self.manifest.counts
        found = (len(index.first_segments) - 1, len(index.modes))
        if found != (counts.sessions, counts.segments):
            raise DatasetError(
                f"{self._prefix}.idx: {found[0]:,} sessions and {found[1]:,} segments, but the "
                f"manifest says {counts.sessions:,} and {counts.segments:,}; preprocess again"
            )
        self._index = index
        path = self._prefix + ".bin"
        self._tokens: TokenReader
        if self._local_prefix != self._prefix:
            self._tokens = RemoteTokens(path, index.token_dtype)
        elif self._mmap:
            self._tokens = MappedTokens(path, index.token_dtype)
        else:
            self._tokens = FileTokens(path, index.token_dtype)


def manifest_of(prefix: str, index_cache: str | None) -> Manifest:
    """The manifest of a dataset, wherever it lies; see `SessionStore.open`."""
    if is_in_object_storage(prefix):
        return read_manifest(fetch_index(prefix, index_cache))
    return read_manifest(prefix)
