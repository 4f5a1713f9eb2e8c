"""The .idx file of Megatron's IndexedDataset with modes, read and written as whole arrays.

    magic "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code of the tokens,
    uint64 num_segments, uint64 num_sessions + 1,
    int32 (num_segments,)      lengths
    int64 (num_segments,)      byte offsets in the .bin
    int64 (num_sessions + 1,)  first segment of each session
    int8  (num_segments,)      modes

Everything is little-endian, as on every machine that Megatron runs on.
"""

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

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
    broken = DatasetError(
        f"{path}: not an index of Megatron's with modes, or cut off; preprocess again"
    )
    data = np.memmap(path, dtype=np.uint8, mode="r")
    if len(data) < _HEADER.size:
        raise broken
    magic, version, code, num_segments, num_starts = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if (magic, version) != (_MAGIC, _VERSION) or code not in _DTYPE_OF_CODE:
        raise broken
    if len(data) != _HEADER.size + num_segments * (4 + 8 + 1) + num_starts * 8:
        raise broken
    at = _HEADER.size

    def take(dtype: DTypeLike, count: int) -> NDArray[Any]:
        nonlocal at
        start, at = at, at + count * np.dtype(dtype).itemsize
        return np.ndarray(count, dtype, buffer=data, offset=start)

    return Index(
        token_dtype=_DTYPE_OF_CODE[code],
        segment_lengths=take(np.int32, num_segments),
        byte_offsets=take(np.int64, num_segments),
        first_segments=take(np.int64, num_starts),
        modes=take(np.int8, num_segments),
    )


def write_index(
    stream: BinaryIO,
    *,
    token_dtype: np.dtype[Any],
    segment_lengths: NDArray[np.int32],
    first_segments: NDArray[np.int64],
    modes: NDArray[np.int8],
) -> None:
    """Write an .idx; the byte offsets follow from the lengths."""
    num_segments = len(segment_lengths)
    code = _CODE_OF_DTYPE[token_dtype]
    stream.write(_HEADER.pack(_MAGIC, _VERSION, code, num_segments, len(first_segments)))
    stream.write(segment_lengths.astype(np.int32, copy=False).tobytes())
    offset = 0
    for start in range(0, num_segments, _CHUNK):
        num_bytes = segment_lengths[start : start + _CHUNK].astype(np.int64) * token_dtype.itemsize
        ends = np.cumsum(num_bytes) + offset
        stream.write((ends - num_bytes).tobytes())
        offset = int(ends[-1])
    stream.write(first_segments.astype(np.int64, copy=False).tobytes())
    stream.write(modes.astype(np.int8, copy=False).tobytes())
