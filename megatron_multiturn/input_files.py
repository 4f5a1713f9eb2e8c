"""What --input names -> files, and files -> decoded bytes.

A name is a file, a glob pattern, or a folder, which is searched through. Files of gzip and
zstd are known by their first bytes, whatever they are called.
"""

import glob
import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_multiturn.errors import ConfigError

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
_COMPRESSED_SUFFIXES = ("", ".gz", ".zst")
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PARQUET_MAGIC = b"PAR1"
_BUFFER_BYTES = 1 << 18
_COMPRESSED_READ_BYTES = 1 << 12  # zstd may unfold a few bytes to megabytes
_ZSTD_MAX_WINDOW = 1 << 31  # of zstd --ultra --long=31


def expand_inputs(names: Sequence[str]) -> list[str]:
    """The files that the names stand for, in the order of the names.

    Those of a pattern or a folder are sorted by their path. A folder gives its files and those of
    its folders that end in .json, .jsonl, .ndjson or .parquet, also with .gz or .zst behind;
    hidden files and folders are left out. Raises ConfigError for a name that stands for nothing
    and for a file that is named twice, which would train its sessions twice.
    """
    paths: list[str] = []
    for name in names:
        if os.path.isdir(name):
            paths += _files_in(name)
        elif os.path.lexists(name) or not glob.has_magic(name):
            paths.append(name)
        else:
            paths += _files_matching(name)
    _refuse_twice(paths)
    return paths


def open_decoded(path: str) -> io.BufferedReader:
    """The bytes of a file, decompressed; ConfigError if it cannot be read.

    A file that breaks off or is broken raises ConfigError while it is read.
    """
    stream = _open(path)
    start = stream.peek(4)[:4]
    raw: Any
    if start.startswith(_GZIP_MAGIC):
        import gzip

        raw = _Checked(gzip.GzipFile(fileobj=stream), path, "gzip")
    elif start == _ZSTD_MAGIC:
        raw = _Checked(_ZstdReader(stream, path), path, "zstd")
    else:
        return stream
    decoded = _DecodedReader(raw, stream)
    if decoded.peek(4)[:4] == _PARQUET_MAGIC:
        decoded.close()
        raise ConfigError(
            f"{path}: is a Parquet file in a compressed one, which cannot be read in order; "
            "unpack it (Parquet is compressed inside)"
        )
    return decoded


def raw_position(stream: io.BufferedReader) -> int:
    """How many bytes of its file a stream of `open_decoded` has read; about, for packed files."""
    return (stream.source if isinstance(stream, _DecodedReader) else stream).tell()


def is_parquet(path: str) -> bool:
    return _first_bytes(path) == _PARQUET_MAGIC


def is_plain(path: str) -> bool:
    """Whether a file holds its records as they are: neither packed nor Parquet."""
    start = _first_bytes(path)
    return start not in (_ZSTD_MAGIC, _PARQUET_MAGIC) and not start.startswith(_GZIP_MAGIC)


def _first_bytes(path: str) -> bytes:
    with _open(path) as stream:
        return stream.peek(4)[:4]


class _DecodedReader(io.BufferedReader):
    """Decompressed bytes, and the stream that they come from."""

    def __init__(self, raw: Any, source: io.BufferedReader) -> None:
        super().__init__(raw, _BUFFER_BYTES)
        self.source = source


def _files_in(folder: str) -> list[str]:
    endings = tuple(one + more for one in _SUFFIXES for more in _COMPRESSED_SUFFIXES)
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(endings)
        ]
    if not found:
        raise ConfigError(
            f"{folder}: no file in this folder ends in {', '.join(_SUFFIXES)} (or that and .gz or "
            f".zst); name the files, for example {os.path.join(folder, '*.txt')}"
        )
    return sorted(found)


def _raise_unreadable(error: OSError) -> None:
    raise ConfigError(
        f"{error.filename}: cannot be searched ({error.strerror}); check --input"
    ) from None


def _files_matching(pattern: str) -> list[str]:
    found = [path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)]
    if not found:
        raise ConfigError(f"{pattern}: no file matches; check --input")
    return sorted(found)


def _refuse_twice(paths: list[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise ConfigError(
                f"{path}: is named twice in --input (also as {seen[real]}); name it once. To train "
                "it more often, preprocess it alone and weigh it in --data-path"
            )
        seen[real] = path


def _open(path: str) -> io.BufferedReader:
    if Path(path).is_dir():
        raise ConfigError(f"{path}: is a folder, where a file is wanted; check --input")
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(
            f"{path}: is a pipe or a device, which can be read only once; write it to a file first"
        )
    try:
        return io.BufferedReader(io.FileIO(path), _BUFFER_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check --input") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check --input") from None


class _Checked(io.RawIOBase):
    """A decompressing stream whose errors name the file."""

    def __init__(self, stream: Any, path: str, kind: str) -> None:
        self._stream = stream
        self._path = path
        self._kind = kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Filled as far as there are bytes, so that a peek sees the start of the file.
        pieces = []
        missing = len(buffer)
        try:
            while missing and (data := self._stream.read(missing)):
                pieces.append(data)
                missing -= len(data)
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise ConfigError(
                f"{self._path}: the {self._kind} file breaks off or is broken ({error}); fetch or "
                "write it again"
            ) from None
        data = b"".join(pieces)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _ZstdReader:
    """Frames of zstd, one behind the other; the end of the file must be the end of a frame."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        try:
            import zstandard
        except ModuleNotFoundError:
            raise ConfigError(
                f"{path}: is a zstd file, which needs the package zstandard: `pip install "
                "zstandard`, or unpack the file with `zstd -d`"
            ) from None
        self._stream = stream
        self._module = zstandard
        self._frame: Any = None  # None between two frames
        self._held = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none only at the end."""
        while not self._held:
            data = self._stream.read(_COMPRESSED_READ_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return b""
            self._held = memoryview(self._decompress(data))
        piece, self._held = bytes(self._held[:size]), self._held[size:]
        return piece

    def close(self) -> None:
        self._stream.close()

    def _decompress(self, data: bytes) -> bytes:
        pieces = []
        while data:
            if self._frame is None:
                decompressor = self._module.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
                self._frame = decompressor.decompressobj()
            try:
                pieces.append(self._frame.decompress(data))
            except self._module.ZstdError as error:
                raise ValueError(str(error)) from None
            data = b""
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, None
        return b"".join(pieces)
