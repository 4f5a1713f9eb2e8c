"""A document as atoms: what of its tokens is known, and which texts are to be encoded for the rest.

    <|im_start|> assistant \\n | Hello. <|im_end|> | \\n

has three segments and four groups of atoms: two special tokens, the text group "assistant\\nHello."
with an edge inside, and "\\n". A text group is encoded as one text, so that the segments join to
the whole rendering, token for token. Where the ids of what stands before an edge are the head of
the group's ids, the edge lies between two tokens, and the ids are cut there. A group that goes on
in the middle of a text stands behind a guard (see `run_encoder`), which is cut off alike.

Templates of this package write around the contents what the roles alone decide: the layouts of
messages are made once, with slots for the contents, and filled for every session (see
`message_layouts`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.modes import (
    CONTEXT,
    KIND_MASK,
    LEADING_SYSTEM,
    MESSAGE_START,
    WEIGHT_SHIFT,
)
from megatron_multiturn.run_encoder import RunEncoder
from megatron_multiturn.templates import Segment, Special
from megatron_multiturn.text_groups import Fill, Text, TextGroup, cut_groups, make_fill
from megatron_multiturn.turn_weights import TurnWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Atoms, in order, of the segments of a document; numbers are within the layout.

    An atom is constant ids, or a piece of a text group: between two edges, or the group's ends.
    """

    modes: NDArray[np.int8]  # (num_segments,)
    masked_ends: NDArray[np.bool_]  # (num_segments, 2): begins, ends with what is masked
    atom_segments: NDArray[np.int64]  # (num_atoms,)
    atom_constants: NDArray[np.int64]  # (num_atoms, 2) (start, stop) in the pool; (0, 0) for text
    atom_groups: NDArray[np.int64]  # (num_atoms,), -1 for constants
    atom_edges: NDArray[np.int64]  # (num_atoms, 2), -1 where the group begins or ends
    edge_groups: NDArray[np.int64]  # (num_edges,)
    edge_segments: NDArray[np.int64]  # (num_edges, 2) before it and after it
    edge_constants: NDArray[np.int64]  # (num_edges, 2) the ids before it, in the pool; or (-1, -1)
    groups: tuple[TextGroup, ...]
    group_fills: tuple[Fill, ...]  # the texts of the groups
    edge_fills: tuple[Fill, ...]  # the texts before the edges with (-1, -1)


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
        atoms = cut_groups(segments, id_of=self._id_of, unsafe=self._unsafe, has_slots=has_slots)
        arrays = _Arrays(
            modes=np.array([_mode(written, weights) for written in segments], dtype=np.int8),
            masked_ends=np.array([(one.starts_masked, one.ends_masked) for one in segments]),
        )
        for segment, atom in atoms:
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
        to_left = edges_to_left(arrays.modes, arrays.masked_ends, group.segments)
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
    masked_ends: NDArray[np.bool_]
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
        return self.add_edge(group, sides, (-1, -1))

    def layout(self) -> Layout:
        return Layout(
            modes=self.modes,
            masked_ends=self.masked_ends,
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


def edges_to_left(
    modes: NDArray[np.int8], masked_ends: NDArray[np.bool_], segments: Sequence[int]
) -> list[bool]:
    """For each edge between pieces of a group, whether a token across it is the left piece's.

    An answer takes it from its context, a masked gap from its answer, and a message from the one
    before it, since a window may open there. segments: of the pieces.
    """
    kinds = (modes[list(segments)] & KIND_MASK).tolist()
    masked = masked_ends[list(segments)].tolist()
    return [
        masked[index][1] or (kinds[index] != CONTEXT and not masked[index + 1][0])
        for index in range(len(kinds) - 1)
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
