"""Columns of a dataset in the making, each in a file of its own that only grows.

What is not to be held in memory is appended here. A run that goes on after it was killed cuts the
files back to the sizes that are known to be sound.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_multiturn.errors import DatasetError

COLUMNS = (
    "tokens",
    "segment_lengths",
    "modes",
    "session_ends",  # segments of the dataset up to the end of each session
    "session_lengths",  # tokens of each session
    "rejected",  # lines of text
)
_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 22


class SpooledColumns:
    """The files of a folder that hold the columns."""

    def __init__(self, folder: str, sizes: Mapping[str, int] | None = None) -> None:
        """sizes: in bytes, to go on from; without them the files begin anew.

        Raises DatasetError if a file is shorter than it should be.
        """
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._sizes = dict.fromkeys(COLUMNS, 0) | dict(sizes or {})
        try:
            for name in COLUMNS:
                self._files[name] = self._open(name)
        except BaseException:
            self.close()
            raise

    def append(self, name: str, data: NDArray[Any] | bytes) -> None:
        if len(data):
            view = memoryview(data).cast("B")
            self._files[name].write(view)
            self._sizes[name] += len(view)

    def sizes(self) -> dict[str, int]:
        """Bytes of each column; they are in the files, though perhaps not on the disk yet."""
        for file in self._files.values():
            file.flush()
        return dict(self._sizes)

    def sync(self) -> None:
        """Wait until what `sizes` has told of is on the disk; may be called in a thread."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def blocks(self, name: str, dtype: DTypeLike) -> Iterator[NDArray[Any]]:
        """The column in arrays of a few megabytes."""
        self._files[name].flush()
        return column_blocks(self._folder, name, dtype)

    def path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk has said so before
                file.close()

    def _open(self, name: str) -> BinaryIO:
        path, size = self.path(name), self._sizes[name]
        stream = open(path, "r+b" if size else "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115
        if size:
            found = os.fstat(stream.fileno()).st_size
            if found < size:
                stream.close()
                raise DatasetError(
                    f"{path}: {found:,} bytes, but {size:,} were written before the run broke "
                    f"off; remove {self._folder} and begin again"
                )
            stream.truncate(size)
            stream.seek(size)
        return stream


def column_blocks(folder: str, name: str, dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """A column of a folder in arrays of a few megabytes."""
    num_items = _BLOCK_BYTES // np.dtype(dtype).itemsize
    with Path(os.path.join(folder, name)).open("rb") as stream:
        while len(block := np.fromfile(stream, dtype, num_items)):
            yield block
