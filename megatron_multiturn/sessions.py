"""Raw records -> Session: every input format, every error with its place and remedy.

Formats, found out by looking at each record or named by the caller:

    openai     {"messages": [{"role": "user", "content": "..."}, ...]}
    xtuner     {"conversation": [{"system": "", "input": "...", "output": "..."}, ...]}
    sharegpt   {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
    alpaca     {"instruction": "...", "input": "", "output": "...", "history": [[q, a], ...]}

What may stand on a message besides: `"train": false` (also spelt `"loss": false`, `"weight": 0`
and, in xtuner, `"output_with_loss": false`) makes an answer context. `content` may be a list of
`{"type": "text", "text": "...", "train": false}` parts, which masks gaps inside an answer.
What would change the meaning and has no place in a Session (tool calls, images, ...) is refused,
not left out.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.records import RawRecord, read_records

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_TRAIN_KEYS = ("train", "loss", "weight")
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
class Message:
    """One entry of a session."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    train: bool | None = None  # None: an assistant's message is trained on, no other is
    masked: tuple[tuple[int, int], ...] = ()  # (start, stop) in content, ordered: not trained on

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One conversation."""

    messages: tuple[Message, ...]
    location: str  # "file.jsonl:17"
    plain: bool = False  # pre-training text: one assistant message, no chat markup


def read_sessions(paths: Sequence[str], *, form: str = "auto") -> Iterator[Session | SessionError]:
    """Yield every session of the files, or the error that it has, so that a caller can go on.

    Raises ConfigError for a file that cannot be read at all, see `records.read_records`.
    """
    for path in paths:
        for record in read_records(path):
            try:
                yield parse_session(record, form=form)
            except SessionError as error:
                yield error


def parse_session(record: RawRecord, *, form: str = "auto") -> Session:
    """The session that a record holds; raises SessionError if it cannot be trained on."""
    location = record.location
    value = _parse_object(record)
    if form == "auto":
        form = _find_format(value, location)
    _refuse_keys(value, location)
    messages, plain = FORMATS[form](value, location)
    _check_messages(messages, location)
    return Session(messages=tuple(messages), location=location, plain=plain)


def _parse_object(record: RawRecord) -> dict[str, Any]:
    location = record.location
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SessionError(
            f"{location}: byte 0x{record.data[error.start]:02x} at position {error.start} is not "
            "UTF-8 text; convert the file to UTF-8",
            reason="not-utf8",
        ) from None
    if text.startswith("\ufeff"):
        raise SessionError(
            f"{location}: a byte-order mark stands before the object; files joined with cat keep "
            "theirs, remove it",
            reason="not-json",
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SessionError(
            f"{location}: not JSON ({error}): {_show(text)}; one line is one whole object, or the "
            "file is one JSON list",
            reason="not-json",
        ) from None
    if not isinstance(value, dict):
        raise _wrong_type(location, "the record", "an object", value)
    return value


def _find_format(value: dict[str, Any], location: str) -> str:
    for key, form in (
        ("messages", "openai"),
        ("conversation", "xtuner"),
        ("conversations", "sharegpt"),
        ("instruction", "alpaca"),
    ):
        if key in value:
            return form
    raise SessionError(
        f"{location}: no messages: the record has {_show_keys(value)} and none of 'messages', "
        "'conversation', 'conversations', 'instruction'; convert it to one of these formats",
        reason="no-messages",
    )


def _refuse_keys(value: dict[str, Any], where: str) -> None:
    for key, remedy in _REFUSED_KEYS.items():
        if key in value and not _is_blank(value[key]):
            raise SessionError(
                f"{where}: {key!r} is not rendered by any template: {_show(value[key])}; {remedy} "
                f"and remove {key!r}",
                reason=key.replace("_", "-"),
            )


def _is_blank(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def _openai(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages = _system_of(value, location)
    for where, entry in _entries(value, "messages", location):
        messages.append(_message(entry, where, keys=("role", "content"), roles=_ROLES))
    return messages, False


def _sharegpt(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages = _system_of(value, location)
    for where, entry in _entries(value, "conversations", location):
        if "role" in entry and "from" not in entry:
            message = _message(entry, where, keys=("role", "content"), roles=_ROLES)
        else:
            message = _message(entry, where, keys=("from", "value"), roles=_SHAREGPT_ROLES)
        messages.append(message)
    return messages, False


def _xtuner(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages: list[Message] = []
    entries = list(_entries(value, "conversation", location))
    for where, entry in entries:
        _refuse_keys(entry, where)
        _check_xtuner_ending(entry, where)
        for key, role in (("system", "system"), ("input", "user")):
            text = _text(entry.get(key, ""), f"{where}: {key!r}")
            if text:
                messages.append(Message(role=role, content=text))
        train = entry.get("output_with_loss")
        if train is not None and not isinstance(train, bool):
            raise _wrong_type(where, "'output_with_loss'", "true or false", train)
        content = _content_of(entry, "output", where)
        messages.append(Message(role="assistant", content=content, train=train))
    return messages, len(entries) == 1 and len(messages) == 1


def _check_xtuner_ending(entry: dict[str, Any], where: str) -> None:
    if entry.get("need_eos_token", True) is not True:
        raise SessionError(
            f"{where}: 'need_eos_token' is {_show(entry['need_eos_token'])}, but the template "
            "closes every answer; remove the key, or join this entry with the next",
            reason="need-eos-token",
        )
    if entry.get("sep"):
        raise SessionError(
            f"{where}: 'sep' is {_show(entry['sep'])}, but the template puts the separators; "
            "remove the key",
            reason="sep",
        )


def _alpaca(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages = _system_of(value, location)
    history = value.get("history") or []
    if not isinstance(history, list):
        raise _wrong_type(location, "'history'", "a list of [question, answer] pairs", history)
    for number, pair in enumerate(history, start=1):
        where = f"{location}: pair {number} of 'history'"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong_type(location, f"pair {number} of 'history'", "[question, answer]", pair)
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(Message(role=role, content=_filled(_text(text, where), where)))
    question = _content_of(value, "instruction", location)
    more = _text(value.get("input") or "", f"{location}: 'input'")
    messages.append(Message(role="user", content=f"{question}\n{more}" if more else question))
    messages.append(Message(role="assistant", content=_content_of(value, "output", location)))
    return messages, False


FORMATS: dict[str, Callable[[dict[str, Any], str], tuple[list[Message], bool]]] = {
    "openai": _openai,
    "xtuner": _xtuner,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def _system_of(value: dict[str, Any], location: str) -> list[Message]:
    system = _text(value.get("system") or "", f"{location}: 'system'")
    return [Message(role="system", content=system)] if system.strip() else []


def _entries(
    value: dict[str, Any], key: str, location: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, entry) for each entry of the list at `key`."""
    if key not in value:
        raise SessionError(
            f"{location}: no messages: {key!r} is missing, the record has {_show_keys(value)}; "
            "name the right --format, or leave it at auto",
            reason="no-messages",
        )
    entries = value[key]
    if not isinstance(entries, list):
        raise _wrong_type(location, repr(key), "a list of messages", entries)
    if not entries:
        raise SessionError(
            f"{location}: no messages: {key!r} is an empty list; remove the record",
            reason="no-messages",
        )
    for number, entry in enumerate(entries, start=1):
        where = f"{location}: message {number}"
        if not isinstance(entry, dict):
            raise _wrong_type(location, f"message {number}", "an object", entry)
        yield where, entry


