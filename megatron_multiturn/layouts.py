"""A document as atoms: what of its tokens is known, and which texts are to be encoded for the rest.

    <|im_start|> assistant \\n | Hello. <|im_end|> | \\n

has three segments and four groups of atoms: two special tokens, the text group "assistant\\nHello."
with an edge inside, and "\\n". A text group is encoded as one text, so that the segments join to
the whole rendering, token for token. Where the ids of what stands before an edge are the head of
the group's ids, the edge lies between two tokens, and the ids are cut there. A group that goes on
in the middle of a text stands behind a guard (see `run_encoder`), which is cut off alike.

Templates of this package write around the contents what the roles alone decide: the layout of a
sequence of roles is made once, with slots for the contents, and filled for every such session.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.modes import (
    CONTEXT,
    KIND_MASK,
    LEADING_SYSTEM,
    MESSAGE_START,
    TARGET_CONTINUE,
    WEIGHT_SHIFT,
)
from megatron_multiturn.run_encoder import RunEncoder
from megatron_multiturn.templates import Segment, Special
from megatron_multiturn.turn_weights import TurnWeights

Text = tuple[str | int, ...]  # literals, and numbers of slots
_SLOT = re.compile("\ue000([0-9]+)\ue001")


def slot_text(number: int) -> str:
    """The content of message `number` when a layout with slots is made."""
    return f"\ue000{number}\ue001"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGroup:
    """Text that is encoded as one; its pieces are those of different segments."""

    pieces: tuple[Text, ...]
    segments: tuple[int, ...]  # of each piece
    goes_on: bool  # whether it begins in the middle of a text

    @property
    def is_constant(self) -> bool:
        return all(isinstance(item, str) for piece in self.pieces for item in piece)


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
            int(item) if index % 2 else item for index, item in enumerate(_SLOT.split(text)) if item
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Atoms, in order, of the segments of a document; numbers are within the layout.

    An atom is constant ids, or a piece of a text group: between two edges, or the group's ends.
    """

    modes: NDArray[np.int8]  # (num_segments,)
    atom_segments: NDArray[np.int64]  # (num_atoms,)
    atom_constants: NDArray[np.int64]  # (num_atoms, 2) (start, stop) in the pool; (0, 0) for text
    atom_groups: NDArray[np.int64]  # (num_atoms,), -1 for constants
    atom_edges: NDArray[np.int64]  # (num_atoms, 2), -1 where the group begins or ends
    edge_groups: NDArray[np.int64]  # (num_edges,)
    edge_segments: NDArray[np.int64]  # (num_edges, 2) before it and after it
    edge_constants: NDArray[np.int64]  # (num_edges, 2) the ids before it, in the pool; or (0, 0)
    groups: tuple[TextGroup, ...]
    group_fills: tuple["Fill", ...]  # the texts of the groups
    edge_fills: tuple["Fill", ...]  # the texts before the edges with (0, 0)


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


def fill_groups(layout: Layout, contents: Sequence[str]) -> list[str]:
    """The texts of the groups of a layout; as fill_text, without a call for each of them."""
    return [
        before + contents[slot] + after
        if slot >= 0
        else fill_text((before, slot, after, items), contents)
        for before, slot, after, items in layout.group_fills
    ]


class ConstantPool:
    """Ids that layouts know, each sequence once."""

    def __init__(self) -> None:
        self._spans: dict[tuple[int, ...], tuple[int, int]] = {}
        self._ids: list[int] = []
        self._array = np.zeros(0, dtype=np.int32)

    def span(self, ids: Sequence[int]) -> tuple[int, int]:
        """(start, stop) of the ids, which are added if they are new."""
        key = tuple(ids)
        if key not in self._spans:
            self._spans[key] = (len(self._ids), len(self._ids) + len(key))
            self._ids += key
        return self._spans[key]

    @property
    def ids(self) -> NDArray[np.int32]:
        if len(self._array) != len(self._ids):
            self._array = np.array(self._ids, dtype=np.int32)
        return self._array


