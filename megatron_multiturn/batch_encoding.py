"""Layouts and their texts -> the tokens of a batch of documents, without a loop over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.engines import Engine
from megatron_multiturn.layout_columns import LayoutColumns, ragged_positions
from megatron_multiturn.layouts import Layout, edges_to_left
from megatron_multiturn.message_layouts import ChatLayout
from megatron_multiturn.modes import CONTEXT, KIND_MASK, TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.run_encoder import RunEncoder
from megatron_multiturn.text_groups import fill_text, fill_texts, make_fill
from megatron_multiturn.turn_weights import TurnWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDocuments:
    """A batch of documents as tokens."""

    tokens: NDArray[np.int32]  # (num_tokens,), the documents one after another
    segment_lengths: NDArray[np.int32]  # (num_segments,), none is 0
    modes: NDArray[np.int8]  # (num_segments,)
    first_segments: NDArray[np.int64]  # (number of documents that did not fail + 1,), from 0
    failed: NDArray[np.bool_]  # (num_documents,): of a source with a token across an edge, who
    # knows where
    is_recut: NDArray[np.bool_]  # (num_documents,): a token lay across the edge of an answer
    is_lossy: NDArray[np.bool_]  # (num_documents,): some text does not decode to itself


class DocumentBatch:
    """Documents by their layouts, to be encoded together."""

    def __init__(self) -> None:
        self.weights = TurnWeights()  # of the turns of all documents
        self._layouts: list[ChatLayout] = []  # of each document
        self._contents: list[Sequence[str]] = []  # likewise
        self._texts: list[str] = []
        self._known: dict[str, int] = {}  # texts of documents that are laid out only once
        self._group_texts: list[int] = []  # the text of each group
        self._edge_texts: list[int] = []  # the text before each variable edge

    def __len__(self) -> int:
        return len(self._layouts)

    def fill(self, layout: ChatLayout, contents: Sequence[str], texts: Sequence[str]) -> None:
        """Add a document of a layout with slots; texts: of its groups, with the contents in."""
        self._layouts.append(layout)
        self._contents.append(contents)
        first = len(self._texts)
        self._texts += texts
        self._group_texts += range(first, len(self._texts))
        if layout.edge_fills:
            first = len(self._texts)
            self._texts += fill_texts(layout.edge_fills, contents)
            self._edge_texts += range(first, len(self._texts))

    def add(self, layout: Layout) -> None:
        """Add a document of a layout without slots."""
        number = -1 - len(self)  # unlike those of layouts with slots
        self._layouts.append(
            ChatLayout(np.array([number]), {number: layout}, (0,), layout.group_fills, ())
        )
        self._contents.append(())
        self._group_texts += [self._number(fill_text(fill, ())) for fill in layout.group_fills]
        self._edge_texts += [self._number(fill_text(fill, ())) for fill in layout.edge_fills]

    def _number(self, text: str) -> int:
        """Templates write the same texts time and again, which are encoded once."""
        number = self._known.get(text)
        if number is None:
            number = self._known[text] = len(self._texts)
            self._texts.append(text)
        return number

    def encode(
        self,
        engine: Engine,
        run_encoder: RunEncoder,
        pool: NDArray[np.int32],
        sources: NDArray[np.int32],
        *,
        unknown_id: int | None,
    ) -> EncodedDocuments:
        """Encode all of them, of which there must be one.

        run_encoder: cuts the texts in which a token lies across an edge; pool: the ids that the
        layouts know; sources: (num_documents,), those of one source fail together; unknown_id: of
        the token for what the vocabulary does not have, one for any number of characters.
        """
        columns = LayoutColumns(self._layouts)
        encoded = engine.encode(self._texts)
        source = np.concatenate([pool, encoded.ids])
        text_spans = np.stack([encoded.offsets[:-1], encoded.offsets[1:]], axis=1) + len(pool)
        group_texts = np.array(self._group_texts, dtype=np.int64)
        group_spans = text_spans[group_texts]

        edge_spans = columns.edge_spans
        edge_spans[columns.is_variable] = text_spans[np.array(self._edge_texts, dtype=np.int64)]
        is_joined = ~_are_heads(source, edge_spans, group_spans[columns.edge_groups])
        if unknown_id is not None:  # it could be one with what follows
            is_joined |= source[edge_spans[:, 1] - 1] == unknown_id
        is_recut = self._none()
        recut_edges = np.flatnonzero(is_joined & columns.are_answers_edges())
        is_recut[columns.group_documents[columns.edge_groups[recut_edges]]] = True
        is_lossy = self._none()
        is_lossy_text = engine.find_lossy(self._texts, encoded)
        is_lossy[columns.group_documents[is_lossy_text[group_texts]]] = True

        starts, lengths = columns.place_atoms(group_spans, edge_spans[:, 1] - edge_spans[:, 0])
        added: list[int] = []
        failed = self._none()
        for group in np.unique(columns.edge_groups[is_joined]).tolist():
            document = int(columns.group_documents[group])
            pieces = self._cut(document, columns.place_of(group), run_encoder)
            failed[document] |= pieces is None
            for atom, ids in zip(columns.atoms_of(group), pieces or (), strict=False):
                starts[atom], lengths[atom] = len(source) + len(added), len(ids)
                added += ids
        failed = np.isin(sources, sources[failed])
        source = np.concatenate([source, np.array(added, dtype=np.int32)])
        segment_lengths = np.zeros(len(columns.modes), dtype=np.int64)
        lengths[failed[columns.atom_documents]] = 0
        np.add.at(segment_lengths, columns.atom_segments, lengths)
        first_segments = columns.first_segments
        is_filled = segment_lengths > 0
        _restore_begins(columns.modes, is_filled)
        num_segments = np.append(0, np.cumsum(is_filled))[first_segments]
        return EncodedDocuments(
            tokens=source[ragged_positions(starts, lengths)],
            segment_lengths=segment_lengths[is_filled].astype(np.int32),
            modes=columns.modes[is_filled],
            first_segments=np.append(0, num_segments[1:][~failed]),
            failed=failed,
            is_recut=is_recut & ~failed,
            is_lossy=is_lossy & ~failed,
        )

    def _cut(
        self, document: int, place: tuple[int, int], run_encoder: RunEncoder
    ) -> list[list[int]] | None:
        """The ids of the pieces of a group; place: (layout in the document, group in that)."""
        chat = self._layouts[document]
        number, group_number = place
        layout = chat.layouts[int(chat.numbers[number])]
        contents = self._contents[document][chat.first_messages[number] :]
        group = layout.groups[group_number]
        return run_encoder.encode_cut(
            [fill_text(make_fill(piece), contents) for piece in group.pieces],
            edges_to_left(layout.modes, layout.masked_ends, group.segments),
            goes_on=group.goes_on,
        )

    def _none(self) -> NDArray[np.bool_]:
        return np.zeros(len(self), dtype=np.bool_)


def _are_heads(
    source: NDArray[np.int32], heads: NDArray[np.int64], wholes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether each head is how its whole begins; both (n, 2), of (start, stop) in `source`."""
    lengths = heads[:, 1] - heads[:, 0]
    are_heads = lengths <= wholes[:, 1] - wholes[:, 0]
    starts, lengths = heads[are_heads, 0], lengths[are_heads]
    differs = (
        source[ragged_positions(starts, lengths)]
        != source[ragged_positions(wholes[are_heads, 0], lengths)]
    )
    number = np.repeat(np.flatnonzero(are_heads), lengths)
    are_heads[number[differs]] = False
    return are_heads


def _restore_begins(modes: NDArray[np.int8], is_filled: NDArray[np.bool_]) -> None:
    """A turn whose first segment came out empty begins with its next one."""
    kinds = modes & KIND_MASK
    for segment in np.flatnonzero(~is_filled & (kinds == TARGET_BEGIN)).tolist():
        following = segment + 1
        while following < len(modes) and (not is_filled[following] or kinds[following] == CONTEXT):
            following += 1
        if following < len(modes) and kinds[following] == TARGET_CONTINUE:
            modes[following] += TARGET_BEGIN - TARGET_CONTINUE
