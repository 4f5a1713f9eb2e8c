"""Input files -> raw records, a block of them at a time.

A record is still text here; `sessions.py` says what it means. What a file is, is found out by
its first bytes: Parquet, gzip and zstd (see `input_files`) by their marks; of JSON, `[` and an
object or a list behind it open a JSON list of records, anything else is JSONL (a line may be a
list of texts).

Blocks of JSONL are bytes as they lie in the file: who reads does not look at every line. A part
of a plain JSONL file has the lines that begin in it; lines are then counted from the first of
them, because nothing before it is read.
"""

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.input_files import is_parquet, is_plain, open_decoded, raw_position
from megatron_multiturn.json_lists import read_items
from megatron_multiturn.parquet_records import (
    check_can_read,
    num_rows_before,
    pack_batches,
    read_batches,
)
from megatron_multiturn.record_blocks import (
    Block,
    FilePart,
    FilePlace,
    LineBlock,
    RawRecord,
    RecordBlock,
    RowBlock,
)

__all__ = ["RawRecord", "check_input_files", "is_cuttable", "read_blocks", "read_records"]

_BLOCK_BYTES = 1 << 20
_MAX_RECORD_CHARACTERS = 1 << 28  # one line is one session
_WHITESPACE = b" \t\r\n"
_PEEK_BYTES = 1 << 12
_NOT_UTF8_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check_input_files(paths: list[str]) -> None:
    """Raise ConfigError if a path is missing, a folder, unreadable, empty or not UTF-8 by its BOM.

    Cheap, so that a typing error in the last of many files is known before the work begins, and
    the want of a package too.
    """
    for path in paths:
        with open_decoded(path) as stream:
            _check_start(path, stream.peek(4)[:4])
        if is_parquet(path):
            check_can_read(path)


def read_records(path: str) -> Iterator[RawRecord]:
    """Yield the records of one file in order; blank lines of JSONL are no records.

    Raises ConfigError as `read_blocks` does.
    """
    for block in read_blocks(FilePart.whole(path)):
        yield from block.records()


def read_blocks(part: FilePart, place: FilePlace | None = None) -> Iterator[Block]:
    """Yield the records of a part of a file in blocks, from `place` on if one is given.

    Raises ConfigError for a file that cannot be read on from: missing, empty, without a record,
    UTF-16, broken as an archive, or a JSON list that is broken (after the records before the
    break).
    """
    path = part.path
    if is_parquet(path):
        yield from _read_row_blocks(part, place)
        return
    with open_decoded(path) as stream:
        start = _find_start(path, stream)
        if start.opens_list:
            yield from _read_item_blocks(path, stream, start.place.line, place)
            return
        from_byte = 0
        if part.begin:
            from_byte = _next_line_start(stream, part.begin)
            start = _Start(place=FilePlace(offset=from_byte), opens_list=False)
            if part.end is not None and from_byte >= part.end:
                return
        if place is None:
            place = start.place
        if part.begin or is_plain(path):
            stream.seek(place.offset)
        else:
            _discard(stream, place.offset - start.place.offset)
        yield from _read_line_blocks(part, stream, place, from_byte)


def is_cuttable(path: str) -> bool:
    """Whether a file is plain JSONL, of which any part can be read without the rest."""
    if not is_plain(path):
        return False
    with open_decoded(path) as stream:
        return not _find_start(path, stream).opens_list


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """Where the first record of a file begins."""

    place: FilePlace
    opens_list: bool


def _find_start(path: str, stream: io.BufferedReader) -> _Start:
    """Read up to the first byte that is neither a mark nor white space."""
    _check_start(path, stream.peek(4)[:4])
    offset, line = 0, 1
    if stream.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        offset = len(stream.read(len(codecs.BOM_UTF8)))
    while held := stream.peek(1):
        blank = held[: len(held) - len(held.lstrip(_WHITESPACE))]
        line += blank.count(b"\n")
        offset += len(stream.read(len(blank)))
        if len(blank) < len(held):
            break
    if not held:
        raise ConfigError(f"{path}: the file holds only white space; leave it out of --input")
    opens_list = _opens_list(stream.peek(1)[:_PEEK_BYTES])
    return _Start(place=FilePlace(offset=offset, line=line), opens_list=opens_list)


