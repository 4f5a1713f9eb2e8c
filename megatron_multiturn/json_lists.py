"""Files that are one JSON list -> the JSON text of each item, streamed."""

import codecs
import io
import json
from collections.abc import Iterator

from megatron_multiturn.errors import ConfigError

_READ_BYTES = 1 << 20
_MAX_ITEM_CHARACTERS = 1 << 28  # a broken list must not be read whole to be found broken
_WHITESPACE = " \t\r\n"


def read_items(
    path: str, stream: io.BufferedReader, first_line: int
) -> Iterator[tuple[bytes, int, int]]:
    """(JSON text, line, item) of every item; both counted from 1, the line in the whole file.

    stream: at the bracket that opens the list. Raises ConfigError where the list is broken, after
    the items before the break, and for a list without items.
    """
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
        line = text.line
        yield text.take_value(decoder, item), line, item
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
                too_long = len(self._text) - self._at > _MAX_ITEM_CHARACTERS
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
