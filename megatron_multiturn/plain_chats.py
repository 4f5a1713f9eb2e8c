"""Chats of roles and texts alone, as most are, read in a hurry.

What is read here comes out of `sessions.parse_session` alike; everything else is left to it, and
so are all errors.
"""

from typing import Any, NamedTuple

import orjson

from megatron_multiturn.entries import CALL_ROLES, ROLES
from megatron_multiturn.fields import REFUSED_KEYS
from megatron_multiturn.messages import Message
from megatron_multiturn.records import RawRecord
from megatron_multiturn.sessions import Session

_ROLES = {spelling: role for spelling, role in ROLES.items() if spelling not in CALL_ROLES}
# Where the list of messages is, by the format that is asked for.
_LISTS = {
    "auto": ("messages", "conversations"),
    "openai": ("messages",),
    "sharegpt": ("conversations",),
}
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
    if names is None:
        return None
    try:
        value = orjson.loads(record.data)
    except ValueError:
        return None
    if type(value) is not dict or not _KEYS_WITH_MEANING.isdisjoint(value):
        return None
    entries: Any = next((value[name] for name in names if value.get(name) is not None), None)
    if type(entries) is not list:
        return None
    roles = []
    contents = []
    for entry in entries:
        if type(entry) is not dict or len(entry) != 2:
            return None
        given, content = entry.get("role"), entry.get("content")
        if given is None:
            given, content = entry.get("from"), entry.get("value")
        if type(given) is not str or type(content) is not str or given not in _ROLES:
            return None
        if not content or content.isspace():
            return None
        roles.append(_ROLES[given])
        contents.append(content)
    if "assistant" not in roles:
        return None
    return PlainChat(tuple(roles), contents, record.location)