def _check_start(path: str, start: bytes) -> None:
    if not start:
        raise ConfigError(f"{path}: the file is empty; leave it out of --input")
    for bom, name in _NOT_UTF8_BOMS.items():
        if start.startswith(bom):
            raise ConfigError(
                f"{path}:1: the file is {name}; convert it, for example "
                f"`iconv -f {name} -t UTF-8 {path}`"
            )


def _opens_list(start: bytes) -> bool:
    """Whether a file that begins so is one JSON list of records.

    [{"messages" ...   one list of records       ["hello", "hi"]   a line, a record of its own
    """
    if not start.startswith(b"["):
        return False
    inside = start[1:].lstrip(_WHITESPACE)
    return not inside.startswith(b'"')


def _next_line_start(stream: io.BufferedReader, position: int) -> int:
    """Where the first line begins that begins at `position` or behind it."""
    stream.seek(position - 1)
    while data := stream.readline(_BLOCK_BYTES):
        if data.endswith(b"\n"):
            break
    return stream.tell()


def _discard(stream: io.BufferedReader, num_bytes: int) -> None:
    while num_bytes > 0 and (data := stream.read(min(num_bytes, _BLOCK_BYTES))):
        num_bytes -= len(data)


def _read_line_blocks(
    part: FilePart, stream: io.BufferedReader, place: FilePlace, from_byte: int
) -> Iterator[LineBlock]:
    """Blocks of whole lines, of those that begin before the end of the part."""
    offset, line = place.offset, place.line
    held: list[bytes] = []  # of a line that goes on
    num_held = 0
    is_over = part.end is not None and offset >= part.end
    while not is_over:
        data = stream.read(_BLOCK_BYTES)
        cut = data.rfind(b"\n") + 1
        if not data:
            is_over = True
        elif part.end is not None and offset + num_held + len(data) >= part.end:
            # The last line of the part holds the byte before its end.
            last = data.find(b"\n", max(0, part.end - 1 - offset - num_held))
            is_over = last >= 0
            cut = last + 1 if is_over else cut
        if not cut and data:
            held.append(data)
            num_held += len(data)
            if num_held >= _MAX_RECORD_CHARACTERS:
                raise ConfigError(
                    f"{part.path}:{line}: the line has more than {_MAX_RECORD_CHARACTERS >> 20} "
                    "MiB; one line is one session: repair the file, or write it as one JSON list"
                )
            continue
        lines = b"".join([*held, data[:cut]])
        held = [data[cut:]]
        num_held = len(held[0])
        first_line = line
        offset += len(lines)
        line += lines.count(b"\n")
        if lines:
            yield LineBlock(
                path=part.path,
                data=lines,
                first_line=first_line,
                from_byte=from_byte,
                end=FilePlace(offset=offset, line=line),
                raw_position=raw_position(stream),
            )


def _read_item_blocks(
    path: str, stream: io.BufferedReader, first_line: int, place: FilePlace | None
) -> Iterator[RecordBlock]:
    """Blocks of the items of a JSON list from a place on."""
    held: list[RawRecord] = []
    num_bytes = number = 0

    def block() -> RecordBlock:
        return RecordBlock(
            path=path,
            held=tuple(held),
            num_bytes=num_bytes,
            end=FilePlace(offset=number),
            raw_position=raw_position(stream),
        )

    for data, line, number in read_items(path, stream, first_line):
        if place is not None and number <= place.offset:
            continue
        held.append(RawRecord(data=data, location=f"{path}:{line} (item {number})"))
        num_bytes += len(data)
        if num_bytes >= _BLOCK_BYTES:
            yield block()
            held, num_bytes = [], 0
    if held:
        yield block()


def _read_row_blocks(part: FilePart, place: FilePlace | None) -> Iterator[RowBlock]:
    """Blocks of the rows of some row groups from a place on."""
    path = part.path
    first = num_rows_before(path, part.begin) if place is None else place.offset
    held: list[Any] = []
    num_bytes = first_row = held_group = row = position = 0

    def block() -> RowBlock:
        return RowBlock(
            path=path,
            data=pack_batches(held),
            first_row=first_row,
            group=held_group,
            end=FilePlace(offset=row),
            raw_position=position,
        )

    for batch, begin, group, stop in read_batches(path, part.begin, part.end, first):
        if held and (group != held_group or num_bytes >= _BLOCK_BYTES):
            yield block()
            held, num_bytes = [], 0
        if not held:
            first_row, held_group = begin, group
        held.append(batch)
        num_bytes += batch.nbytes
        row, position = begin + batch.num_rows, stop
    if held:
        yield block()
