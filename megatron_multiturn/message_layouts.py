"""Layouts with slots, joined from those of single messages, which are made once.

Sequences of roles are many, of chats with tools nearly as many as chats; what is written of one
message depends on few things, and hardly ever differs but for the number of its slot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.layouts import Layout, LayoutMaker
from megatron_multiturn.templates import Part, Segment, Special
from megatron_multiturn.text_groups import SLOT, Fill, Text, TextGroup, slot_text
from megatron_multiturn.turn_weights import TurnWeights

_MAX_CACHED = 4096

# Of each segment all that its layout depends on, its slots numbered from 0 in the message.
_Key = tuple[tuple[int, bool, bool, float, tuple[Part, ...]], ...]


class MessageLayouts:
    """Makes layouts with slots."""

    def __init__(self, maker: LayoutMaker) -> None:
        self._maker = maker
        self._made: dict[_Key, Layout] = {}

    def make(self, segments: Sequence[Segment]) -> Layout:
        """The layout of a document; its turns weigh 1, and nothing in them is masked."""
        layouts = []
        slots = []
        for message in _split(segments):
            key, numbers = _key(message)
            if key not in self._made:
                if len(self._made) >= _MAX_CACHED:
                    self._made.clear()
                renumbered = [
                    replace(segment, parts=parts)
                    for segment, (*_, parts) in zip(message, key, strict=True)
                ]
                self._made[key] = self._maker.make(renumbered, TurnWeights(), has_slots=True)
            layouts.append(self._made[key])
            slots.append(numbers)
        return _join(layouts, slots)


def _split(segments: Sequence[Segment]) -> Iterator[Sequence[Segment]]:
    """The segments of each message; of several, where text goes on from one to the next."""
    start = 0
    for index, segment in enumerate(segments):
        if index > start and segment.starts_message and isinstance(segment.parts[0], Special):
            yield segments[start:index]
            start = index
    yield segments[start:]


def _key(message: Sequence[Segment]) -> tuple[_Key, list[int]]:
    """(the key, the number of each of its slots in the document)"""
    numbers: list[int] = []

    def renumber(text: str) -> str:
        pieces = SLOT.split(text)
        for index in range(1, len(pieces), 2):
            number = int(pieces[index])
            if number not in numbers:
                numbers.append(number)
            pieces[index] = slot_text(numbers.index(number))
        return "".join(pieces)

    key = tuple(
        (
            segment.kind,
            segment.starts_message,
            segment.leading_system,
            segment.weight,
            tuple([renumber(part) if isinstance(part, str) else part for part in segment.parts]),
        )
        for segment in message
    )
    return key, numbers


def _join(layouts: Sequence[Layout], slots: Sequence[Sequence[int]]) -> Layout:
    """One layout after the other; slots: of each layout, the numbers of its slots in the whole."""
    segments = _offsets([len(layout.modes) for layout in layouts])
    groups = _offsets([len(layout.groups) for layout in layouts])
    edges = _offsets([len(layout.edge_groups) for layout in layouts])

    def joined(name: str, offsets: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        arrays: list[NDArray[np.int64]] = [getattr(layout, name) for layout in layouts]
        whole = np.concatenate(arrays)
        if offsets is None:
            return whole
        shifts = offsets.repeat([len(array) for array in arrays])
        return np.where(whole < 0, whole, whole + (shifts if whole.ndim == 1 else shifts[:, None]))

    return Layout(
        modes=np.concatenate([layout.modes for layout in layouts]),
        masked_ends=np.concatenate([layout.masked_ends for layout in layouts]),
        atom_segments=joined("atom_segments", segments),
        atom_constants=joined("atom_constants"),
        atom_groups=joined("atom_groups", groups),
        atom_edges=joined("atom_edges", edges),
        edge_groups=joined("edge_groups", groups),
        edge_segments=joined("edge_segments", segments),
        edge_constants=joined("edge_constants"),
        groups=tuple(
            _moved_group(group, numbers, offset)
            for layout, numbers, offset in zip(layouts, slots, segments.tolist(), strict=True)
            for group in layout.groups
        ),
        group_fills=tuple(
            _moved_fill(fill, numbers)
            for layout, numbers in zip(layouts, slots, strict=True)
            for fill in layout.group_fills
        ),
        edge_fills=tuple(
            _moved_fill(fill, numbers)
            for layout, numbers in zip(layouts, slots, strict=True)
            for fill in layout.edge_fills
        ),
    )


def _offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    """Where each begins that holds so many: [2, 3] gives [0, 2]."""
    return np.cumsum(counts) - counts


def _moved_group(group: TextGroup, numbers: Sequence[int], segment_offset: int) -> TextGroup:
    return TextGroup(
        pieces=tuple([_moved_text(piece, numbers) for piece in group.pieces]),
        segments=tuple([segment + segment_offset for segment in group.segments]),
        goes_on=group.goes_on,
    )


def _moved_fill(fill: Fill, numbers: Sequence[int]) -> Fill:
    before, slot, after, items = fill
    return before, numbers[slot] if slot >= 0 else slot, after, _moved_text(items, numbers)


def _moved_text(text: Text, numbers: Sequence[int]) -> Text:
    return tuple([item if isinstance(item, str) else numbers[item] for item in text])
