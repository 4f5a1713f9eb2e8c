"""Typed reading of the fields of a record, with errors that say where, what and the remedy.

`where` names the place for messages, "file.jsonl:17: message 2".
"""

import json
from typing import Any

from megatron_multiturn.errors import SessionError

REFUSED_KEYS = {
    "images": "only text can be trained on",
    "videos": "only text can be trained on",
    "audios": "only text can be trained on",
    "audio": "only text can be trained on",
    "chosen": "preference data is not for this objective: append the answer to the messages",
    "rejected": "preference data is not for this objective: leave the rejected answer out",
    "rejected_response": "preference data is not for this objective: leave the rejected answer out",
    "rejected_messages": "preference data is not for this objective: leave the rejected answer out",
    "kto_tag": "preference data is not for this objective: leave the disliked sessions out",
}


def refuse_keys(value: dict[str, Any], where: str) -> None:
    """Raise SessionError for what would change the meaning and has no place in a session."""
    if REFUSED_KEYS.keys().isdisjoint(value):
        return
    for key, remedy in REFUSED_KEYS.items():
        given = value.get(key)
        if given is not False and is_blank(given):
            continue
        raise SessionError(
            f"{where}: {key!r} cannot be trained on: {show(given)}; {remedy}, and remove {key!r}",
            reason=key.replace("_", "-"),
        )


def is_blank(value: Any) -> bool:
    """Whether a field says nothing: missing, empty, or the JSON text of something empty."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def present_key(value: dict[str, Any], keys: tuple[str, ...], location: str) -> str:
    """The first of the keys that the record has; SessionError if it has none."""
    key = next((key for key in keys if value.get(key) is not None), None)
    if key is None:
        raise SessionError(
            f"{location}: no messages: {' or '.join(map(repr, keys))} is missing, the record has "
            f"{show_keys(value)}; name the right --format, or leave it at auto",
            reason="no-messages",
        )
    return key


def content_of(entry: dict[str, Any], key: str, where: str) -> str:
    """The text at `key`, which must be there and hold more than white space."""
    if entry.get(key) is None:
        raise SessionError(
            f"{where} has no {key!r}; remove the message or fill it in", reason="empty-content"
        )
    return filled(text_of(entry[key], f"{where}: {key!r}"), where)


def optional_text(entry: dict[str, Any], key: str, where: str) -> str:
    """The text at `key`, empty if it is missing or null."""
    value = entry.get(key)
    return "" if value is None else text_of(value, f"{where}: {key!r}")


def text_of(value: Any, what: str) -> str:
    """The value, if it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise wrong_type(what, "the value", "text", value)
    if value.isascii():
        return value
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
    if not text or text.isspace():
        raise SessionError(
            f"{where} has empty content {show(text)}; remove the message or fill it in",
            reason="empty-content",
        )
    return text


def json_field(value: Any, what: str, *, reason: str) -> Any:
    """The value; JSON text is parsed, since many corpora keep nested objects as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SessionError(
            f"{what} is text that is not JSON ({error}): {show(value)}; correct it", reason=reason
        ) from None


def wrong_type(where: str, what: str, wanted: str, value: Any) -> SessionError:
    return SessionError(
        f"{where}: {what} must be {wanted}, not {show(value)}; correct it", reason="wrong-type"
    )


def show(value: Any) -> str:
    """The value as JSON in at most 60 characters, on one line."""
    if isinstance(value, str):
        value = value[:80]  # a line of many megabytes is not escaped for its first words
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def show_keys(value: dict[str, Any]) -> str:
    if not value:
        return "no keys"
    return "only " + ", ".join(show(key) for key in list(value)[:8])
