"""Raw records -> Session: every input format, every error with its place and remedy.

Formats, found out by looking at each record or named by the caller:

    openai     {"messages": [{"role": "user", "content": "..."}, ...]}
    xtuner     {"conversation": [{"system": "", "input": "...", "output": "..."}, ...]}
    sharegpt   {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
    alpaca     {"instruction": "...", "input": "", "output": "...", "history": [[q, a], ...]}

An xtuner entry without system and input, alone in its record, is pre-training text. Which answers
are trained on is said on the messages, or entries (see `messages.py`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_multiturn.errors import SessionError
from megatron_multiturn.messages import (
    OPENAI_ROLES,
    SHAREGPT_ROLES,
    Message,
    content_of,
    filled,
    read_message,
    refuse_keys,
    show,
    show_keys,
    text_of,
    train_flag,
    wrong_type,
)
from megatron_multiturn.records import RawRecord, read_records

__all__ = ["FORMATS", "Message", "Session", "parse_session", "read_sessions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One conversation."""

    messages: tuple[Message, ...]
    location: str  # "file.jsonl:17"
    plain: bool = False  # pre-training text: one assistant message, no chat markup
    tools: tuple[dict[str, Any], ...] = ()  # schemas of the tools that may be called, as given
    template_variables: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs


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
    refuse_keys(value, location)
    for key in ("train", "weight"):
        if value.get(key) is not None:
            raise SessionError(
                f"{location}: {key!r} is {show(value[key])} for the whole session, which has no "
                f"meaning here; put {key!r} on the messages, or leave the session out",
                reason="wrong-train",
            )
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
            f"{location}: not JSON ({error}): {show(text)}; one line is one whole object, or the "
            "file is one JSON list",
            reason="not-json",
        ) from None
    if not isinstance(value, dict):
        raise wrong_type(location, "the record", "an object", value)
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
        f"{location}: no messages: the record has {show_keys(value)} and none of 'messages', "
        "'conversation', 'conversations', 'instruction'; convert it to one of these formats",
        reason="no-messages",
    )


def _openai(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages = _system_of(value, location)
    for where, entry in _entries(value, "messages", location):
        messages.append(read_message(entry, where, keys=("role", "content"), roles=OPENAI_ROLES))
    return messages, False


def _sharegpt(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages = _system_of(value, location)
    for where, entry in _entries(value, "conversations", location):
        if "role" in entry and "from" not in entry:
            message = read_message(entry, where, keys=("role", "content"), roles=OPENAI_ROLES)
        else:
            message = read_message(entry, where, keys=("from", "value"), roles=SHAREGPT_ROLES)
        messages.append(message)
    return messages, False


def _xtuner(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages: list[Message] = []
    entries = list(_entries(value, "conversation", location))
    for where, entry in entries:
        refuse_keys(entry, where)
        _check_xtuner_ending(entry, where)
        for key, role in (("system", "system"), ("input", "user")):
            text = text_of(entry.get(key, ""), f"{where}: {key!r}")
            if text:
                messages.append(Message(role=role, content=text))
        train = train_flag(entry, where, "assistant")
        content = content_of(entry, "output", where)
        messages.append(Message(role="assistant", content=content, train=train))
    return messages, len(entries) == 1 and len(messages) == 1


def _check_xtuner_ending(entry: dict[str, Any], where: str) -> None:
    if entry.get("need_eos_token", True) is not True:
        raise SessionError(
            f"{where}: 'need_eos_token' is {show(entry['need_eos_token'])}, but the template "
            "closes every answer; remove the key, or join this entry with the next",
            reason="need-eos-token",
        )
    if entry.get("sep"):
        raise SessionError(
            f"{where}: 'sep' is {show(entry['sep'])}, but the template puts the separators; "
            "remove the key",
            reason="sep",
        )


def _alpaca(value: dict[str, Any], location: str) -> tuple[list[Message], bool]:
    messages = _system_of(value, location)
    history = value.get("history") or []
    if not isinstance(history, list):
        raise wrong_type(location, "'history'", "a list of [question, answer] pairs", history)
    for number, pair in enumerate(history, start=1):
        where = f"{location}: pair {number} of 'history'"
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong_type(location, f"pair {number} of 'history'", "[question, answer]", pair)
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(Message(role=role, content=filled(text_of(text, where), where)))
    question = content_of(value, "instruction", location)
    more = text_of(value.get("input") or "", f"{location}: 'input'")
    messages.append(Message(role="user", content=f"{question}\n{more}" if more else question))
    messages.append(Message(role="assistant", content=content_of(value, "output", location)))
    return messages, False


FORMATS: dict[str, Callable[[dict[str, Any], str], tuple[list[Message], bool]]] = {
    "openai": _openai,
    "xtuner": _xtuner,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def _system_of(value: dict[str, Any], location: str) -> list[Message]:
    system = text_of(value.get("system") or "", f"{location}: 'system'")
    return [Message(role="system", content=system)] if system.strip() else []


def _entries(
    value: dict[str, Any], key: str, location: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, entry) for each entry of the list at `key`."""
    if key not in value:
        raise SessionError(
            f"{location}: no messages: {key!r} is missing, the record has {show_keys(value)}; "
            "name the right --format, or leave it at auto",
            reason="no-messages",
        )
    entries = value[key]
    if not isinstance(entries, list):
        raise wrong_type(location, repr(key), "a list of messages", entries)
    if not entries:
        raise SessionError(
            f"{location}: no messages: {key!r} is an empty list; remove the record",
            reason="no-messages",
        )
    for number, entry in enumerate(entries, start=1):
        where = f"{location}: message {number}"
        if not isinstance(entry, dict):
            raise wrong_type(location, f"message {number}", "an object", entry)
        yield where, entry


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