class LayoutMaker:
    """Makes layouts from segments."""

    def __init__(
        self,
        *,
        id_of: Callable[[Special], int | None],
        unsafe_literals: Sequence[str],
        run_encoder: RunEncoder,
        pool: ConstantPool,
    ) -> None:
        """id_of: of a special token, None for one that is left out; unsafe_literals: what the
        tokenizer reads as one of them in text, the longest first."""
        self._id_of = id_of
        unsafe = "|".join(map(re.escape, unsafe_literals))
        self._unsafe = re.compile(unsafe) if unsafe else None
        # Looked for first, as that takes a tenth of the time.
        self._unsafe_starts = sorted({literal[:2] for literal in unsafe_literals})
        self._run_encoder = run_encoder
        self._pool = pool

    def is_unsafe(self, text: str) -> bool:
        """Whether a text holds a literal that has to be broken up."""
        return (
            self._unsafe is not None
            and any(start in text for start in self._unsafe_starts)
            and self._unsafe.search(text) is not None
        )

    def make(self, segments: Sequence[Segment], weights: TurnWeights, *, has_slots: bool) -> Layout:
        """The layout of a document.

        weights: numbers those of the turns; has_slots: whether the layout will be used again, so
        that what is constant is encoded here.
        """
        cutter = _Cutter(id_of=self._id_of, unsafe=self._unsafe, has_slots=has_slots)
        for number, written in enumerate(segments):
            for part in written.parts:
                cutter.add(number, part)
        arrays = _Arrays(np.array([_mode(written, weights) for written in segments], dtype=np.int8))
        for segment, atom in cutter.finish():
            if isinstance(atom, int):
                arrays.add_constant(segment, self._pool.span([atom]))
            elif has_slots and atom.is_constant:
                self._add_constant_group(arrays, atom)
            else:
                self._add_group(arrays, atom, encodes_constants=has_slots)
        return arrays.layout()

    def _add_constant_group(self, arrays: "_Arrays", group: TextGroup) -> None:
        texts = ["".join(map(str, piece)) for piece in group.pieces]
        ids = self._run_encoder.encode_pieces(texts, goes_on=group.goes_on)
        if ids is None:
            self._add_group(arrays, group, encodes_constants=True)
            return
        for segment, piece in zip(group.segments, ids, strict=True):
            arrays.add_constant(segment, self._pool.span(piece))

    def _add_group(self, arrays: "_Arrays", group: TextGroup, *, encodes_constants: bool) -> None:
        guard = self._run_encoder.guard if group.goes_on else ""
        number = arrays.add_group(group, make_fill((guard, *_join(group.pieces))))
        edges = [-1]
        if guard:
            guard_ids = self._run_encoder.encode_constant(guard)
            sides = (group.segments[0], group.segments[0])
            edges = [arrays.add_edge(number, sides, self._pool.span(guard_ids))]
        to_left = edges_to_left(arrays.modes, group.segments)
        for count, sides in enumerate(pairwise(group.segments), start=1):
            before = (guard, *_join(group.pieces[:count]))
            if encodes_constants and all(isinstance(item, str) for item in before):
                after = group.pieces[count][0]
                ids = self._run_encoder.encode_head(
                    "".join(map(str, before)),
                    after if isinstance(after, str) else "",
                    is_left=to_left[count - 1],
                )
                edges.append(arrays.add_edge(number, sides, self._pool.span(ids)))
            else:
                edges.append(arrays.add_variable_edge(number, sides, make_fill(before)))
        edges.append(-1)
        for segment, lower, upper in zip(group.segments, edges, edges[1:], strict=False):
            arrays.add_piece(segment, number, (lower, upper))


@dataclass(slots=True)
class _Arrays:
    """A layout in the making."""

    modes: NDArray[np.int8]
    segments: list[int] = field(default_factory=list)
    constants: list[tuple[int, int]] = field(default_factory=list)
    atom_groups: list[int] = field(default_factory=list)
    atom_edges: list[tuple[int, int]] = field(default_factory=list)
    edge_groups: list[int] = field(default_factory=list)
    edge_segments: list[tuple[int, int]] = field(default_factory=list)
    edge_constants: list[tuple[int, int]] = field(default_factory=list)
    groups: list[TextGroup] = field(default_factory=list)
    group_fills: list[Fill] = field(default_factory=list)
    edge_fills: list[Fill] = field(default_factory=list)

    def add_constant(self, segment: int, span: tuple[int, int]) -> None:
        self._add_atom(segment, span, -1, (-1, -1))

    def add_piece(self, segment: int, group: int, edges: tuple[int, int]) -> None:
        self._add_atom(segment, (0, 0), group, edges)

    def add_group(self, group: TextGroup, fill: Fill) -> int:
        self.groups.append(group)
        self.group_fills.append(fill)
        return len(self.groups) - 1

    def add_edge(self, group: int, sides: tuple[int, int], span: tuple[int, int]) -> int:
        self.edge_groups.append(group)
        self.edge_segments.append(sides)
        self.edge_constants.append(span)
        return len(self.edge_groups) - 1

    def add_variable_edge(self, group: int, sides: tuple[int, int], fill: Fill) -> int:
        self.edge_fills.append(fill)
        return self.add_edge(group, sides, (0, 0))

    def layout(self) -> Layout:
        return Layout(
            modes=self.modes,
            atom_segments=np.array(self.segments, dtype=np.int64),
            atom_constants=np.array(self.constants, dtype=np.int64).reshape(-1, 2),
            atom_groups=np.array(self.atom_groups, dtype=np.int64),
            atom_edges=np.array(self.atom_edges, dtype=np.int64).reshape(-1, 2),
            edge_groups=np.array(self.edge_groups, dtype=np.int64),
            edge_segments=np.array(self.edge_segments, dtype=np.int64).reshape(-1, 2),
            edge_constants=np.array(self.edge_constants, dtype=np.int64).reshape(-1, 2),
            groups=tuple(self.groups),
            group_fills=tuple(self.group_fills),
            edge_fills=tuple(self.edge_fills),
        )

    def _add_atom(
        self, segment: int, span: tuple[int, int], group: int, edges: tuple[int, int]
    ) -> None:
        self.segments.append(segment)
        self.constants.append(span)
        self.atom_groups.append(group)
        self.atom_edges.append(edges)


def edges_to_left(modes: NDArray[np.int8], segments: Sequence[int]) -> list[bool]:
    """For each edge between pieces of a group, whether a token across it is the left piece's.

    An answer takes it from its context, a masked gap from its answer, and a message from the one
    before it, since a window may open there. segments: of the pieces.
    """
    kinds = (modes & KIND_MASK).tolist()
    is_gap = [
        kind == CONTEXT and following == TARGET_CONTINUE
        for kind, following in zip(kinds, [*kinds[1:], CONTEXT], strict=True)
    ]
    return [
        is_gap[left] or (kinds[left] != CONTEXT and not is_gap[right])
        for left, right in pairwise(segments)
    ]


def _join(pieces: Sequence[Text]) -> Text:
    return tuple(item for piece in pieces for item in piece)


def _mode(segment: Segment, weights: TurnWeights) -> int:
    if segment.kind != CONTEXT:
        return segment.kind | weights.number_of(segment.weight) << WEIGHT_SHIFT
    return (
        CONTEXT
        | (MESSAGE_START if segment.starts_message else 0)
        | (LEADING_SYSTEM if segment.leading_system else 0)
    )
