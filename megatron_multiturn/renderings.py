"""One rendering by a chat template: its text and where its blocks lie, or why there is none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jinja2

from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.sandbox import (
    GENERATION_CLOSE,
    GENERATION_OPEN,
    ChatSandbox,
    TemplateRefusalError,
)
from megatron_multiturn.turn_spans import Span

_MARKS = re.compile(f"([{GENERATION_OPEN}{GENERATION_CLOSE}])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A rendered text and its `{% generation %}` blocks."""

    text: str
    blocks: list[Span]


def render_checked(
    sandbox: ChatSandbox,
    variables: Mapping[str, Any],
    prompt: bool,
    location: str,
    *,
    strict: bool = False,
) -> str | None:
    """The rendering, its generation blocks marked; SessionError, or None, if it fails.

    Raises ConfigError for a template that reaches for what it must not, and MemoryError.
    """
    try:
        return sandbox.render({"documents": None, **variables, "add_generation_prompt": prompt})
    except jinja2.exceptions.SecurityError as error:
        raise ConfigError(f"the chat template was stopped: {error}; use another one") from None
    except MemoryError:
        raise
    except Exception as error:  # a template can raise of every kind
        if not strict:
            return None
        refused = isinstance(error, TemplateRefusalError)
        what = "refuses" if refused else "fails on"
        reason = str(error).strip() or type(error).__name__
        raise SessionError(
            f"{location}: the chat template {what} the session: {' '.join(reason.split())[:300]}; "
            "correct the session, or leave it out",
            reason="template-refused" if refused else "template-failed",
        ) from None


def without_marks(raw: str) -> Rendering:
    """Take the marks of blocks out; a block in a block is part of it."""
    if GENERATION_OPEN not in raw:
        return Rendering(text=raw, blocks=[])
    pieces = _MARKS.split(raw)
    blocks: list[Span] = []
    length = depth = start = 0
    for piece, mark in pairwise([*pieces, ""]):
        if piece in (GENERATION_OPEN, GENERATION_CLOSE):
            continue
        length += len(piece)
        if mark == GENERATION_OPEN:
            start = length if depth == 0 else start
            depth += 1
        elif mark == GENERATION_CLOSE:
            depth -= 1
            if depth == 0 and start < length:
                blocks.append((start, length))
    return Rendering(text="".join(pieces[::2]), blocks=blocks)
