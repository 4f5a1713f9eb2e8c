"""--prompt-variants: one of several phrasings for questions that are a bare term.

Knowledge comes as term and explanation; a model that has only seen the bare term does not know
it in a question. The phrasing is drawn by the session's own text and the seed, so that it is the
same in any order of the input, in any shard.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_multiturn.errors import ConfigError

PLACE = "{query}"

_MAX_TERM_CHARACTERS = 64
_ENDS_OF_SENTENCES = "?？!！。；;\n\r"
_ENDS_OF_TEXTS = (*_ENDS_OF_SENTENCES, ".", ":", "：", ",", "，", "…")


def read_phrasings(path: str) -> tuple[str, ...]:
    """The phrasings in a file: one a line, or one JSON list of texts.

    Raises ConfigError if it cannot be read or a phrasing does not say where the term goes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-variants {path}: cannot be read ({error})") from None
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--prompt-variants {path}: not JSON ({error})") from None
    else:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"--prompt-variants {path}: holds no phrasing; write one a line")
    for phrasing in found:
        if not isinstance(phrasing, str) or phrasing.count(PLACE) != 1:
            raise ConfigError(
                f"--prompt-variants {path}: {json.dumps(phrasing, ensure_ascii=False)} must be a "
                f"text with {PLACE} in it once, where the term goes"
            )
    return tuple(found)


def is_bare_term(query: str) -> bool:
    """Whether a question is only the name of something: short, one line, no sentence.

    True for "光合作用" and "Node.js", not for "什么是光合作用?".
    """
    term = query.strip()
    return (
        0 < len(term) <= _MAX_TERM_CHARACTERS
        and not term.endswith(_ENDS_OF_TEXTS)
        and not any(character in _ENDS_OF_SENTENCES for character in term)
    )


class PromptVariants:
    """Draws phrasings."""

    def __init__(self, phrasings: Sequence[str], seed: int) -> None:
        self._phrasings = tuple(phrasings)
        self._seed = seed

    def phrase(self, query: str, texts: Sequence[str]) -> str:
        """The query in a phrasing if it is a bare term; as it is otherwise.

        texts: of the whole session, which decide the draw.
        """
        if not is_bare_term(query):
            return query
        key = "\0".join([str(self._seed), *texts]).encode("utf-8", "surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return self._phrasings[drawn % len(self._phrasings)].replace(PLACE, query.strip())
