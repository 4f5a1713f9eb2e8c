"""Texts -> ids, alike to the whole text that they are pieces of."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from megatron_multiturn.vocabulary import Vocabulary

# Texts that a tokenizer hardly joins with what follows, to be encoded first and cut off again.
_GUARDS = ("\n", "\u2603", "|")
_MAX_CACHED_CONSTANTS = 4096


class RunEncoder:
    """Encodes texts that begin one and texts that go on in one alike to the whole text.

    SentencePiece puts a space before every text. Text that goes on in the middle of another must
    not get it, so it is encoded behind a guard, which is cut off again.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._constants: dict[str, list[int]] = {}
        guards = list(self._usable_guards())
        self.guard = guards[0] if guards else ""  # before text that goes on
        self._guards = guards or [""]

    def encode_constant(self, text: str) -> list[int]:
        """The ids of a text that comes up time and again."""
        if text not in self._constants:
            if len(self._constants) >= _MAX_CACHED_CONSTANTS:
                self._constants.clear()
            (self._constants[text],) = self._vocabulary.encode([text])
        return self._constants[text]

    def encode_head(self, before: str, after: str, *, is_left: bool) -> list[int]:
        """The ids before an edge that text `before` and `after` and unknown text stand around.

        A token that lies across the edge is among them if `is_left`.
        """
        head, whole = self.encode_constant(before), self.encode_constant(before + after)
        if whole[: len(head)] == head:
            return head
        ends = self._ends(before + after, whole)
        return head if ends is None else whole[: _cut_at(ends, len(before), is_left)]

    def encode_pieces(self, pieces: Sequence[str], *, goes_on: bool) -> list[list[int]] | None:
        """The ids of a text, cut where its pieces end; None if a token lies across an edge."""
        guard = self.guard if goes_on else ""
        ids = self.encode_constant(guard + "".join(pieces))
        cuts = []
        for count in range(len(pieces)):
            head = self.encode_constant(guard + "".join(pieces[:count]))
            if ids[: len(head)] != head:
                return None
            cuts.append(len(head))
        return [ids[start:stop] for start, stop in pairwise([*cuts, len(ids)])]

    def encode_cut(
        self, pieces: Sequence[str], is_left: Sequence[bool], *, goes_on: bool
    ) -> list[list[int]] | None:
        """The ids of a text, cut where its pieces end; None where ends of tokens are unknown.

        is_left: for each edge between two pieces, whether a token that lies across it belongs to
        what stands before it.
        """
        text = "".join(pieces)
        guard, guard_ids, ids = self._encode_behind_guard(text) if goes_on else ("", [], None)
        if ids is None:
            (ids,) = self._vocabulary.encode([guard + text])
        cuts = [len(guard_ids)]
        ends = None if len(pieces) == 1 else self._ends(guard + text, ids)
        if ends is None and len(pieces) > 1:
            return None
        position = len(guard)
        for piece, left in zip(pieces, is_left, strict=False):
            assert ends is not None
            position += len(piece)
            cuts.append(max(cuts[-1], _cut_at(ends, position, left)))
        return [ids[start:stop] for start, stop in pairwise([*cuts, len(ids)])]

    def _encode_behind_guard(self, text: str) -> tuple[str, list[int], list[int] | None]:
        """(guard, its ids, all ids) for a guard that does not join with the text."""
        for guard in self._guards:
            guard_ids = self.encode_constant(guard) if guard else []
            (ids,) = self._vocabulary.encode([guard + text])
            if ids[: len(guard_ids)] == guard_ids:
                return guard, guard_ids, ids
        return "", [], None

    def _ends(self, text: str, ids: list[int]) -> list[int] | None:
        """Behind which character each token ends, if the tokenizer knows it of these very ids."""
        found = self._vocabulary.encode_with_ends(text)
        return found[1] if found is not None and found[0] == ids else None

    def _usable_guards(self) -> Iterator[str]:
        for guard in _GUARDS:
            alone, joined, free = self._vocabulary.encode([guard, guard + "a", "a"])
            if alone and joined[: len(alone)] == alone and joined[len(alone) :] != free:
                yield guard


def _cut_at(ends: Sequence[int], position: int, is_left: bool) -> int:
    """How many tokens stand before a position; one across it does if `is_left`."""
    cut = sum(end <= position for end in ends)
    is_across = cut < len(ends) and (ends[cut - 1] if cut else 0) < position
    return cut + (is_across and is_left)
