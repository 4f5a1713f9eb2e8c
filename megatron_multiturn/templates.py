"""Session -> segments: the only place that decides what is a target and which turn it is in.

A template writes a session as text runs and named special tokens. Special tokens are parts of
their own, so a user's text that spells `<|im_end|>` stays text.

    firefly   <s>input1</s>target1</s>input2</s>target2</s>
    chatml    <|im_start|>role\\ncontent<|im_end|>\\n

Every answer that is trained on is a turn, with the token that closes it. A gap masked inside an
answer makes three segments of one turn: TARGET_BEGIN, CONTEXT, TARGET_CONTINUE. The closing token
is a target if the answer's last run is: where the end is masked, ending there is not learnt.

firefly has no mark for roles: answers and what stands between them alternate. So all messages
between two answers are one input, joined by "\\n", and a system message is the first line of the
first input. The `<s>` is repeated, as a system message is, at the head of every window of a long
session. It is left out if the vocabulary has none.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megatron_multiturn.modes import CONTEXT, TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.sessions import Message, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """A part that is one token of the vocabulary."""

    token: str  # as it is written, "<|im_start|>", where role is "literal"
    role: Literal["literal", "bos", "eos"] = "literal"  # bos, eos: whatever the tokenizer has


Part = str | Special

# The ids are those of the tokenizer's own tokens, however it writes them.
BOS = Special(token="<s>", role="bos")
EOS = Special(token="</s>", role="eos")
IM_START = Special(token="<|im_start|>")
IM_END = Special(token="<|im_end|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of parts that is wholly context or wholly target, of one message."""

    kind: int  # modes.CONTEXT, TARGET_BEGIN or TARGET_CONTINUE
    parts: tuple[Part, ...]
    starts_message: bool = False  # context that begins a message: a window may open here
    leading_system: bool = False  # context that every window of a long session begins with


# One message and the one after it (None at the end) -> its (part, trained) in order.
RenderMessage = Callable[[Message, Message | None], list[tuple[Part, bool]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A way to write a session."""

    name: str
    specials: tuple[Special, ...]  # all that chats need; plain text has BOS and EOS besides
    render_message: RenderMessage = field(repr=False)
    opening: tuple[Special, ...] = ()  # before the first message

    def render(self, session: Session) -> tuple[Segment, ...]:
        """The segments of a session; joined they are its whole rendering."""
        if session.plain:
            return _render_plain(session)
        segments: list[Segment] = []
        leading = True
        for message, following in zip(session.messages, (*session.messages[1:], None), strict=True):
            leading = leading and message.role == "system"
            segments += _segments(self.render_message(message, following), leading=leading)
        return _with_opening(self.opening, segments)

    @property
    def content_hash(self) -> str:
        """Equal for templates that write alike: a hash of how a session of every kind comes out."""
        segments = [self.render(session) for session in _PROBES]
        return hashlib.sha256(repr(segments).encode()).hexdigest()


def rendering_text(segments: tuple[Segment, ...]) -> str:
    """The rendering as one text, special tokens as they are written."""
    return "".join(
        part if isinstance(part, str) else part.token
        for segment in segments
        for part in segment.parts
    )


def _segments(parts: list[tuple[Part, bool]], *, leading: bool) -> list[Segment]:
    """Group one message's parts into segments.

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
            segments.append(Segment(kind=TARGET_CONTINUE if has_turn else TARGET_BEGIN, parts=run))
            has_turn = True
        else:
            segments.append(
                Segment(kind=CONTEXT, parts=run, starts_message=start == 0, leading_system=leading)
            )
        start = stop
    return segments


def _with_opening(opening: tuple[Special, ...], segments: list[Segment]) -> tuple[Segment, ...]:
    if not opening:
        return tuple(segments)
    first = segments[0]
    if not first.leading_system:
        return (Segment(kind=CONTEXT, parts=opening, leading_system=True), *segments)
    head = Segment(
        kind=CONTEXT, parts=(*opening, *first.parts), starts_message=True, leading_system=True
    )
    return (head, *segments[1:])


def _render_plain(session: Session) -> tuple[Segment, ...]:
    (message,) = session.messages
    return (
        Segment(kind=CONTEXT, parts=(BOS,), starts_message=True),
        *_segments(_answer(message, EOS), leading=False),
    )


def _answer(message: Message, closing: Special) -> list[tuple[Part, bool]]:
    runs: list[tuple[Part, bool]] = list(message.runs())
    return [*runs, (closing, runs[-1][1])]


def _firefly_message(message: Message, following: Message | None) -> list[tuple[Part, bool]]:
    if message.role == "assistant":
        return _answer(message, EOS)
    if following is not None and following.role != "assistant":
        return [(message.content + "\n", False)]
    return [(message.content, False), (EOS, False)]


def _chatml_message(message: Message, _following: Message | None) -> list[tuple[Part, bool]]:
    return [
        (IM_START, False),
        (message.role + "\n", False),
        *_answer(message, IM_END),
        ("\n", False),
    ]


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="firefly",
            specials=(BOS, EOS),
            opening=(BOS,),
            render_message=_firefly_message,
        ),
        Template(
            name="chatml",
            specials=(IM_START, IM_END),
            render_message=_chatml_message,
        ),
    )
}


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
    _probe(Message(role="assistant", content="a"), Message(role="user", content="u")),
    _probe(Message(role="assistant", content="p"), plain=True),
)
