"""What a Jinja template is given of a session, and the texts in it."""

import json
from collections.abc import Callable
from typing import Any

from megatron_multiturn.sessions import Message
from megatron_multiturn.turn_spans import Span

STAND_IN = "\ufdd2"  # in the place of a character that is looked for: a noncharacter
_SAFE_KEYS = ("role", "type")  # templates compare their values with names

Replace = Callable[[str, bool], str]  # (text, whether it is the assistant's) -> text


def message_variables(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        made["reasoning_content"] = message.reasoning
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            ({} if call.id is None else {"id": call.id})
            | {
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return made


def is_answer_entry(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") == "assistant"


def texts_in(value: Any, own: bool = False) -> list[tuple[str, bool]]:
    """All texts in it but keys, and whether each is in an assistant's message."""
    if isinstance(value, str):
        return [(value, own)]
    if isinstance(value, dict):
        own = own or ("content" in value and is_answer_entry(value))
        entries = [entry for key, entry in value.items() if key not in _SAFE_KEYS]
    elif isinstance(value, list | tuple):
        entries = list(value)
    else:
        return []
    return [found for entry in entries for found in texts_in(entry, own)]


def keys_in(value: Any) -> list[str]:
    """All keys in it."""
    if isinstance(value, dict):
        return [*value, *(key for entry in value.values() for key in keys_in(entry))]
    if isinstance(value, list | tuple):
        return [key for entry in value for key in keys_in(entry)]
    return []


def map_texts(value: Any, replace: Replace, own: bool) -> Any:
    if isinstance(value, str):
        return replace(value, own)
    if isinstance(value, dict):
        return {
            key: entry if key in _SAFE_KEYS else map_texts(entry, replace, own)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [map_texts(entry, replace, own) for entry in value]
    return value


def stand_in(text: str, spans: list[Span]) -> str:
    """Other characters in the spans, white space aside, on which a template may act."""
    characters = list(text)
    for start, stop in spans:
        for index in range(start, stop):
            if not characters[index].isspace():
                characters[index] = STAND_IN
    return "".join(characters)
