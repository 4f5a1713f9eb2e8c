"""Raw records -> Session: every input format, every error with its place and remedy.

The formats are found out by looking at each record, or named by the caller; `chat_formats` has
those that hold a list of messages, `question_formats` those of one question and its answer. A
session's tools and its variables for the chat template stand beside its messages:

    {"messages": [...], "tools": [...], "chat_template_kwargs": {"enable_thinking": false}}

Which answers are trained on is said on the messages, or entries (see `entries`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_multiturn import chat_formats, question_formats
from megatron_multiturn.chat_formats import Parsed
from megatron_multiturn.errors import SessionError
from megatron_multiturn.fields import (
    is_blank,
    json_field,
    refuse_keys,
    show,
    show_keys,
    text_of,
    wrong_type,
)
from megatron_multiturn.messages import Message
from megatron_multiturn.records import RawRecord, read_records
from megatron_multiturn.tool_fields import read_tools

__all__ = [
    "FORMATS",
    "Message",
    "Session",
    "learns_something",
    "parse_session",
    "read_sessions",
]

# What templates are given anyway.
RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")


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
    try:
        return _parse(_parse_json(record), record.location, form)
    except RecursionError:
        raise SessionError(
            f"{record.location}: lists and objects lie too deep in each other; flatten them",
            reason="too-deep",
        ) from None


def _parse(value: Any, location: str, form: str) -> Session:
    if isinstance(value, list) and form in ("auto", "utterances"):
        if not all(isinstance(one, str) for one in value):
            raise wrong_type(location, "the record", "an object, or a list of texts", value)
        messages, plain = chat_formats.utterances(value, location)
        _check_messages(messages, location)
        return Session(messages=tuple(messages), location=location, plain=plain)
    if not isinstance(value, dict):
        raise wrong_type(location, "the record", "an object", value)
    value = chat_formats.unfold_lists(value, location)
    if form == "auto":
        form = _find_format(value, location)
    refuse_keys(value, location)
    _refuse_session_flags(value, location)
    messages, plain = FORMATS[form](value, location)
    _check_messages(messages, location)
    return Session(
        messages=tuple(messages),
        location=location,
        plain=plain,
        tools=read_tools(value, location),
        template_variables=_template_variables(value, location),
    )


def _parse_json(record: RawRecord) -> Any:
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
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SessionError(
            f"{location}: not JSON ({error}): {show(text)}; one line is one whole object, or the "
            "file is one JSON list",
            reason="not-json",
        ) from None


def _find_format(value: dict[str, Any], location: str) -> str:
    form = chat_formats.form_of_list(value, location) or question_formats.form_of_question(value)
    if form is None:
        raise SessionError(
            f"{location}: no messages: the record has {show_keys(value)} and none of 'messages', "
            "'conversation', 'conversations', 'instruction', 'input' and 'target', 'query' and "
            "'response', 'title', 'desc' and 'content', 'text'; convert it to one of these formats",
            reason="no-messages",
        )
    return form


def _firefly(value: dict[str, Any], location: str) -> Parsed:
    if value.get("target") is not None:
        return question_formats.firefly_single(value, location)
    return chat_formats.firefly_pairs(value, location)


FORMATS: dict[str, Callable[[dict[str, Any], str], Parsed]] = {
    "openai": chat_formats.openai,
    "sharegpt": chat_formats.sharegpt,
    "xtuner": chat_formats.xtuner,
    "firefly": _firefly,
    "alpaca": question_formats.alpaca,
    "belle": question_formats.belle,
    "qa": question_formats.qa,
    "utterances": chat_formats.utterances,
    "text": question_formats.text,
}


def _refuse_session_flags(value: dict[str, Any], location: str) -> None:
    for key in ("train", "weight"):
        if value.get(key) is not None:
            raise SessionError(
                f"{location}: {key!r} is {show(value[key])} for the whole session, which has no "
                f"meaning here; put {key!r} on the messages, or leave the session out",
                reason="wrong-train",
            )


def _template_variables(value: dict[str, Any], location: str) -> dict[str, Any]:
    given = value.get("chat_template_kwargs")
    if is_blank(given):
        return {}
    what = f"{location}: 'chat_template_kwargs'"
    variables = json_field(given, what, reason="wrong-template-variables")
    if not isinstance(variables, dict):
        raise SessionError(
            f"{what} is {show(variables)}; it must be an object of variables, or its JSON text",
            reason="wrong-template-variables",
        )
    for name in RESERVED_VARIABLES:
        if name in variables:
            raise SessionError(
                f"{what} sets {name!r}, which every template is given; remove it",
                reason="wrong-template-variables",
            )
    text_of(json.dumps(variables, ensure_ascii=False), what)
    return variables


def learns_something(message: Message) -> bool:
    """Whether a message has anything that is trained on."""
    if not message.is_answer:
        return False
    if message.tool_calls or not message.masked:
        return True
    return any(trained for _, trained in message.runs())


def _check_messages(messages: list[Message], location: str) -> None:
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        raise SessionError(
            f"{location}: no assistant message among the roles {roles or '(none)'}: there is "
            "nothing to learn; remove the session",
            reason="no-assistant",
        )
    if not any(map(learns_something, messages)):
        raise SessionError(
            f"{location}: every answer has train false: there is nothing to learn; remove the "
            "session or set one to true",
            reason="nothing-to-train",
        )
