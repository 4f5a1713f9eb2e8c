"""Session -> segments: the only place that decides what is a target and which turn it is in.

A template writes a session as text runs and named special tokens. Special tokens are parts of
their own, so a user's text that spells `<|im_end|>` stays text. The built-in templates are in
`template_families.py`, Hugging Face's chat templates in `jinja_templates.py`.

Every answer that is trained on is a turn, with the token that closes it. A gap masked inside an
answer makes three segments of one turn: TARGET_BEGIN, CONTEXT, TARGET_CONTINUE. The closing token
is a target if the answer's last run is: where the end is masked, ending there is not learnt.

What opens a session, `<s>` say, is repeated, as a system message is, at the head of every window
of a long session. A `<s>` is left out if the vocabulary has none.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from megatron_multiturn.errors import SessionError
from megatron_multiturn.modes import CONTEXT, TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.sessions import Message, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """A part that is one token of the vocabulary."""

    token: str  # as it is written, "<|im_start|>", where role is "literal"
    role: Literal["literal", "bos", "eos"] = "literal"  # bos, eos: whatever the tokenizer has


Part = str | Special
MessageParts = list[tuple[Part, bool]]  # (part, trained) in order

# The ids are those of the tokenizer's own tokens, however it writes them.
BOS = Special(token="<s>", role="bos")
EOS = Special(token="</s>", role="eos")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of parts that is wholly context or wholly target, of one message."""

    kind: int  # modes.CONTEXT, TARGET_BEGIN or TARGET_CONTINUE
    parts: tuple[Part, ...]
    starts_message: bool = False  # context that begins a message: a window may open here
    leading_system: bool = False  # context that every window of a long session begins with
    weight: float = 1.0  # of the turn, if it is a target
    # Of context: whether it begins, and ends, with what is masked inside an answer.
    starts_masked: bool = False
    ends_masked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What is trained on as one: a session, or a part of one whose history is rewritten."""

    segments: tuple[Segment, ...]  # joined they are the whole rendering
    num_open_turns: int = (
        0  # whose end is text: nothing that is learnt says that the answer is over
    )
    history_rewritten: bool = False  # the session's later answers see earlier ones otherwise


# Consecutive messages whose segments depend on nothing but their contents and a key, which is
# hashable, and the template's own affair.
UnitKey = Any
Unit = tuple[UnitKey, int]  # (key, number of messages)


class ChatTemplate(Protocol):
    """What encoding needs of a template."""

    @property
    def name(self) -> str:
        """As in the manifest."""

    @property
    def specials(self) -> tuple[Special, ...]:
        """All that chats need; plain text has BOS and EOS besides."""

    @property
    def opens_with_bos(self) -> bool:
        """Whether it writes BOS first, if there is one."""

    @property
    def content_hash(self) -> str:
        """Equal for templates that write alike."""

    @property
    def trains_any_role(self) -> bool:
        """Whether it writes the messages of all roles alike, so that any can be trained on."""

    @property
    def strips(self) -> bool:
        """Whether it leaves out white space at the head and the end of contents."""

    def batch(self) -> AbstractContextManager[None]:
        """What to stand in while `documents` is called for one session after another."""

    def documents(self, session: Session) -> list[Document]:
        """The documents that a session becomes; SessionError if it cannot be written."""

    def units(self, roles: Sequence[str], answers: Sequence[bool]) -> list[Unit] | None:
        """The units of a chat; None if what is written around contents takes more than roles.

        answers: whether each message is trained on. The messages have a role and a content alone,
        and there are no tools or variables.
        """

    def write_unit(self, key: UnitKey, messages: Sequence[Message]) -> list[Segment]:
        """The segments of a unit; SessionError if it cannot be written."""


# One message and the one after it (None at the end), of which the role counts -> its parts.
RenderMessage = Callable[[Message, Message | None], MessageParts]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInTemplate(ABC):
    """What message and round templates share."""

    name: str
    specials: tuple[Special, ...]
    opening: tuple[Special, ...] = ()  # before the first message
    strips: bool = False  # white space around contents
    trains_any_role: bool = False  # else only the assistant's messages are closed as answers

    @property
    def opens_with_bos(self) -> bool:
        return BOS in self.opening

    @property
    def content_hash(self) -> str:
        """A hash of how a session of every kind comes out."""
        return hashlib.sha256(repr([self._probed(probe) for probe in _PROBES]).encode()).hexdigest()

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def documents(self, session: Session) -> list[Document]:
        return [Document(segments=self.render(session))]

    def render(self, session: Session) -> tuple[Segment, ...]:
        """The segments of a session; joined they are its whole rendering."""
        if session.plain:
            return render_plain(session)
        refuse_unwritten(session, self.name)
        return tuple(self.with_opening(self.write(session)))

    def with_opening(self, segments: list[Segment]) -> list[Segment]:
        """The segments of a chat, or of the head of one, and the opening before them."""
        if not self.opening:
            return segments
        first = segments[0]
        if not first.leading_system:
            return [Segment(kind=CONTEXT, parts=self.opening, leading_system=True), *segments]
        head = replace(first, parts=(*self.opening, *first.parts), starts_message=True)
        return [head, *segments[1:]]

    @abstractmethod
    def write(self, session: Session) -> list[Segment]:
        """The segments of a chat, without the opening."""

    @abstractmethod
    def units(self, roles: Sequence[str], answers: Sequence[bool]) -> list[Unit]:
        """As ChatTemplate has it."""

    @abstractmethod
    def write_unit(self, key: UnitKey, messages: Sequence[Message]) -> list[Segment]:
        """As ChatTemplate has it."""

    def _probed(self, probe: Session) -> object:
        try:
            return self.render(probe)
        except SessionError as error:
            return str(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template(BuiltInTemplate):
    """Writes message by message."""

    render_message: RenderMessage = field(repr=False)

    def write(self, session: Session) -> list[Segment]:
        segments: list[Segment] = []
        leading = True
        for message, following in zip(session.messages, (*session.messages[1:], None), strict=True):
            leading = leading and message.role == "system"
            segments += self._write_message(message, following, leading=leading)
        return segments

    def units(self, roles: Sequence[str], answers: Sequence[bool]) -> list[Unit]:
        """The messages, each with the role of the next, and whether it opens and leads."""
        num_leading = 0
        while num_leading < len(roles) and roles[num_leading] == "system":
            num_leading += 1
        following = [*zip(roles[1:], answers[1:], strict=True), None]
        keys = zip(roles, answers, following, strict=True)
        return [
            ((role, answer, after, index < num_leading, index == 0), 1)
            for index, (role, answer, after) in enumerate(keys)
        ]

    def write_unit(self, key: UnitKey, messages: Sequence[Message]) -> list[Segment]:
        _, _, after, leading, opens = key
        (message,) = messages
        following = after and Message(role=after[0], content="", train=after[1])
        segments = self._write_message(message, following, leading=leading)
        return self.with_opening(segments) if opens else segments

    def _write_message(
        self, message: Message, following: Message | None, *, leading: bool
    ) -> list[Segment]:
        parts = self.render_message(message, following)
        return group_parts(parts, leading=leading, answer=message)


def rendering_text(segments: tuple[Segment, ...]) -> str:
    """The rendering as one text, special tokens as they are written."""
    return "".join(
        part if isinstance(part, str) else part.token
        for segment in segments
        for part in segment.parts
    )


def group_parts(
    parts: MessageParts, *, leading: bool, answer: Message | None = None
) -> list[Segment]:
    """Group one message's parts into segments; answer: the message, if it can be one.

    [("a", True), ("b", False), ("c", True), (EOS, True)] becomes TARGET_BEGIN a, CONTEXT b,
    TARGET_CONTINUE c EOS.
    """
    segments: list[Segment] = []
    has_turn = False
    start = 0
    for stop in range(1, len(parts) + 1):
        trained = parts[start][1]
        if stop < len(parts) and parts[stop][1] == trained:
            continue
        run = tuple(part for part, _ in parts[start:stop])
        if trained:
            kind = TARGET_CONTINUE if has_turn else TARGET_BEGIN
            weight = 1.0 if answer is None else answer.weight
            segments.append(Segment(kind=kind, parts=run, weight=weight))
            has_turn = True
        else:
            segments.append(
                Segment(kind=CONTEXT, parts=run, starts_message=start == 0, leading_system=leading)
            )
        start = stop
    return segments if answer is None or not answer.masked else _mark_gaps(segments, answer)


def _mark_gaps(segments: list[Segment], answer: Message) -> list[Segment]:
    """The segments of an answer, the context on either side of a target marked where it is masked.

    Between two targets it always is; before the first and behind the last it is if the mask
    reaches to the content's head or end.
    """
    targets = [index for index, segment in enumerate(segments) if segment.kind != CONTEXT]
    if not targets:
        return segments
    masks_head = answer.masked[0][0] == 0
    masks_end = answer.masked[-1][1] == len(answer.content)
    marked = list(segments)
    for index, segment in enumerate(segments):
        if segment.kind != CONTEXT:
            continue
        is_head, is_end = index < targets[0], index > targets[-1]
        marked[index] = replace(
            segment,
            starts_masked=not is_head and (masks_end or not is_end),
            ends_masked=not is_end and (masks_head or not is_head),
        )
    return marked


def render_plain(session: Session) -> tuple[Segment, ...]:
    """Pre-training text, in any template."""
    (message,) = session.messages
    return (
        Segment(kind=CONTEXT, parts=(BOS,), starts_message=True),
        *group_parts(closed_runs(message.runs(), EOS), leading=False, answer=message),
    )


def closed_runs(runs: list[tuple[str, bool]], closing: Special) -> MessageParts:
    """An answer's runs and the token that closes it."""
    return [*runs, (closing, runs[-1][1])]


