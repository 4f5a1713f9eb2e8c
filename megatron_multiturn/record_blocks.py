"""What of the input is read: parts of files, places in them, and blocks of raw records."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.parquet_records import unpack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRecord:
    """One object of an input file, not yet parsed."""

    data: bytes  # JSON text, UTF-8 if the file is sound
    # "file.jsonl:17"; for a JSON list "file.json:17 (item 4)", for Parquet
    # "file.parquet:17 (row group 2)", where 17 is the row in the file; for a part of a JSONL file
    # "file.jsonl:17 (from byte 4096)".
    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """A part of an input file: of plain JSONL, the lines that begin in it; of Parquet, row groups.

    Files of other kinds are not cut.
    """

    path: str
    begin: int = 0  # in bytes; of Parquet in row groups
    end: int | None = None  # None: to the end of the file
    raw_begin: int = 0  # where it begins in the file, in bytes; about
    raw_end: int  # and where it ends

    @property
    def is_whole(self) -> bool:
        return self.begin == 0 and self.end is None

    @classmethod
    def whole(cls, path: str) -> "FilePart":
        """All of a file; ConfigError if there is none."""
        try:
            return cls(path=path, raw_end=os.path.getsize(path))
        except OSError:
            raise ConfigError(f"{path}: no such file; check --input") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlace:
    """A place between two records of a file, or of a part of it."""

    offset: int  # of JSONL in bytes, decompressed; else in records
    line: int = 1  # of JSONL: the line there, counted from the first of the part


@dataclass(frozen=True, slots=True, kw_only=True)
class LineBlock:
    """Whole lines of JSONL."""

    path: str
    data: bytes
    first_line: int
    from_byte: int  # where in the file the lines are counted from
    end: FilePlace  # behind the block
    raw_position: int  # bytes of the file that are read up to here; about

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def records(self) -> Iterator[RawRecord]:
        """The lines; blank ones are no records."""
        behind = f" (from byte {self.from_byte})" if self.from_byte else ""
        for number, line in enumerate(self.data.split(b"\n"), start=self.first_line):
            data = line.strip()
            if data:
                yield RawRecord(data=data, location=f"{self.path}:{number}{behind}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordBlock:
    """Items of a JSON list."""

    path: str
    held: tuple[RawRecord, ...]
    num_bytes: int
    end: FilePlace
    raw_position: int

    def records(self) -> Iterator[RawRecord]:
        return iter(self.held)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Rows of one row group of a Parquet file; they become JSON where they are used."""

    path: str
    data: bytes  # packed, see `parquet_records`
    first_row: int  # counted from 0 over the whole file
    group: int  # counted from 1
    end: FilePlace
    raw_position: int

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def records(self) -> Iterator[RawRecord]:
        rows = unpack_rows(self.data, self.path, self.first_row)
        for row, data in enumerate(rows, start=self.first_row + 1):
            yield RawRecord(data=data, location=f"{self.path}:{row} (row group {self.group})")


Block = LineBlock | RecordBlock | RowBlock
