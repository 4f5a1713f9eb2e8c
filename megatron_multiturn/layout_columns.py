"""The arrays of the layouts of a batch one after another, numbered throughout."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.layouts import Layout
from megatron_multiturn.message_layouts import ChatLayout
from megatron_multiturn.modes import is_target


class LayoutColumns:
    """What the layouts of some documents know, in one array each."""

    def __init__(self, chats: Sequence[ChatLayout]) -> None:
        """chats: of each document; most of their layouts come up time and again."""
        layouts: dict[int, Layout] = {}
        for chat in chats:
            layouts |= chat.layouts
        numbers, order = np.unique(
            np.concatenate([chat.numbers for chat in chats]), return_inverse=True
        )
        distinct = [layouts[number] for number in numbers.tolist()]
        num_layouts = [len(chat.numbers) for chat in chats]
        self._first_layouts = _starts(np.array(num_layouts))  # of each document
        documents = np.repeat(np.arange(len(chats)), num_layouts)

        segments = _Kind([len(one.modes) for one in distinct], order)
        groups = _Kind([len(one.groups) for one in distinct], order)
        edges = _Kind([len(one.edge_groups) for one in distinct], order)
        atoms = _Kind([len(one.atom_segments) for one in distinct], order)

        self.modes: NDArray[np.int8] = segments.taken([one.modes for one in distinct])
        self.first_segments = np.append(segments.firsts[self._first_layouts], len(self.modes))

        self._first_groups = groups.firsts  # of each layout
        self.group_documents = groups.spread(documents)

        self.edge_groups: NDArray[np.int64] = edges.taken([one.edge_groups for one in distinct])
        self.edge_groups += edges.spread(groups.firsts)
        self.edge_spans: NDArray[np.int64] = edges.taken([one.edge_constants for one in distinct])
        self.is_variable = self.edge_spans[:, 1] < 0
        self._edge_segments: NDArray[np.int64] = edges.taken(
            [one.edge_segments for one in distinct]
        )
        self._edge_segments += edges.spread(segments.firsts)[:, None]

        self.atom_segments: NDArray[np.int64] = atoms.taken([one.atom_segments for one in distinct])
        self.atom_segments += atoms.spread(segments.firsts)
        self.atom_documents = atoms.spread(documents)
        self._atom_constants: NDArray[np.int64] = atoms.taken(
            [one.atom_constants for one in distinct]
        )
        atom_groups: NDArray[np.int64] = atoms.taken([one.atom_groups for one in distinct])
        self._pieces = np.flatnonzero(atom_groups >= 0)  # the atoms that are pieces of groups
        self._piece_groups = (atom_groups + atoms.spread(groups.firsts))[self._pieces]
        atom_edges: NDArray[np.int64] = atoms.taken([one.atom_edges for one in distinct])
        piece_edges = atom_edges[self._pieces]
        piece_edges += np.where(
            piece_edges < 0, 0, atoms.spread(edges.firsts)[self._pieces][:, None]
        )
        self._piece_edges = piece_edges

    def are_answers_edges(self) -> NDArray[np.bool_]:
        """Which edges have an answer on one side or on both; (num_edges,)."""
        sides: NDArray[np.bool_] = is_target(self.modes)[self._edge_segments]
        return sides.any(axis=1)

    def place_of(self, group: int) -> tuple[int, int]:
        """(the layout in its document that a group is of, its number in that)"""
        layout = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        first_layout = self._first_layouts[self.group_documents[group]]
        return layout - int(first_layout), group - int(self._first_groups[layout])

    def atoms_of(self, group: int) -> list[int]:
        """The atoms that are the pieces of a group."""
        first, last = np.searchsorted(self._piece_groups, [group, group + 1]).tolist()
        return self._pieces[first:last].tolist()

    def place_atoms(
        self, group_spans: NDArray[np.int64], edge_lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts, lengths) of the atoms, both (num_atoms,).

        group_spans: (num_groups, 2) where the groups lie; edge_lengths: (num_edges,) how many ids
        stand before each edge.
        """
        starts = self._atom_constants[:, 0].copy()
        stops = self._atom_constants[:, 1].copy()
        spans = group_spans[self._piece_groups]
        lower, upper = self._piece_edges.T
        before = np.append(edge_lengths, 0)  # the last is found at -1
        starts[self._pieces] = spans[:, 0] + before[lower]
        stops[self._pieces] = np.where(upper < 0, spans[:, 1], spans[:, 0] + before[upper])
        return starts, np.maximum(stops - starts, 0)


class _Kind:
    """Of one kind of things, how many each layout has, and where they lie."""

    def __init__(self, counts: Sequence[int], order: NDArray[np.int64]) -> None:
        """counts: of each distinct layout; order: (num_layouts,) of distinct layouts."""
        in_layouts = np.array(counts, dtype=np.int64)
        self._counts = in_layouts[order]
        self.firsts = _starts(self._counts)  # of each layout
        self._positions = ragged_positions(_starts(in_layouts)[order], self._counts)

    def taken(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The arrays of the distinct layouts, taken in order."""
        taken: NDArray[Any] = np.concatenate(arrays)[self._positions]
        return taken

    def spread(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """The value of each layout, for all it has."""
        return np.repeat(values, self._counts)


def ragged_positions(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions of all elements of spans.

    starts [7, 2], lengths [2, 1] give [7, 8, 2].
    """
    shifts = starts - _starts(lengths)
    return np.repeat(shifts, lengths) + np.arange(int(lengths.sum()))


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each begins that holds so many: [2, 3] gives [0, 2]."""
    return np.cumsum(counts) - counts
