"""Input files -> raw records, streamed.

A record is still text here; `sessions.py` says what it means. What a file is, is found out by
its first bytes: Parquet, gzip and zstd (see `input_files`) by their marks; of JSON, `[` and an
object or a list behind it open a JSON list of records, anything else is JSONL (a line may be a
list of texts).
"""

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.input_files import is_parquet, open_decoded
from megatron_multiturn.parquet_records import check_can_read, read_rows

_READ_BYTES = 1 << 20
_MAX_RECORD_CHARACTERS = 1 << 28  # a broken list must not be read whole to be found broken
_WHITESPACE = " \t\r\n"
_PEEK_BYTES = 1 << 12
_NOT_UTF8_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRecord:
    """One object of an input file, not yet parsed."""

    data: bytes  # JSON text, UTF-8 if the file is sound
    # "file.jsonl:17"; for a JSON list "file.json:17 (item 4)", for Parquet
    # "file.parquet:17 (row group 2)", where 17 is the row in the file.
    location: str


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

    Raises ConfigError for a file that cannot be read on from: missing, empty, without a record,
    UTF-16, broken as an archive, or a JSON list that is broken (after the records before the
    break).
    """
    if is_parquet(path):
        for data, row, group in read_rows(path):
            yield RawRecord(data=data, location=f"{path}:{row} (row group {group})")
        return
    with open_decoded(path) as stream:
        _check_start(path, stream.peek(4)[:4])
        if stream.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        first_line = _skip_blank(stream)
        start = stream.peek(1)[:_PEEK_BYTES]
        if not start:
            raise ConfigError(f"{path}: the file holds only white space; leave it out of --input")
        read = _read_list if _opens_list(start) else _read_lines
        yield from read(path, stream, first_line)


def _check_start(path: str, start: bytes) -> None:
    if not start:
        raise ConfigError(f"{path}: the file is empty; leave it out of --input")
    for bom, name in _NOT_UTF8_BOMS.items():
        if start.startswith(bom):
            raise ConfigError(
                f"{path}:1: the file is {name}; convert it, for example "
                f"`iconv -f {name} -t UTF-8 {path}`"
            )


def _skip_blank(stream: io.BufferedReader) -> int:
    """Read up to the first byte that is not white space; the number of its line."""
    line = 1
    while held := stream.peek(1):
        blank = held[: len(held) - len(held.lstrip(_WHITESPACE.encode()))]
        line += blank.count(b"\n")
        stream.read(len(blank))
        if len(blank) < len(held):
            break
    return line


def _opens_list(start: bytes) -> bool:
    """Whether a file that begins so is one JSON list of records.

    [{"messages" ...   one list of records       ["hello", "hi"]   a line, a record of its own
    """
    if not start.startswith(b"["):
        return False
    inside = start[1:].lstrip(_WHITESPACE.encode())
    return not inside.startswith(b'"')


def _read_lines(path: str, stream: io.BufferedReader, first_line: int) -> Iterator[RawRecord]:
    number = first_line
    while line := stream.readline(_MAX_RECORD_CHARACTERS):
        if len(line) == _MAX_RECORD_CHARACTERS:
            raise ConfigError(
                f"{path}:{number}: the line has more than {_MAX_RECORD_CHARACTERS >> 20} MiB; one "
                "line is one session: repair the file, or write it as one JSON list"
            )
        data = line.strip()
        if data:
            yield RawRecord(data=data, location=f"{path}:{number}")
        number += 1


def _read_list(path: str, stream: io.BufferedReader, first_line: int) -> Iterator[RawRecord]:
    text = _ListText(path, stream, first_line)
    decoder = json.JSONDecoder()
    if text.next_character() != "[":
        raise AssertionError("the caller has seen the bracket")
    text.advance(1)
    item = 0
    while (character := text.next_character()) != "]":
        if item:
            if character != ",":
                raise text.broken(item, f"',' or ']' expected, found {character!r}")
            text.advance(1)
            text.next_character()
        item += 1
        location = f"{path}:{text.line} (item {item})"
        yield RawRecord(data=text.take_value(decoder, item), location=location)
    text.advance(1)
    if not item:
        raise ConfigError(f"{path}:{text.line}: the list is empty; leave the file out of --input")
    rest = text.next_character()
    if rest:
        raise ConfigError(
            f"{path}:{text.line}: {rest!r} follows after the end of the list; one file holds one "
            "JSON list, or one object a line (JSONL)"
        )


class _ListText:
    """A window on the text of a JSON list that slides forward and knows its line."""

    def __init__(self, path: str, stream: io.BufferedReader, first_line: int) -> None:
        self.line = first_line
        self._path = path
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0

    def advance(self, count: int) -> None:
        stop = self._at + count
        self.line += self._text.count("\n", self._at, stop)
        self._at = stop

    def next_character(self) -> str:
        """Skip white space; the character there, empty at the end of the file."""
        while True:
            start = self._at
            while start < len(self._text) and self._text[start] in _WHITESPACE:
                start += 1
            self.advance(start - self._at)
            if start < len(self._text):
                return self._text[start]
            if not self._read_more():
                return ""

    def take_value(self, decoder: json.JSONDecoder, item: int) -> bytes:
        """The JSON text of the value that begins here; the window moves behind it."""
        while True:
            try:
                stop = decoder.raw_decode(self._text, self._at)[1]
            except (ValueError, RecursionError) as error:
                too_long = len(self._text) - self._at > _MAX_RECORD_CHARACTERS
                if too_long or not self._read_more():
                    raise self.broken(item, str(error)) from None
                continue
            # A value at the very end of the window may go on behind it: 12 of 123.
            if stop == len(self._text) and self._read_more():
                continue
            value = self._text[self._at : stop].encode("utf-8")
            self.advance(stop - self._at)
            return value

    def broken(self, item: int, what: str) -> ConfigError:
        return ConfigError(
            f"{self._path}:{self.line}: item {item} of the JSON list is broken ({what}); what "
            "follows cannot be found: repair the file, or write one object a line (JSONL), where "
            "--on-bad-session skip can leave out single lines"
        )

    def _read_more(self) -> bool:
        # At least as much again as is held, so that a huge record is scanned few times.
        held = len(self._text) - self._at
        data = self._stream.read(max(_READ_BYTES, held))
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at)
            line += error.object.count(b"\n", 0, error.start)
            raise ConfigError(
                f"{self._path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8 "
                "text; convert the file to UTF-8"
            ) from None
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(data)