def stripped_runs(message: Message) -> list[tuple[str, bool]]:
    """The runs of a message without white space at its head and end; at least one, if empty."""
    text = message.content
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    runs = []
    done = 0
    for run, trained in message.runs():
        start, done = done, done + len(run)
        kept = text[max(start, first) : min(done, last)]
        if kept:
            runs.append((kept, trained))
    return runs or [("", message.is_answer)]


def refuse_unwritten(session: Session, template: str) -> None:
    """Raise SessionError for what only a chat template of Hugging Face's kind can write."""
    found = []
    if session.tools:
        found.append(("tools", session.location))
    if session.template_variables:
        found.append(("chat_template_kwargs", session.location))
    for number, message in enumerate(session.messages, start=1):
        where = f"{session.location}: message {number}"
        if message.tool_calls:
            found.append(("tool_calls", where))
        if message.reasoning:
            found.append(("reasoning_content", where))
    for key, where in found:
        raise SessionError(
            f"{where}: {key!r} is not written by template {template!r}; pass --chat-template "
            "tokenizer (or a file) for a template that does, or put it into the messages' content",
            reason=key.replace("_", "-"),
        )


def _probe(*messages: Message, plain: bool = False) -> Session:
    return Session(messages=messages, location="probe", plain=plain)


_PROBES = (
    _probe(
        Message(role="system", content="s"),
        Message(role="user", content="u"),
        Message(role="user", content="v"),
        Message(role="assistant", content="abc", masked=((1, 2),)),
        Message(role="tool", content="t"),
        Message(role="assistant", content="d", train=False),
        Message(role="assistant", content="ef", masked=((1, 2),)),
        Message(role="user", content="w"),
    ),
    _probe(
        Message(role="system", content="s "),
        Message(role="user", content=" u"),
        Message(role="assistant", content=" abc ", masked=((2, 3),)),
        Message(role="user", content="v"),
        Message(role="assistant", content="d"),
    ),
    _probe(Message(role="user", content="u"), Message(role="assistant", content="a")),
    _probe(Message(role="assistant", content="a"), Message(role="user", content="u")),
    _probe(Message(role="assistant", content="p"), plain=True),
)
