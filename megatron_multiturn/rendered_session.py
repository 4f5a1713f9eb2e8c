"""All renderings of one session by a Jinja template: up to each message, asked and not.

What lies where is told by comparison only: two renderings of which one begins the other, or two
that are equal but for characters that were put in place of some of the session's.
"""

import functools
import itertools
import re
from typing import Any

from megatron_multiturn.control_tokens import ControlLiterals
from megatron_multiturn.errors import SessionError
from megatron_multiturn.renderings import Rendering, render_checked, without_marks
from megatron_multiturn.sandbox import (
    MESSAGE_END,
    ChatSandbox,
)
from megatron_multiturn.sessions import Session
from megatron_multiturn.template_input import (
    STAND_IN,
    Replace,
    is_answer_entry,
    keys_in,
    map_texts,
    message_variables,
    stand_in,
    texts_in,
)
from megatron_multiturn.turn_spans import Span

_RESERVED = re.compile("[\ufdd0-\ufdd3]")


class RenderedSession:
    """The renderings of a session, each made once, when it is asked for."""

    def __init__(
        self,
        session: Session,
        sandbox: ChatSandbox,
        *,
        variables: dict[str, Any],
        literals: ControlLiterals,
        special_literals: ControlLiterals,
    ) -> None:
        """Raises SessionError for text with noncharacters that are used here.

        literals: of all control tokens; special_literals: of those that an answer never holds.
        """
        self.location = session.location
        self._session = session
        self._sandbox = sandbox
        self._literals = literals
        self._special_literals = special_literals
        self.variables = variables | dict(session.template_variables)
        self._messages = [message_variables(message) for message in session.messages]
        self._tools = list(session.tools)
        self._made: dict[tuple[int, bool], Rendering] = {}
        given = [self._messages, self._tools, self.variables_given()]
        calls = [message["tool_calls"] for message in self._messages if "tool_calls" in message]
        keys = set(keys_in([calls, *given[1:]]))  # the other keys are our own
        texts = texts_in(given)
        if _RESERVED.search("\n".join((*keys, *(text for text, _ in texts)))):
            raise SessionError(
                f"{self.location}: the text holds one of the noncharacters U+FDD0 to U+FDD3, "
                "which no text should; remove it",
                reason="noncharacter",
            )
        for key in sorted(keys):
            if literals.find(key):
                raise SessionError(
                    f"{self.location}: a key of a tool, its arguments or a template variable "
                    f"spells a control token: {key[:60]!r}; rename it",
                    reason="control-token-in-key",
                )
        self._is_risky = any(self._risky_spans(text, own) for text, own in texts)

    @property
    def num_messages(self) -> int:
        return len(self._messages)

    @property
    def trained_answers(self) -> list[int]:
        """The numbers of the messages that are turns."""
        return [
            number
            for number, message in enumerate(self._session.messages)
            if message.is_answer
            and (not message.content or any(trained for _, trained in message.runs()))
        ]

    def variables_given(self) -> dict[str, Any]:
        """The session's own variables."""
        return dict(self._session.template_variables)

    def weight_of(self, answer: int) -> float:
        """What the turn of an answer weighs."""
        return self._session.messages[answer].weight

    def upto(self, count: int) -> Rendering:
        """The rendering of the first `count` messages."""
        return self._rendering(count, prompt=False)

    def opening(self, answer: int) -> str:
        """The rendering of all messages before an answer, and what asks for the answer."""
        return self._rendering(answer, prompt=True).text

    def num_blocks_before(self, answer: int) -> int:
        """How many blocks the rendering of all messages before an answer has."""
        before = [
            number
            for number, message in enumerate(self._session.messages[:answer])
            if message.role == "assistant"
        ]
        return len(self.upto(before[-1] + 1).blocks) if before else 0

    def message_starts(self, count: int) -> tuple[list[int], int]:
        """(where messages begin, where leading system messages end) in `upto(count)`.

        Known are the first message and those that follow an answer.
        """
        text = self.upto(count).text
        starts = []
        leading = 0
        for number, message in enumerate(self._session.messages[: count - 1], start=1):
            if message.role == "assistant":
                head = self.upto(number).text
                if text.startswith(head):
                    starts.append(len(head))
            elif message.role == "system" and leading == number - 1:
                leading = number
        stop = 0
        if leading:
            try:
                head = self.upto(leading).text
            except SessionError:  # it cannot write a system message alone
                head = ""
            stop = len(head) if text.startswith(head) else 0
        return [0, *([stop] if stop else []), *starts], stop

    def guarded(self, count: int) -> str:
        """`upto(count)` with other characters where the session spells control tokens."""
        text = self.upto(count).text
        if not self._is_risky:
            return text

        def replace(part: str, own: bool) -> str:
            return stand_in(part, self._risky_spans(part, own))

        return self._replaced(count, replace, "a control token that it spells")

    def masked_spans(self, answer: int, count: int) -> list[Span]:
        """Where what is masked of an answer lies in `upto(count)`."""
        message = self._session.messages[answer]
        text = self.upto(count).text
        found = []
        for start, stop in message.masked:
            wanted = message.content[start:stop]
            size = sum(not character.isspace() for character in wanted)
            if not size:
                raise SessionError(
                    f"{self.location}: message {answer + 1}: what is masked at {start} is only "
                    "white space, which cannot be found in what a template writes; unmask it",
                    reason="masked-span",
                )
            replaced = self._masked_replaced(answer, (start, stop), count)
            positions = [i for i, character in enumerate(replaced) if character == STAND_IN]
            if len(positions) != size:
                raise SessionError(
                    f"{self.location}: message {answer + 1}: what is masked, {wanted[:40]!r}, is "
                    "left out or repeated by the template; unmask it",
                    reason="masked-span",
                )
            found.append(_with_spaces(text, (positions[0], positions[-1] + 1), wanted))
        return found

    def _masked_replaced(self, answer: int, span: Span, count: int) -> str:
        content = self._messages[answer]["content"]
        messages = list(self._messages)
        messages[answer] = messages[answer] | {"content": stand_in(content, [span])}
        return self._compared(count, messages, self._tools, {}, "what is masked in it")

    def _replaced(self, count: int, replace: Replace, what: str) -> str:
        messages = [
            map_texts(message, replace, is_answer_entry(message)) for message in self._messages
        ]
        tools = map_texts(self._tools, replace, False)
        variables = map_texts(self.variables_given(), replace, False)
        return self._compared(count, messages, tools, variables, what)

    def _compared(
        self,
        count: int,
        messages: list[dict[str, Any]],
        tools: list[Any],
        variables: dict[str, Any],
        what: str,
    ) -> str:
        """`upto(count)` with stand-ins; SessionError if anything else is written otherwise."""
        text = self.upto(count).text
        replaced = self._render(messages[:count], tools, variables, prompt=False).text
        if len(text) == len(replaced):
            pairs = zip(text, replaced, strict=True)
            if all(new in (old, STAND_IN) for old, new in pairs):
                return replaced
        raise SessionError(
            f"{self.location}: the template acts on {what}, so it cannot be told from the "
            "template's own text; remove it from the session",
            reason="template-acts-on-text",
        )

    def _risky_spans(self, text: str, own: bool) -> list[Span]:
        return (self._special_literals if own else self._literals).risky_spans(text)

    def _rendering(self, count: int, *, prompt: bool) -> Rendering:
        key = (count, prompt)
        if key not in self._made:
            self._made[key] = self._head(count, prompt=prompt) or self._render(
                self._messages[:count], self._tools, {}, prompt=prompt
            )
        return self._made[key]

    def _head(self, count: int, *, prompt: bool) -> Rendering | None:
        """A rendering of the first messages, out of that of all, where `append_only` proves it."""
        if not count or self._heads is None:
            return None
        if not prompt:
            return without_marks(self._heads[count])
        if self._asking is None:
            return None
        return Rendering(text=self.upto(count).text + self._asking, blocks=[])

    @functools.cached_property
    def _heads(self) -> list[str] | None:
        """Up to each message, with marks of blocks; None if the template may not only append."""
        if not self._sandbox.marks_messages:
            return None
        pieces = self._raw(self._messages, prompt=False).split(MESSAGE_END)
        if len(pieces) != self.num_messages + 1 or pieces[-1]:
            return None
        return list(itertools.accumulate(pieces[:-1], initial=""))

    @functools.cached_property
    def _asking(self) -> str | None:
        """What asks for an answer, the same behind any message; None if that is not sure."""
        *pieces, asking = self._raw(self._messages, prompt=True).split(MESSAGE_END)
        is_same = list(itertools.accumulate(pieces, initial="")) == self._heads
        return without_marks(asking).text if is_same else None

    def _raw(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        given = self.variables | {"messages": messages, "tools": self._tools or None}
        raw = render_checked(self._sandbox, given, prompt, self.location, strict=True)
        assert raw is not None
        return raw

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any],
        variables: dict[str, Any],
        *,
        prompt: bool,
    ) -> Rendering:
        given = self.variables | variables | {"messages": messages, "tools": tools or None}
        raw = render_checked(self._sandbox, given, prompt, self.location, strict=True)
        assert raw is not None
        return without_marks(raw.replace(MESSAGE_END, ""))


def _with_spaces(text: str, span: Span, wanted: str) -> Span:
    """The span and the white space around it, as far as it is that of the wanted text."""
    start, stop = span
    for character in reversed(wanted[: len(wanted) - len(wanted.lstrip())]):
        if start == 0 or text[start - 1] != character:
            break
        start -= 1
    for character in wanted[len(wanted.rstrip()) :]:
        if stop == len(text) or text[stop] != character:
            break
        stop += 1
    return start, stop
