"""The .idx file of Megatron's IndexedDataset with modes, read and written as whole arrays.

    magic "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code of the tokens,
    uint64 num_segments, uint64 num_sessions + 1,
    int32 (num_segments,)      lengths
    int64 (num_segments,)      byte offsets in the .bin
    int64 (num_sessions + 1,)  first segment of each session
    int8  (num_segments,)      modes

Everything is little-endian, as on every machine that Megatron runs on.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import DatasetError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODE_OF_DTYPE: dict[np.dtype[Any], int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_DTYPE_OF_CODE = {code: dtype for dtype, code in _CODE_OF_DTYPE.items()}
# Megatron's own limit (DType.optimal_dtype), a little below what uint16 holds.
_UINT16_VOCAB_SIZE = 65500
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The content of an .idx; the arrays may be memory-mapped."""

    token_dtype: np.dtype[Any]
    segment_lengths: NDArray[np.int32]  # (num_segments,)
    byte_offsets: NDArray[np.int64]  # (num_segments,) in the .bin
    first_segments: NDArray[np.int64]  # (num_sessions + 1,)
    modes: NDArray[np.int8]  # (num_segments,)


def smallest_token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron would choose for the token ids."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCAB_SIZE else np.int32)


def read_index(path: str) -> Index:
    """Memory-map an .idx; raises DatasetError if it is not one, or not one with modes."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    token_dtype, columns = _read_header(path, data[: _HEADER.size].tobytes(), len(data))
    return Index(
        token_dtype=token_dtype,
        **{
            name: np.ndarray(count, dtype, buffer=data, offset=offset)
            for name, (dtype, count, offset) in columns.items()
        },
    )


def index_blocks(path: str, name: str) -> Iterator[NDArray[Any]]:
    """A column of an .idx, named as in `Index`, in blocks that are read, not mapped.

    Raises DatasetError if the file is not an index with modes.
    """
    with open(path, "rb") as stream:
        _, columns = _read_header(path, stream.read(_HEADER.size), os.path.getsize(path))
        dtype, count, offset = columns[name]
        stream.seek(offset)
        while count:
            block = np.fromfile(stream, dtype, min(count, _CHUNK))
            count -= len(block)
            yield block


def _read_header(
    path: str, header: bytes, num_bytes: int
) -> tuple[np.dtype[Any], dict[str, tuple[np.dtype[Any], int, int]]]:
    """The dtype of the tokens, and of each column (dtype, count, offset in the file)."""
    broken = DatasetError(
        f"{path}: not an index of Megatron's with modes, or cut off; preprocess again"
    )
    if len(header) < _HEADER.size:
        raise broken
    magic, version, code, num_segments, num_starts = _HEADER.unpack(header)
    if (magic, version) != (_MAGIC, _VERSION) or code not in _DTYPE_OF_CODE:
        raise broken
    columns = {}
    offset = _HEADER.size
    for name, kind, count in (
        ("segment_lengths", np.int32, num_segments),
        ("byte_offsets", np.int64, num_segments),
        ("first_segments", np.int64, num_starts),
        ("modes", np.int8, num_segments),
    ):
        dtype: np.dtype[Any] = np.dtype(kind)
        columns[name] = (dtype, count, offset)
        offset += count * dtype.itemsize
    if num_bytes != offset:
        raise broken
    return _DTYPE_OF_CODE[code], columns


def write_index(
    stream: BinaryIO,
    *,
    token_dtype: np.dtype[Any],
    segment_lengths: NDArray[np.int32],
    first_segments: NDArray[np.int64],
    modes: NDArray[np.int8],
) -> None:
    """Write an .idx; the byte offsets follow from the lengths."""
    write_index_blocks(
        stream,
        token_dtype=token_dtype,
        num_segments=len(segment_lengths),
        num_sessions=len(first_segments) - 1,
        segment_lengths=lambda: _blocks_of(segment_lengths),
        session_ends=lambda: _blocks_of(first_segments[1:]),
        modes=lambda: _blocks_of(modes),
    )


def write_index_blocks(
    stream: BinaryIO,
    *,
    token_dtype: np.dtype[Any],
    num_segments: int,
    num_sessions: int,
    segment_lengths: Callable[[], Iterable[NDArray[np.int32]]],
    session_ends: Callable[[], Iterable[NDArray[np.int64]]],
    modes: Callable[[], Iterable[NDArray[np.int8]]],
) -> None:
    """Write an .idx from columns that come in blocks, each of them anew at every call.

    session_ends: first_segments without its leading 0.
    """
    code = _CODE_OF_DTYPE[token_dtype]
    stream.write(_HEADER.pack(_MAGIC, _VERSION, code, num_segments, num_sessions + 1))
    for lengths in segment_lengths():
        stream.write(lengths.astype(np.int32, copy=False).tobytes())
    offset = 0
    for lengths in segment_lengths():
        num_bytes = lengths.astype(np.int64) * token_dtype.itemsize
        ends = np.cumsum(num_bytes) + offset
        stream.write((ends - num_bytes).tobytes())
        offset = int(ends[-1])
    stream.write(np.zeros(1, dtype=np.int64).tobytes())
    for ends in session_ends():
        stream.write(ends.astype(np.int64, copy=False).tobytes())
    for block in modes():
        stream.write(block.astype(np.int8, copy=False).tobytes())


def _blocks_of(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), _CHUNK):
        yield array[start : start + _CHUNK]
