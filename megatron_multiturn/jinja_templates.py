"""Hugging Face's chat templates: the text is the template's own, the turns are found in it.

Turns come from `{% generation %}` blocks where the template has them; a block that begins within
what the generation prompt writes is cut there, because that is given to the model (unless
`markers` is "verbatim"). Otherwise an answer is the difference between the rendering of the
messages before it, with the generation prompt, and the rendering that ends with it.

Both only hold if the rendering up to each answer is the head of the whole one. Where it is not,
the template rewrites history: at a later turn the model sees an earlier one otherwise than it
was written. `history_rewriting` says what becomes of such a session.

A control token is one only where the template writes it. Where a message spells one, the session
is rendered once more with other characters in its place, which shows where they came to lie.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import jinja2

from megatron_multiturn.containment import TemplateLimitError, bounded, bounded_session
from megatron_multiturn.control_tokens import ControlLiterals, ControlToken
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.rendered_session import RenderedSession
from megatron_multiturn.renderings import render_checked
from megatron_multiturn.sandbox import ChatSandbox
from megatron_multiturn.sessions import Message, Session
from megatron_multiturn.templates import (
    Document,
    Segment,
    Special,
    Unit,
    UnitKey,
    render_plain,
)
from megatron_multiturn.turn_spans import RenderedText, Span, cut_segments, is_closed, subtract

HISTORY_REWRITING = ("expand", "last", "error")
MARKERS = ("answer", "verbatim")
_MAX_CACHED_PROMPTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class JinjaOptions:
    """How a chat template is used."""

    history_rewriting: Literal["expand", "last", "error"] = "expand"
    markers: Literal["answer", "verbatim"] = "answer"
    variables: Mapping[str, Any] = field(default_factory=dict)  # a session's own go before them
    now: datetime  # what `strftime_now` says


class JinjaTemplate:
    """A chat template, as `apply_chat_template` would render it."""

    opens_with_bos = False  # it writes a BOS itself
    strips = False
    trains_any_role = False

    def __init__(
        self,
        source: str,
        *,
        name: str,
        control_tokens: Sequence[ControlToken],
        named_tokens: Mapping[str, str],
        options: JinjaOptions,
    ) -> None:
        """Compile the template.

        control_tokens: all of the tokenizer; named_tokens: its `bos_token` and the like.
        Raises ConfigError for a template that Jinja cannot read.
        """
        self.name = name
        self._options = options
        try:
            self._sandbox = ChatSandbox(source, now=options.now)
        except (jinja2.TemplateError, RecursionError, TemplateLimitError) as error:
            line = getattr(error, "lineno", None)
            raise ConfigError(
                f"--chat-template {name}{f':{line}' if line else ''}: Jinja cannot read the "
                f"template: {getattr(error, 'message', None) or error}; correct it"
            ) from None
        self._source = source
        self._named_tokens = dict(named_tokens)
        tokens = [
            token
            for token in control_tokens
            if token.literal.strip()
            and (token.special or token.literal in self._sandbox.literal_text)
        ]
        self.specials = tuple(Special(token=token.literal) for token in tokens)
        self._literals = ControlLiterals(tokens)
        self._special_literals = ControlLiterals([token for token in tokens if token.special])
        self._prompts: dict[str, str] = {}

    @property
    def content_hash(self) -> str:
        """A hash of the template's text and of all that it depends on besides the session."""
        options = self._options
        parts = [self._source, options.history_rewriting, options.markers]
        parts += [json.dumps(dict(options.variables), sort_keys=True), repr(self._named_tokens)]
        if "strftime_now" in self._source:
            parts.append(options.now.isoformat())
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def batch(self) -> AbstractContextManager[None]:
        return bounded()

    def units(self, roles: Sequence[str], answers: Sequence[bool]) -> list[Unit] | None:
        return None

    def write_unit(self, key: UnitKey, messages: Sequence[Message]) -> list[Segment]:
        raise AssertionError("a chat template has no units")

    def documents(self, session: Session) -> list[Document]:
        if session.plain:
            return [Document(segments=render_plain(session))]
        rendered = RenderedSession(
            session,
            self._sandbox,
            variables=self._named_tokens | dict(self._options.variables),
            literals=self._literals,
            special_literals=self._special_literals,
        )
        try:
            with bounded_session():
                return self._documents(rendered)
        except TemplateLimitError as error:
            raise SessionError(
                f"{session.location}: template {self.name} was stopped, as {error}; correct the "
                "template, or leave the session out",
                reason="template-limit",
            ) from None

    def _documents(self, rendered: RenderedSession) -> list[Document]:
        trained = rendered.trained_answers
        whole = rendered.upto(rendered.num_messages).text
        spans = {answer: self._answer_spans(rendered, answer) for answer in trained}
        if all(self._is_kept(rendered, answer, whole) for answer in trained):
            return [self._document(rendered, rendered.num_messages, spans, rewritten=False)]
        choice = self._options.history_rewriting
        if choice == "error":
            bad = next(a for a in trained if not self._is_kept(rendered, a, whole))
            raise SessionError(
                f"{rendered.location}: template {self.name} rewrites message {bad + 1} when later "
                "messages follow; pass --history-rewriting expand, for a document an answer, or "
                "last, to train on the last answer only",
                reason="history-rewritten",
            )
        chosen = trained[-1:] if choice == "last" else trained
        return [
            self._document(rendered, answer + 1, {answer: spans[answer]}, rewritten=True)
            for answer in chosen
        ]

    def _is_kept(self, rendered: RenderedSession, answer: int, whole: str) -> bool:
        return whole.startswith(rendered.upto(answer + 1).text)

    def _answer_spans(self, rendered: RenderedSession, answer: int) -> list[Span]:
        """Where the answer lies in the rendering that ends with it."""
        upto = rendered.upto(answer + 1)
        where = f"{rendered.location}: message {answer + 1}"
        if not self._sandbox.has_markers:
            opening = self._opening(rendered, answer)
            if opening is None or len(opening) == len(upto.text):
                raise SessionError(
                    f"{where}: template {self.name} does not write the answer behind what it "
                    "writes to ask for one (add_generation_prompt), so the answer cannot be told "
                    "from the text before it; mark answers in the template with "
                    "{% generation %} ... {% endgeneration %}",
                    reason="no-turn-span",
                )
            return [(len(opening), len(upto.text))]
        blocks = upto.blocks[rendered.num_blocks_before(answer) :]
        if not blocks:
            raise SessionError(
                f"{where}: template {self.name} puts no {{% generation %}} block around this "
                "answer, though it has such blocks; correct the template",
                reason="no-turn-span",
            )
        if self._options.markers == "verbatim":
            return blocks
        start, stop = blocks[0]
        start += _overlap(self._prompt(rendered), upto.text, start, stop)
        return [span for span in ((start, stop), *blocks[1:]) if span[0] < span[1]] or blocks

    def _opening(self, rendered: RenderedSession, answer: int) -> str | None:
        """The text before an answer; None if it is not what asks for the answer."""
        try:
            opening = rendered.opening(answer)
        except SessionError:
            if answer:
                raise
            return None  # many templates need a message before the answer
        return opening if rendered.upto(answer + 1).text.startswith(opening) else None

    def _prompt(self, rendered: RenderedSession) -> str:
        """What asks for an answer, by these variables; "" if the template has no such thing."""
        key = json.dumps(rendered.variables, sort_keys=True, default=str)
        if key not in self._prompts:
            if len(self._prompts) >= _MAX_CACHED_PROMPTS:
                self._prompts.clear()
            question = {"messages": [{"role": "user", "content": "q"}], "tools": None}
            asked, silent = (
                render_checked(self._sandbox, rendered.variables | question, prompt, "a probe")
                for prompt in (True, False)
            )
            found = asked is not None and silent is not None and asked.startswith(silent)
            self._prompts[key] = asked[len(silent) :] if found and asked and silent else ""
        return self._prompts[key]

    def _document(
        self,
        rendered: RenderedSession,
        num_messages: int,
        spans: dict[int, list[Span]],
        *,
        rewritten: bool,
    ) -> Document:
        text = rendered.upto(num_messages).text
        tokens = self._literals.find(rendered.guarded(num_messages))
        starts, leading_stop = rendered.message_starts(num_messages)
        if not leading_stop and tokens and tokens[0][0] == 0:
            _, stop, token = tokens[0]
            if token.literal == self._named_tokens.get("bos_token"):
                leading_stop, starts = stop, [stop, *starts]
                starts.remove(0)
        gaps = {answer: rendered.masked_spans(answer, num_messages) for answer in spans}
        turns = [subtract(spans[answer], gaps[answer]) for answer in spans]
        found = RenderedText(
            text=text,
            tokens=tokens,
            turns=[turn for turn in turns if turn],
            turn_weights=[
                rendered.weight_of(answer)
                for answer, turn in zip(spans, turns, strict=True)
                if turn
            ],
            gaps=[gap for of_answer in gaps.values() for gap in of_answer],
            message_starts=starts,
            leading_stop=leading_stop,
        )
        num_open = sum(
            not is_closed(found, spans[answer])
            for answer, turn in zip(spans, turns, strict=True)
            if turn and turn[-1][1] == spans[answer][-1][1]
        )
        return Document(
            segments=cut_segments(found), num_open_turns=num_open, history_rewritten=rewritten
        )


def _overlap(prompt: str, text: str, start: int, stop: int) -> int:
    """How much of text[start:stop] is the end of a prompt that stands across `start`.

    4 for the prompt "<a>\\n<b>" and a block that begins at the line's end.
    """
    for size in range(min(len(prompt), stop - start), 0, -1):
        begin = start + size - len(prompt)
        if begin >= 0 and text.startswith(prompt, begin):
            return size
    return 0
