"""Texts -> ids, alike to the whole text that they are pieces of."""

from collections.abc import Sequence
from itertools import pairwise

from megatron_multiturn.vocabulary import Vocabulary

TextRun = tuple[str, bool]  # the text, and whether it goes on in the middle of a text

# Texts that a tokenizer hardly joins with what follows, to be encoded first and cut off again.
_GUARDS = ("\n", "\u2603", "|")


class RunEncoder:
    """Encodes runs that begin a text and runs that go on in one alike to the whole text.

    SentencePiece puts a space before every text. A run that goes on in the middle of a text must
    not get it, so it is encoded behind a guard, which is cut off again.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._guard = ""
        self._guard_ids: list[int] = []
        for guard in _GUARDS:
            alone, joined, free = vocabulary.encode([guard, guard + "a", "a"])
            if alone and joined[: len(alone)] == alone:
                if joined[len(alone) :] != free:
                    self._guard, self._guard_ids = guard, alone
                return

    def encode(self, runs: Sequence[TextRun]) -> list[list[int]]:
        """The ids of each run."""
        encoded = self._vocabulary.encode([self._guarded(run) for run in runs])
        head = len(self._guard_ids)
        if not head:
            return encoded
        for index, (text, goes_on) in enumerate(runs):
            if not goes_on:
                continue
            if encoded[index][:head] == self._guard_ids:
                encoded[index] = encoded[index][head:]
            else:  # joined with the guard after all
                (encoded[index],) = self._vocabulary.encode([text])
        return encoded

    def encode_cut(self, run: TextRun, edges: Sequence[tuple[int, bool]]) -> list[list[int]] | None:
        """The ids of a run as a whole, cut at its edges; None where ends of tokens are unknown.

        edges: (position in characters, whether a token that lies across it belongs to what
        stands before it), in order. One list more than there are edges.
        """
        text = self._guarded(run)
        found = self._vocabulary.encode_with_ends(text)
        if found is None or found[0] != self._vocabulary.encode([text])[0]:
            return None
        ids, ends = found
        head = len(text) - len(run[0])
        if ids[: len(self._guard_ids)] == self._guard_ids and head:
            ids, ends = ids[len(self._guard_ids) :], ends[len(self._guard_ids) :]
        cuts = [0]
        for position, is_left in edges:
            cut = sum(end <= position + head for end in ends)
            across = cut < len(ids) and (ends[cut - 1] if cut else head) < position + head
            cuts.append(max(cuts[-1], cut + (across and is_left)))
        return [ids[start:stop] for start, stop in pairwise([*cuts, len(ids)])]

    def find_lossy(self, runs: Sequence[TextRun], encoded: Sequence[list[int]]) -> set[int]:
        """The numbers of the runs that do not decode to their text.

        encoded: the ids of each run, from `encode`.
        """
        decoded = self._vocabulary.decode(
            [
                self._guard_ids + ids if goes_on and self._guard_ids else ids
                for (_, goes_on), ids in zip(runs, encoded, strict=True)
            ]
        )
        return {
            index
            for index, (run, text) in enumerate(zip(runs, decoded, strict=True))
            if self._guarded(run) != text
        }

    def _guarded(self, run: TextRun) -> str:
        text, goes_on = run
        return self._guard + text if goes_on else text
