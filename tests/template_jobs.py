"""Chat templates and what becomes of sessions in them, for the tests of templates."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_multiturn.encoding import EncodedSession, SessionEncoder
from megatron_multiturn.jinja_templates import JinjaOptions, JinjaTemplate
from megatron_multiturn.messages import Message
from megatron_multiturn.modes import is_target
from megatron_multiturn.sessions import Session
from megatron_multiturn.template_input import message_variables
from megatron_multiturn.templates import ChatTemplate
from megatron_multiturn.vocabulary import Vocabulary

NOW = datetime.now()  # as transformers tells templates

# chatml with tools, names, reasoning and calls; GENERATION and END stand for the markers.
_FULL = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool|tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- if note is defined %}<|im_start|>system
{{ note }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}
{% set body %}
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }} {{ call.function.arguments|tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endset %}
{% if m.role == 'assistant' %}GENERATION{{ body }}END{% else %}{{ body }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
UNMARKED = _FULL.replace("GENERATION", "").replace("END", "")
MARKED = _FULL.replace("GENERATION", "{% generation %}").replace("END", "{% endgeneration %}")


def jinja_template(
    source: str,
    vocabulary: Vocabulary,
    *,
    history_rewriting: Literal["expand", "last", "error"] = "expand",
    markers: Literal["answer", "verbatim"] = "answer",
    name: str = "made.jinja",
    named_tokens: dict[str, str] | None = None,
    **variables: Any,
) -> JinjaTemplate:
    return JinjaTemplate(
        source,
        name=name,
        control_tokens=vocabulary.control_tokens(),
        named_tokens=vocabulary.named_tokens() | (named_tokens or {}),
        options=JinjaOptions(
            history_rewriting=history_rewriting, markers=markers, variables=variables, now=NOW
        ),
    )


def family_template(
    folder: Path, name: str, vocabulary: Vocabulary, **options: Any
) -> JinjaTemplate:
    """One of shared/tokenizers/chat_templates, with the tokens that Qwen's vocabulary has."""
    key = (name, id(vocabulary), repr(options))
    if key not in _families:
        _families[key] = _read_family(folder, name, vocabulary, options)
    return _families[key]


_families: dict[tuple[str, int, str], JinjaTemplate] = {}


def _read_family(
    folder: Path, name: str, vocabulary: Vocabulary, options: dict[str, Any]
) -> JinjaTemplate:
    source = (folder / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokens = {"bos_token": "", "eos_token": "<|im_end|>"}
    return jinja_template(source, vocabulary, name=name, named_tokens=tokens, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A document as ids, with the mask over them."""

    ids: list[int]
    mask: list[int]  # 1 where the token is a target
    modes: list[int]  # of the segments
    pieces: list[list[int]]  # the ids of each segment


def encode_all(template: ChatTemplate, vocabulary: Vocabulary, session: Session) -> list[Encoded]:
    """The documents of a session; raises its SessionError."""
    key = (id(template), id(vocabulary))
    if key not in _encoders:  # which keep both alive
        _encoders[key] = SessionEncoder(template, vocabulary)
    batch = _encoders[key].encode([session])
    for _, error in batch.errors:
        raise error
    return [_encoded(batch.session(index)) for index in range(batch.num_sessions)]


_encoders: dict[tuple[int, int], SessionEncoder] = {}


def _encoded(one: EncodedSession) -> Encoded:
    ends = np.cumsum(one.segment_lengths)
    return Encoded(
        ids=one.tokens.tolist(),
        mask=np.repeat(is_target(one.modes), one.segment_lengths).astype(int).tolist(),
        modes=one.modes.tolist(),
        pieces=[piece.tolist() for piece in np.split(one.tokens, ends[:-1])],
    )


def chat(*messages: tuple[str, str] | Message, **fields: Any) -> Session:
    """A session of messages, or (role, content)."""
    made = [
        one if isinstance(one, Message) else Message(role=one[0], content=one[1])
        for one in messages
    ]
    return Session(messages=tuple(made), location="x.jsonl:1", **fields)


def as_messages(session: Session, count: int | None = None) -> list[dict[str, Any]]:
    """The first `count` messages as transformers takes them."""
    return [message_variables(message) for message in session.messages[:count]]


def count_of(ids: Sequence[int], wanted: set[int]) -> int:
    return sum(one in wanted for one in ids)