def _message(
    entry: dict[str, Any], where: str, *, keys: tuple[str, str], roles: dict[str, str]
) -> Message:
    role_key, content_key = keys
    name = entry.get(role_key)
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise SessionError(
            f"{where} has the unknown {role_key} {_show(name)}; known are {', '.join(roles)}",
            reason="unknown-role",
        )
    _refuse_keys(entry, where)
    train = _train_flag(entry, where)
    if train and role != "assistant":
        raise SessionError(
            f"{where} is to be trained on but has the role {role!r}; only an assistant's messages "
            "can be targets: remove its 'train'",
            reason="untrainable-role",
        )
    content = entry.get(content_key)
    if not isinstance(content, list):
        return Message(role=role, content=_content_of(entry, content_key, where), train=train)
    text, masked = _join_parts(content, where)
    if masked and role != "assistant":
        masked = ()
    return Message(role=role, content=_filled(text, where), train=train, masked=masked)


def _train_flag(entry: dict[str, Any], where: str) -> bool | None:
    """The one meaning of `train`, `loss` and `weight`; None if none is there."""
    train: bool | None = None
    for key in _TRAIN_KEYS:
        flag = entry.get(key)
        if flag is None:
            continue
        if key == "weight" and not isinstance(flag, bool) and flag in (0, 1):
            flag = bool(flag)
        elif key == "weight":
            raise SessionError(
                f"{where}: 'weight' is {_show(flag)}, but a message is trained on (1) or not (0); "
                "use 0 or 1",
                reason="wrong-weight",
            )
        if not isinstance(flag, bool):
            raise _wrong_type(where, repr(key), "true or false", flag)
        if train is not None and train != flag:
            raise SessionError(
                f"{where}: {' and '.join(map(repr, _TRAIN_KEYS))} contradict each other; keep one",
                reason="wrong-train",
            )
        train = flag
    return train


