"""Records that hold a list of messages -> the messages of a session.

    openai      {"messages": [{"role": "user", "content": "..."}, ...]}
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
    xtuner      {"conversation": [{"system": "", "input": "...", "output": "..."}, ...]}
    firefly     {"conversation": [{"human": "...", "assistant": "..."}, ...]}
    utterances  ["...", "...", ...]: the second, fourth, ... are answers

The entries decide, not the name of the list; the list may be JSON text. An xtuner entry without
system and input, alone in its record, is pre-training text.
"""

from collections.abc import Iterator
from typing import Any

from megatron_multiturn.entries import read_message, train_and_weight
from megatron_multiturn.errors import SessionError
from megatron_multiturn.fields import (
    content_of,
    filled,
    json_field,
    optional_text,
    present_key,
    refuse_keys,
    show,
    show_keys,
    text_of,
    wrong_type,
)
from megatron_multiturn.messages import Message

# Names of a list of messages, and of a list of utterances.
_CHAT_KEYS = ("messages", "conversations", "conversation")
_UTTERANCE_KEYS = ("dialog", "dialogue", "utterances", "data", *_CHAT_KEYS)

Parsed = tuple[list[Message], bool]  # (messages, whether it is plain text)


def unfold_lists(value: dict[str, Any], location: str) -> dict[str, Any]:
    """The record with lists of messages that are written as JSON text parsed."""
    folded = [
        key
        for key in (*_CHAT_KEYS, "history")
        if isinstance(value.get(key), str) and value[key].lstrip().startswith("[")
    ]
    return value | {
        key: json_field(value[key], f"{location}: {key!r}", reason="not-json") for key in folded
    }


def form_of_list(value: dict[str, Any], location: str) -> str | None:
    """The format of a record that holds a list of messages; None if it holds none."""
    if value.keys().isdisjoint(_UTTERANCE_KEYS):
        return None
    for key in _CHAT_KEYS:
        entries = value.get(key)
        if entries is None:
            continue
        first = entries[0] if isinstance(entries, list) and entries else None
        if isinstance(first, str):
            return "utterances"
        if not isinstance(first, dict) or "role" in first or "from" in first or "speaker" in first:
            return "openai" if key == "messages" else "sharegpt"
        if "output" in first or "input" in first:
            return "xtuner"
        if "human" in first or "assistant" in first:
            return "firefly"
        if key == "messages":
            return "openai"
        raise SessionError(
            f"{location}: message 1 has {show_keys(first)}, and none of 'role', 'from', 'input', "
            "'output', 'human', 'assistant'; convert it to one of these formats",
            reason="unknown-format",
        )
    for key in _UTTERANCE_KEYS:
        entries = value.get(key)
        if isinstance(entries, list) and entries and isinstance(entries[0], str):
            return "utterances"
    return None


def openai(value: dict[str, Any], location: str) -> Parsed:
    return _entry_a_message(value, ("messages",), location), False


def sharegpt(value: dict[str, Any], location: str) -> Parsed:
    return _entry_a_message(value, ("conversations", "conversation"), location), False


def xtuner(value: dict[str, Any], location: str) -> Parsed:
    messages = system_of(value, location)
    num_entries = 0
    for where, entry in _entries(value, _CHAT_KEYS, location):
        num_entries += 1
        refuse_keys(entry, where)
        _check_xtuner_ending(entry, where)
        for key, role in (("system", "system"), ("input", "user")):
            text = optional_text(entry, key, where)
            if text:
                messages.append(Message(role=role, content=text))
        train, weight = train_and_weight(entry, where, "assistant")
        content = content_of(entry, "output", where)
        messages.append(Message(role="assistant", content=content, train=train, weight=weight))
    return messages, num_entries == 1 and len(messages) == 1


def firefly_pairs(value: dict[str, Any], location: str) -> Parsed:
    messages = system_of(value, location)
    for where, entry in _entries(value, _CHAT_KEYS, location):
        refuse_keys(entry, where)
        train, weight = train_and_weight(entry, where, "assistant")
        messages.append(Message(role="user", content=content_of(entry, "human", where)))
        content = content_of(entry, "assistant", where)
        messages.append(Message(role="assistant", content=content, train=train, weight=weight))
    return messages, False


def utterances(value: dict[str, Any] | list[Any], location: str) -> Parsed:
    messages = []
    if isinstance(value, dict):
        messages = system_of(value, location)
        value = _list_at(value, _UTTERANCE_KEYS, location)
    for number, text in enumerate(value, start=1):
        where = f"{location}: utterance {number}"
        role = "user" if number % 2 else "assistant"
        messages.append(Message(role=role, content=filled(text_of(text, where), where)))
    return messages, False


def system_of(value: dict[str, Any], location: str) -> list[Message]:
    """The system message that stands beside the messages, if there is one."""
    for key in ("system", "system_prompt"):
        system = optional_text(value, key, location)
        if system.strip():
            return [Message(role="system", content=system)]
    return []


def _check_xtuner_ending(entry: dict[str, Any], where: str) -> None:
    if entry.get("need_eos_token") not in (None, True):
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


def _list_at(value: dict[str, Any], keys: tuple[str, ...], location: str) -> list[Any]:
    """The list at the first of the keys that is there; not empty."""
    key = present_key(value, keys, location)
    entries = value[key]
    if not isinstance(entries, list):
        raise wrong_type(location, repr(key), "a list of messages", entries)
    if not entries:
        raise SessionError(
            f"{location}: no messages: {key!r} is an empty list; remove the record",
            reason="no-messages",
        )
    return entries


def _entry_a_message(value: dict[str, Any], keys: tuple[str, ...], location: str) -> list[Message]:
    messages = system_of(value, location)
    messages += [read_message(entry, where) for where, entry in _entries(value, keys, location)]
    return messages


def _entries(
    value: dict[str, Any], keys: tuple[str, ...], location: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, entry) for each entry of the list at the first of the keys that is there."""
    for number, entry in enumerate(_list_at(value, keys, location), start=1):
        if not isinstance(entry, dict):
            raise wrong_type(location, f"message {number}", "an object", entry)
        yield f"{location}: message {number}", entry
