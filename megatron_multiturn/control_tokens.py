"""Control tokens and where they are spelt: in a template's own text, or in a message's."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlToken:
    """A token that stands for no text: one of the tokenizer's special or added tokens."""

    literal: str
    special: bool  # never text; otherwise an added token, which an answer may hold
    strips_left: bool = False  # the tokenizer leaves out white space before it
    strips_right: bool = False  # likewise after it


def is_marked(literal: str) -> bool:
    """Whether an added token is written as control tokens are, `<|fim_prefix|>` say.

    Some vocabularies do not declare all of theirs special.
    """
    return re.fullmatch(r"<[|｜].+[|｜]>", literal) is not None


class ControlLiterals:
    """Finds the literals of control tokens in text, the longest first."""

    def __init__(self, tokens: Sequence[ControlToken]) -> None:
        """tokens: none with an empty literal."""
        self._by_literal = {token.literal: token for token in tokens}
        literals = sorted(self._by_literal, key=lambda literal: (-len(literal), literal))
        self._pattern = re.compile("|".join(map(re.escape, literals))) if literals else None
        self._longest = len(literals[0]) if literals else 0
        # Literals are apart here, so that only pieces of one are found.
        self._joined = "\n".join(literals)
        self._starts = tuple(
            {literal[:size] for literal in literals for size in range(1, len(literal))}
        )
        self._ends = tuple(
            {literal[size:] for literal in literals for size in range(1, len(literal))}
        )
        self._heads = sorted({literal[:2] for literal in literals})
        self._first_characters = frozenset(literal[0] for literal in literals)
        self._last_characters = frozenset(literal[-1] for literal in literals)

    def occur_in(self, text: str) -> bool:
        """Whether the text holds any; made for long texts that hold none."""
        return any(head in text for head in self._heads) and bool(self.find(text))

    def find(self, text: str) -> list[tuple[int, int, ControlToken]]:
        """(start, stop, token) of each literal, in order."""
        if self._pattern is None:
            return []
        return [
            (match.start(), match.end(), self._by_literal[match.group()])
            for match in self._pattern.finditer(text)
        ]

    def risky_spans(self, text: str) -> list[tuple[int, int]]:
        """Where the text spells a literal, or may be part of one together with its neighbours.

        The latter are a piece of a literal at the head or the end, white space aside.
        """
        spans = [(start, stop) for start, stop, _ in self.find(text)]
        stripped = text.strip()
        if not stripped or not self._longest:
            return spans
        first = len(text) - len(text.lstrip())
        last = first + len(stripped)
        if len(stripped) < self._longest and stripped in self._joined:
            return [(first, last)]
        head, tail = stripped[: self._longest], stripped[-self._longest :]
        if not self._last_characters.isdisjoint(head):
            size = max((len(end) for end in self._ends if head.startswith(end)), default=0)
            if size:
                spans.append((first, first + size))
        if not self._first_characters.isdisjoint(tail):
            size = max((len(start) for start in self._starts if tail.endswith(start)), default=0)
            if size:
                spans.append((last - size, last))
        return spans
