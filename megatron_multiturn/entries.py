"""One message of a session, read out of its entry in a record, whatever the keys are called.

    {"role": "assistant", "content": "..."}   also "from" or "speaker", and "value" or "text"

What may stand on it besides:

    train                "train": false (also spelt "loss": false, "weight": 0 and
                         "output_with_loss": false) makes an answer context
    weight               a positive number: the weight of the turn in the objective
    content parts        `content` may be a list of {"type": "text", "text": "...",
                         "train": false} parts, which masks gaps inside an answer
    reasoning_content    what is thought before the answer; also "reasoning", "thinking"
    tool_calls, name, tool_call_id    see `tool_fields`

What would change the meaning and has no place in a Message (images, ...) is refused, not left out.
"""

from typing import Any

from megatron_multiturn.errors import SessionError
from megatron_multiturn.fields import is_blank, refuse_keys, show, text_of, wrong_type
from megatron_multiturn.messages import Message
from megatron_multiturn.tool_fields import parse_calls, read_tool_calls

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3  # a divisor counts what is far smaller as nothing
CALL_ROLES = ("function_call", "tool_call")  # their content is the call
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TRAIN_KEYS = ("train", "loss", "weight", "output_with_loss")
_MISPLACED_KEYS = {
    "tools": "put 'tools' beside the list of messages",
    "functions": "put 'functions' beside the list of messages",
    "function_calls": "name it 'tool_calls'",
}


def read_message(entry: dict[str, Any], where: str) -> Message:
    """The message that an entry holds; raises SessionError."""
    if len(entry) == 2:
        message = _of_two_keys(entry)
        if message is not None:
            return message
    role_key = _present(entry, _ROLE_KEYS)
    given = entry.get(role_key)
    spelling = given.strip().lower() if isinstance(given, str) else None
    role = ROLES.get(spelling) if spelling is not None else None
    if role is None:
        raise SessionError(
            f"{where} has the unknown {role_key} {show(given)}; known are {', '.join(ROLES)}",
            reason="unknown-role",
        )
    refuse_keys(entry, where)
    _refuse_misplaced(entry, where)
    train, weight = train_and_weight(entry, where, role)
    reasoning = _reasoning(entry, where, role)
    content_key = _present(entry, _CONTENT_KEYS)
    content = entry.get(content_key)
    calls = read_tool_calls(entry, where)
    masked: tuple[tuple[int, int], ...] = ()
    if spelling in CALL_ROLES and not calls:
        if is_blank(content):
            raise _empty(entry, content_key, where)
        calls, text = parse_calls(content, f"{where}: {content_key!r}"), ""
    elif isinstance(content, list):
        text, masked = _join_parts(content, where, role)
    else:
        text = "" if content is None else text_of(content, f"{where}: {content_key!r}")
    if calls and role != "assistant":
        raise SessionError(
            f"{where} calls tools but has the role {show(given)}; only an assistant's messages "
            "can: correct the role",
            reason="wrong-tool-call",
        )
    if not text.strip() and not calls and (role != "tool" or content is None):
        raise _empty(entry, content_key, where)
    return Message(
        role=role,
        content=text,
        train=train,
        masked=masked,
        weight=weight,
        reasoning=reasoning,
        tool_calls=calls,
        name=_label(entry, "name", where),
        tool_call_id=_label(entry, "tool_call_id", where),
    )


def _of_two_keys(entry: dict[str, Any]) -> Message | None:
    """The message of a role and a text alone, as most are; None for what needs a closer look."""
    role, content = entry.get("role"), entry.get("content")
    if role is None:
        role, content = entry.get("from"), entry.get("value")
    if type(role) is not str or type(content) is not str or role in CALL_ROLES:
        return None
    if role not in ROLES or not content or content.isspace():
        return None
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            return None
    return Message(role=ROLES[role], content=content)


def train_and_weight(entry: dict[str, Any], where: str, role: str) -> tuple[bool | None, float]:
    """(train, weight): the one meaning of all keys that say so; (None, 1.0) if none is there."""
    train: bool | None = None
    weight = 1.0
    for key in _TRAIN_KEYS:
        flag = entry.get(key)
        if flag is None:
            continue
        if key == "weight":
            weight = _weight(flag, where)
            flag = weight > 0
        if not isinstance(flag, bool):
            raise wrong_type(where, repr(key), "true or false", flag)
        if train is not None and train != flag:
            given = " and ".join(repr(one) for one in _TRAIN_KEYS if entry.get(one) is not None)
            raise SessionError(
                f"{where}: {given} contradict each other; keep one", reason="wrong-train"
            )
        train = flag
    if train and role != "assistant":
        raise SessionError(
            f"{where} is to be trained on but has the role {role!r}; only an assistant's messages "
            "can be targets: remove its 'train'",
            reason="untrainable-role",
        )
    return train, weight or 1.0


def _weight(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT):
        raise SessionError(
            f"{where}: 'weight' is {show(value)}; it must be 0 (not trained on) or a number from "
            f"{MIN_WEIGHT:g} to {MAX_WEIGHT:g}, 1 for what all others weigh",
            reason="wrong-weight",
        )
    return float(value)


def _reasoning(entry: dict[str, Any], where: str, role: str) -> str:
    given = [key for key in _REASONING_KEYS if entry.get(key) not in (None, "")]
    if not given:
        return ""
    texts = {text_of(entry[key], f"{where}: {key!r}") for key in given}
    if len(texts) > 1:
        raise SessionError(
            f"{where}: {' and '.join(map(repr, given))} contradict each other; keep one",
            reason="wrong-reasoning",
        )
    if role != "assistant":
        raise SessionError(
            f"{where} has {given[0]!r} but the role {role!r}; only an assistant reasons: "
            f"remove {given[0]!r}",
            reason="wrong-reasoning",
        )
    return texts.pop()


def _join_parts(parts: list[Any], where: str, role: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of a list of content parts, and the spans in it that are not to be trained on."""
    texts: list[str] = []
    stop = 0
    masked: list[tuple[int, int]] = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            raise SessionError(
                f"{where}: content part {number} is {show(part)}, but only "
                '{"type": "text", "text": "..."} parts can be trained on; remove it',
                reason="not-text",
            )
        here = f"{where}: content part {number}"
        start = stop
        texts.append(text_of(part["text"], here))
        stop += len(texts[-1])
        train, weight = train_and_weight(part, here, role)
        if weight != 1.0:
            raise SessionError(
                f"{here}: 'weight' is {show(part['weight'])}, but a turn has one weight; put it "
                "on the message, or use 0 or 1 here",
                reason="wrong-weight",
            )
        if train is False and stop > start:
            if masked and masked[-1][1] == start:
                start = masked.pop()[0]
            masked.append((start, stop))
    return "".join(texts), tuple(masked)


def _present(entry: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The first of the keys that the entry has, else the first of all."""
    return next((key for key in keys if entry.get(key) is not None), keys[0])


def _refuse_misplaced(entry: dict[str, Any], where: str) -> None:
    for key, remedy in _MISPLACED_KEYS.items():
        if not is_blank(entry.get(key)):
            raise SessionError(
                f"{where}: {key!r} stands on a message: {show(entry[key])}; {remedy}",
                reason="misplaced-key",
            )


def _label(entry: dict[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    return None if value in (None, "") else text_of(value, f"{where}: {key!r}")


def _empty(entry: dict[str, Any], key: str, where: str) -> SessionError:
    content = entry.get(key)
    what = f"has no {key!r}" if content is None else f"has empty content {show(content)}"
    return SessionError(f"{where} {what}; remove the message or fill it in", reason="empty-content")
