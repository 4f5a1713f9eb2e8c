"""Reads tokens from a .bin: memory-mapped, from the file, or from object storage.

Megatron is imported for object storage alone: the commands that show a dataset start quickly.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.row_pieces import indices_of_runs

# Runs of at least so many tokens are copied one by one, shorter ones in one gather: a copy costs
# a fixed time, a gather the same for every token.
_GATHER_BELOW = 256


class TokenReader(Protocol):
    """Where tokens come from."""

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """The tokens of some runs, one after the other; (lengths.sum(),)."""
        ...


class MappedTokens:
    """A .bin in memory, shared by all processes of the node that map it."""

    def __init__(self, path: str, dtype: np.dtype[Any]) -> None:
        # As a plain array, whose slices are made faster than those of a map.
        self._tokens: NDArray[Any] = np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        if len(starts) * _GATHER_BELOW > lengths.sum():
            return self._tokens[indices_of_runs(starts, lengths)]
        runs = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        return np.concatenate([self._tokens[start:stop] for start, stop in runs])


class FileTokens:
    """A .bin of which each run is read when it is asked for (`--no-mmap-bin-files`)."""

    def __init__(self, path: str, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        parts = []
        with Path(self._path).open("rb", buffering=0) as file:
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                file.seek(start * self._dtype.itemsize)
                parts.append(np.fromfile(file, self._dtype, length))
        return np.concatenate(parts) if parts else np.zeros(0, self._dtype)


class RemoteTokens:
    """A .bin in object storage, through Megatron's reader; one request a run."""

    def __init__(self, path: str, dtype: np.dtype[Any]) -> None:
        from megatron_multiturn.megatron_compat import object_storage_reader

        self._reader, self._dtype = object_storage_reader(path), dtype

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        parts = [
            self._reader.read(self._dtype.type, length, start * self._dtype.itemsize)
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, self._dtype)
