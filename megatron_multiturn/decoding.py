"""Token ids -> text for people to read.

A character can be spread over several tokens, and a SentencePiece token can begin with a space
that is only right in the middle of a text. So runs are never decoded alone: all text between two
special tokens is decoded at once, and each run gets its share of it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from megatron_multiturn.vocabulary import Vocabulary, open_vocabulary

# What a decoder writes for bytes that are no whole character (yet).
_BROKEN = "\ufffd"


class RunDecoder:
    """Decodes the runs of a piece; special tokens come out as they are written."""

    def __init__(self, vocabulary: Vocabulary, special_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._special_ids = special_ids

    def decode_runs(self, ids: Sequence[int], boundaries: Sequence[int]) -> list[str]:
        """The text of ids[boundaries[r]:boundaries[r + 1]] for each r.

        A character that is spread over two runs belongs to the one in which it ends.
        """
        texts = [""] * (len(boundaries) - 1)
        stretch: list[int] = []  # ids since the last special token
        shown = ""  # what of the stretch is in `texts` already
        for run, (begin, end) in enumerate(pairwise(boundaries)):
            for index in range(begin, end):
                if ids[index] in self._special_ids:
                    texts[run] += self._decode(stretch)[len(shown) :]
                    texts[run] += self._vocabulary.literal_of(ids[index])
                    stretch, shown = [], ""
                else:
                    stretch.append(ids[index])
            text = self._decode(stretch)
            if end < boundaries[-1] and ids[end] not in self._special_ids:
                text = text.rstrip(_BROKEN)
            texts[run] += text[len(shown) :]
            shown = max(text, shown, key=len)
        return texts

    def _decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode([ids])[0] if ids else ""


def open_decoder(tokenizer: Any) -> RunDecoder:
    """The decoder of one of Megatron's tokenizers; ConfigError for a kind not known here."""
    vocabulary = open_vocabulary(tokenizer)
    wrapper = getattr(tokenizer, "_tokenizer", tokenizer)
    below = wrapper.tokenizer
    if hasattr(below, "is_control"):
        special_ids = {index for index in range(below.vocab_size()) if below.is_control(index)}
        special_ids.update(wrapper.special_token_to_id.values())
    else:
        special_ids = set(below.added_tokens_decoder)
    return RunDecoder(vocabulary, frozenset(special_ids))