def _join_parts(parts: list[Any], where: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of a list of content parts, and the spans in it that are not to be trained on."""
    text = ""
    masked: list[tuple[int, int]] = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            raise SessionError(
                f"{where}: content part {number} is {_show(part)}, but only "
                '{"type": "text", "text": "..."} parts can be trained on; remove it',
                reason="not-text",
            )
        start = len(text)
        text += _text(part["text"], f"{where}: content part {number}")
        if _train_flag(part, f"{where}: content part {number}") is False and len(text) > start:
            if masked and masked[-1][1] == start:
                start = masked.pop()[0]
            masked.append((start, len(text)))
    return text, tuple(masked)


def _content_of(entry: dict[str, Any], key: str, where: str) -> str:
    if entry.get(key) is None:
        raise SessionError(
            f"{where} has no {key!r}; remove the message or fill it in", reason="empty-content"
        )
    return _filled(_text(entry[key], f"{where}: {key!r}"), where)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(what, "the value", "text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SessionError(
            f"{what} holds half a surrogate pair, {_show(value[error.start])}, which no tokenizer "
            "takes; remove it",
            reason="not-utf8",
        ) from None
    return value


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise SessionError(
            f"{where} has empty content {_show(text)}; remove the message or fill it in",
            reason="empty-content",
        )
    return text


def _check_messages(messages: list[Message], location: str) -> None:
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        raise SessionError(
            f"{location}: no assistant message among the roles {roles}: there is nothing to learn; "
            "remove the session",
            reason="no-assistant",
        )
    if not any(trained for message in messages for _, trained in message.runs()):
        raise SessionError(
            f"{location}: every answer has train false: there is nothing to learn; remove the "
            "session or set one to true",
            reason="nothing-to-train",
        )


def _wrong_type(where: str, what: str, wanted: str, value: Any) -> SessionError:
    return SessionError(
        f"{where}: {what} must be {wanted}, not {_show(value)}; correct it", reason="wrong-type"
    )


def _show(value: Any) -> str:
    """The value as JSON in at most 60 characters, on one line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _show_keys(value: dict[str, Any]) -> str:
    if not value:
        return "no keys"
    return "only " + ", ".join(_show(key) for key in list(value)[:8])


__all__ = ["FORMATS", "ConfigError", "Message", "Session", "parse_session", "read_sessions"]
