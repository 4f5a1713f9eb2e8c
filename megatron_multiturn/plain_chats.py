"""Chats of roles and texts alone, as most are, read in a hurry.

What is read here comes out of `sessions.parse_session` alike; everything else is left to it, and
so are all errors.
"""

import importlib
from typing import Any, NamedTuple

from megatron_multiturn.entries import CALL_ROLES, ROLES
from megatron_multiturn.fields import REFUSED_KEYS
from megatron_multiturn.messages import Message
from megatron_multiturn.records import RawRecord
from megatron_multiturn.sessions import Session

try:
    _orjson: Any = importlib.import_module("orjson")
except ImportError:  # an installation without what it asks for
    _orjson = None

_ROLES = {spelling: role for spelling, role in ROLES.items() if spelling not in CALL_ROLES}
# Where the list of messages is, by the format that is asked for.
_LISTS = {
    "auto": ("messages", "conversations"),
    "openai": ("messages",),
    "sharegpt": ("conversations",),
}
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
# What means something besides the messages.
_KEYS_WITH_MEANING = frozenset(
    {"system", "system_prompt", "tools", "functions", "chat_template_kwargs", "train", "weight"}
    | set(REFUSED_KEYS)
)


class PlainChat(NamedTuple):
    """A session of which only the roles and the texts matter."""

    roles: tuple[str, ...]
    contents: list[str]
    location: str

    def session(self) -> Session:
        messages = zip(self.roles, self.contents, strict=True)
        return Session(
            messages=tuple(Message(role=role, content=content) for role, content in messages),
            location=self.location,
        )


def read_plain_chat(record: RawRecord, form: str) -> PlainChat | None:
    """The chat that a record holds; None if it takes a closer look.

    form: a key of `sessions.FORMATS`, or "auto".
    """
    names = _LISTS.get(form)
    if names is None or _orjson is None:
        return None
    try:
        value = _orjson.loads(record.data)
    except ValueError:
        return None
    if type(value) is not dict or not _KEYS_WITH_MEANING.isdisjoint(value):
        return None
    entries: Any = next((value[name] for name in names if value.get(name) is not None), None)
    if type(entries) is not list:
        return None
    for role_key, content_key in _MESSAGE_KEYS:
        try:
            roles = tuple([_ROLES[entry[role_key]] for entry in entries])
            contents = [entry[content_key] for entry in entries]
            # Of anything but text, `isspace` raises TypeError.
            is_plain = not any(map(str.isspace, contents)) and all(contents)
        except (KeyError, TypeError):
            continue
        if is_plain and sum(map(len, entries)) == 2 * len(entries) and "assistant" in roles:
            return PlainChat(roles, contents, record.location)
    return None
