"""Segments -> token ids and groups of text, each group to be encoded as one.

Text may have slots, which stand for the contents of messages (see `layouts`).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_multiturn.templates import Segment, Special

Text = tuple[str | int, ...]  # literals, and numbers of slots
SLOT = re.compile("\ue000([0-9]+)\ue001")


def slot_text(number: int) -> str:
    """The content of message `number` when a layout with slots is made."""
    return f"\ue000{number}\ue001"


# (text before, slot, text after, items): a text with one slot; or with no slot or with several,
# and then the slot is -1 and the items are all there is.
Fill = tuple[str, int, str, Text]


def make_fill(items: Text) -> Fill:
    """How the items become one text, given the contents."""
    merged: list[str | int] = []
    for item in items:
        if isinstance(item, str) and merged and isinstance(merged[-1], str):
            merged[-1] += item
        else:
            merged.append(item)
    slots = [index for index, item in enumerate(merged) if isinstance(item, int)]
    if len(slots) != 1:
        return "", -1, "", tuple(merged)
    (at,) = slots
    before, after = ("".join(map(str, part)) for part in (merged[:at], merged[at + 1 :]))
    return before, int(merged[at]), after, ()


def fill_text(fill: Fill, contents: Sequence[str]) -> str:
    """The text with its slots filled.

    ("user\\n", 0, "", ()) with the contents ["Hi."] is "user\\nHi.".
    """
    before, slot, after, items = fill
    if slot >= 0:
        return before + contents[slot] + after
    return "".join([item if isinstance(item, str) else contents[item] for item in items])


def fill_texts(fills: Sequence[Fill], contents: Sequence[str]) -> list[str]:
    """As fill_text for each of them, without so many calls."""
    return [
        before + contents[slot] + after
        if slot >= 0
        else fill_text((before, slot, after, items), contents)
        for before, slot, after, items in fills
    ]


def moved_fill(fill: Fill, offset: int) -> Fill:
    """The fill with its slots numbered `offset` higher."""
    before, slot, after, items = fill
    if slot >= 0:
        return before, slot + offset, after, ()
    moved = [item if isinstance(item, str) else item + offset for item in items]
    return before, slot, after, tuple(moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGroup:
    """Text that is encoded as one; its pieces are those of different segments."""

    pieces: tuple[Text, ...]
    segments: tuple[int, ...]  # of each piece
    goes_on: bool  # whether it begins in the middle of a text

    @property
    def is_constant(self) -> bool:
        return all(isinstance(item, str) for piece in self.pieces for item in piece)


def cut_groups(
    segments: Sequence[Segment],
    *,
    id_of: Callable[[Special], int | None],
    unsafe: re.Pattern[str] | None,
    has_slots: bool,
) -> list[tuple[int, int | TextGroup]]:
    """(number of the segment, an id or a text group), in order.

    A group that reaches over several segments is named once, with the first of them. id_of: of a
    special token, None for one that is left out; unsafe: text that the tokenizer would read as a
    control token, which is broken up.
    """
    cutter = _Cutter(id_of=id_of, unsafe=unsafe, has_slots=has_slots)
    for number, segment in enumerate(segments):
        for part in segment.parts:
            cutter.add(number, part)
    return cutter.finish()


@dataclass(slots=True)
class _Cutter:
    """Cuts segments into ids and text groups."""

    id_of: Callable[[Special], int | None]
    unsafe: re.Pattern[str] | None
    has_slots: bool
    atoms: list[tuple[int, int | TextGroup]] = field(default_factory=list)  # with their segments
    pieces: list[tuple[int, list[str]]] = field(default_factory=list)  # of the open group
    goes_on: bool = False

    def add(self, segment: int, part: str | Special) -> None:
        if isinstance(part, str):
            if part and (not self.pieces or self.pieces[-1][0] != segment):
                self.pieces.append((segment, []))
            if part:
                self.pieces[-1][1].append(part)
            return
        self._close()
        token_id = self.id_of(part)
        if token_id is not None:
            self.atoms.append((segment, token_id))
        self.goes_on = False

    def finish(self) -> list[tuple[int, int | TextGroup]]:
        self._close()
        return self.atoms

    def _close(self) -> None:
        pieces = [(segment, "".join(texts)) for segment, texts in self.pieces]
        self.pieces = []
        for group in self._broken_up(pieces):
            segments = tuple(segment for segment, _ in group)
            texts = tuple(self._items(text) for _, text in group)
            made = TextGroup(pieces=texts, segments=segments, goes_on=self.goes_on)
            self.atoms.append((segments[0], made))
            self.goes_on = True

    def _broken_up(self, pieces: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
        """The pieces; text that the tokenizer would read as a control token is cut in two.

        What follows goes on, but is not joined with what stands before.
        """
        text = "".join(text for _, text in pieces)
        cut = 0
        # What is left of one literal may hold another.
        while pieces and self.unsafe is not None and (match := self.unsafe.search(text, cut)):
            size, cut = match.start() + 1 - cut, match.start() + 1
            head: list[tuple[int, str]] = []
            while size:
                segment, piece = pieces.pop(0)
                head.append((segment, piece[:size]))
                if piece[size:]:
                    pieces.insert(0, (segment, piece[size:]))
                size -= len(head[-1][1])
            yield head
        if pieces:
            yield pieces

    def _items(self, text: str) -> Text:
        if not self.has_slots:
            return (text,)
        return tuple(
            int(item) if index % 2 else item for index, item in enumerate(SLOT.split(text)) if item
        )
