"""One message of a session, read out of its entry in a record, whatever the keys are called.

What may stand on it besides: `"train": false` (also spelt `"loss": false`, `"weight": 0` and
`"output_with_loss": false`) makes an answer context. `content` may be a list of
`{"type": "text", "text": "...", "train": false}` parts, which masks gaps inside an answer. What
would change the meaning and has no place in a Message (tool calls, images, ...) is refused, not
left out.
"""

import json
from dataclasses import dataclass
from typing import Any

from megatron_multiturn.errors import SessionError

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_TRAIN_KEYS = ("train", "loss", "weight", "output_with_loss")
_REFUSED_KEYS = {
    "tool_calls": "render the calls into the message's content",
    "function_call": "render the call into the message's content",
    "reasoning_content": "render the reasoning into the message's content",
    "tools": "render the tool descriptions into the system message's content",
    "functions": "render the function descriptions into the system message's content",
    "images": "only text can be trained on",
    "videos": "only text can be trained on",
    "audios": "only text can be trained on",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool that an assistant's message makes."""

    name: str
    arguments: str = "{}"  # JSON text of an object, its keys in the order given
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One entry of a session."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str  # may be empty in an answer that calls tools
    train: bool | None = None  # None: an assistant's message is trained on, no other is
    masked: tuple[tuple[int, int], ...] = ()  # (start, stop) in content, ordered: not trained on
    weight: float = 1.0  # of the turn, positive; of an assistant's message only
    reasoning: str = ""  # what the assistant thinks before it answers
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None  # of the speaker, or of the tool that answers
    tool_call_id: str | None = None  # the call that a tool's message answers

    @property
    def is_answer(self) -> bool:
        """Whether something of this message is to be learnt."""
        return self.role == "assistant" and self.train is not False

    def runs(self) -> list[tuple[str, bool]]:
        """The content cut where training starts or stops: [(text, trained), ...], none empty."""
        if not self.is_answer:
            return [(self.content, False)]
        runs = []
        done = 0
        for start, stop in self.masked:
            runs += [(self.content[done:start], True), (self.content[start:stop], False)]
            done = stop
        runs.append((self.content[done:], True))
        return [(text, trained) for text, trained in runs if text]


def refuse_keys(value: dict[str, Any], where: str) -> None:
    for key, remedy in _REFUSED_KEYS.items():
        if key in value and not _is_blank(value[key]):
            raise SessionError(
                f"{where}: {key!r} is not rendered by any template: {show(value[key])}; {remedy} "
                f"and remove {key!r}",
                reason=key.replace("_", "-"),
            )


def _is_blank(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def read_message(
    entry: dict[str, Any], where: str, *, keys: tuple[str, str], roles: dict[str, str]
) -> Message:
    role_key, content_key = keys
    name = entry.get(role_key)
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise SessionError(
            f"{where} has the unknown {role_key} {show(name)}; known are {', '.join(roles)}",
            reason="unknown-role",
        )
    refuse_keys(entry, where)
    train = train_flag(entry, where, role)
    content = entry.get(content_key)
    if not isinstance(content, list):
        return Message(role=role, content=content_of(entry, content_key, where), train=train)
    text, masked = _join_parts(content, where, role)
    return Message(role=role, content=filled(text, where), train=train, masked=masked)


def train_flag(entry: dict[str, Any], where: str, role: str) -> bool | None:
    """The one meaning of all keys that say so; None if none is there."""
    train: bool | None = None
    for key in _TRAIN_KEYS:
        flag = entry.get(key)
        if flag is None:
            continue
        if key == "weight" and not isinstance(flag, bool) and flag in (0, 1):
            flag = bool(flag)
        elif key == "weight":
            raise SessionError(
                f"{where}: 'weight' is {show(flag)}, but a message is trained on (1) or not (0); "
                "use 0 or 1",
                reason="wrong-weight",
            )
        if not isinstance(flag, bool):
            raise wrong_type(where, repr(key), "true or false", flag)
        if train is not None and train != flag:
            raise SessionError(
                f"{where}: {' and '.join(repr(one) for one in _TRAIN_KEYS if one in entry)} "
                "contradict each other; keep one",
                reason="wrong-train",
            )
        train = flag
    if train and role != "assistant":
        raise SessionError(
            f"{where} is to be trained on but has the role {role!r}; only an assistant's messages "
            "can be targets: remove its 'train'",
            reason="untrainable-role",
        )
    return train


def _join_parts(parts: list[Any], where: str, role: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of a list of content parts, and the spans in it that are not to be trained on."""
    text = ""
    masked: list[tuple[int, int]] = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            raise SessionError(
                f"{where}: content part {number} is {show(part)}, but only "
                '{"type": "text", "text": "..."} parts can be trained on; remove it',
                reason="not-text",
            )
        here = f"{where}: content part {number}"
        start = len(text)
        text += text_of(part["text"], here)
        if train_flag(part, here, role) is False and len(text) > start:
            if masked and masked[-1][1] == start:
                start = masked.pop()[0]
            masked.append((start, len(text)))
    return text, tuple(masked)


def content_of(entry: dict[str, Any], key: str, where: str) -> str:
    if entry.get(key) is None:
        raise SessionError(
            f"{where} has no {key!r}; remove the message or fill it in", reason="empty-content"
        )
    return filled(text_of(entry[key], f"{where}: {key!r}"), where)


def text_of(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(what, "the value", "text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SessionError(
            f"{what} holds half a surrogate pair, {show(value[error.start])}, which no tokenizer "
            "takes; remove it",
            reason="not-utf8",
        ) from None
    return value


def filled(text: str, where: str) -> str:
    if not text.strip():
        raise SessionError(
            f"{where} has empty content {show(text)}; remove the message or fill it in",
            reason="empty-content",
        )
    return text


def wrong_type(where: str, what: str, wanted: str, value: Any) -> SessionError:
    return SessionError(
        f"{where}: {what} must be {wanted}, not {show(value)}; correct it", reason="wrong-type"
    )


def show(value: Any) -> str:
    """The value as JSON in at most 60 characters, on one line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def show_keys(value: dict[str, Any]) -> str:
    if not value:
        return "no keys"
    return "only " + ", ".join(show(key) for key in list(value)[:8])
