"""Records of one question and its answer -> the messages of a session.

    alpaca   {"instruction": "...", "input": "", "output": "...", "history": [["q", "a"], ...]}
    belle    the same, with "Human:...\\nAssistant:...\\nHuman:...\\nAssistant:" as instruction
    firefly  {"kind": "...", "input": "...", "target": "..."}
    qa       {"title": "...", "desc": "...", "content": "..."}: title and desc are the question;
             {"query": ..., "response": ...}, {"question": ..., "answer": ...}, {"prompt": ...,
             "completion": ...}, of texts, or of messages where prompts are not trained on
    text     {"text": "..."}: pre-training text

All may have `system` and `history` besides.
"""

import re
from dataclasses import replace
from typing import Any

from megatron_multiturn.chat_formats import Parsed, system_of
from megatron_multiturn.entries import read_message, train_and_weight
from megatron_multiturn.errors import SessionError
from megatron_multiturn.fields import (
    content_of,
    filled,
    optional_text,
    present_key,
    show,
    text_of,
    wrong_type,
)
from megatron_multiturn.messages import Message

_QUESTION_KEYS = ("query", "question", "prompt", "instruction")
_ANSWER_KEYS = ("response", "answer", "completion", "output")
_PAIR_KEYS = (
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("human", "assistant"),
)
# BELLE's marks of speakers stand at the start of a line.
_BELLE_MARK = re.compile(r"^[ \t]*(Human|Assistant)[:：]", re.MULTILINE)


def form_of_question(value: dict[str, Any]) -> str | None:
    """The format of a record of one question; None if it holds none."""

    def has(*keys: str) -> bool:
        return any(value.get(key) is not None for key in keys)

    if has("instruction"):
        if has("output"):
            return "belle" if _is_belle(value["instruction"]) else "alpaca"
        return "qa" if has(*_ANSWER_KEYS) else "alpaca"
    if has("target") and has("input"):
        return "firefly"
    if has("title") and (has(*_ANSWER_KEYS) or (has("desc") and has("content"))):
        return "qa"
    if has(*_QUESTION_KEYS) and has(*_ANSWER_KEYS):
        return "qa"
    return "text" if has("text") else None


def alpaca(value: dict[str, Any], location: str) -> Parsed:
    messages = _opening(value, location)
    question = content_of(value, "instruction", location)
    more = optional_text(value, "input", location)
    messages.append(Message(role="user", content=f"{question}\n{more}" if more else question))
    messages.append(Message(role="assistant", content=content_of(value, "output", location)))
    return messages, False


def belle(value: dict[str, Any], location: str) -> Parsed:
    """BELLE's conversations, written into the instruction; what has no marks is alpaca."""
    if not _is_belle(value.get("instruction")):
        return alpaca(value, location)
    messages = _opening(value, location)
    text = text_of(value["instruction"], f"{location}: 'instruction'")
    marks = list(_BELLE_MARK.finditer(text))
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    for number, (mark, stop) in enumerate(zip(marks, stops, strict=True), start=1):
        speaker = mark.group(1)
        if speaker != ("Human" if number % 2 else "Assistant"):
            raise SessionError(
                f"{location}: speech {number} of 'instruction' is {speaker}'s again: "
                f"{show(text[mark.start() : stop])}; join it with the one before, or pass "
                "--format alpaca to take the instruction as it stands",
                reason="not-alternating",
            )
        if number == len(marks):  # "Assistant:", which the output answers
            break
        where = f"{location}: speech {number} of 'instruction'"
        role = "user" if speaker == "Human" else "assistant"
        content = filled(text[mark.end() : stop].strip(), where)
        messages.append(Message(role=role, content=content))
    more = optional_text(value, "input", location)
    if more:
        messages[-1] = replace(messages[-1], content=f"{messages[-1].content}\n{more}")
    messages.append(Message(role="assistant", content=content_of(value, "output", location)))
    return messages, False


def firefly_single(value: dict[str, Any], location: str) -> Parsed:
    messages = _opening(value, location)
    messages.append(Message(role="user", content=content_of(value, "input", location)))
    messages.append(Message(role="assistant", content=content_of(value, "target", location)))
    return messages, False


def qa(value: dict[str, Any], location: str) -> Parsed:
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _prompt_completion(value, location)
    messages = _opening(value, location)
    if value.get("title") is not None:
        question = _titled_question(value, location)
        answer_key = present_key(value, ("content", *_ANSWER_KEYS), location)
    else:
        question = content_of(value, present_key(value, _QUESTION_KEYS, location), location)
        more = optional_text(value, "input", location)
        question = f"{question}\n{more}" if more else question
        answer_key = present_key(value, _ANSWER_KEYS, location)
    answer = content_of(value, answer_key, location)
    messages.append(Message(role="user", content=question))
    messages.append(Message(role="assistant", content=answer))
    return messages, False


def text(value: dict[str, Any], location: str) -> Parsed:
    content = content_of(value, "text", location)
    return [Message(role="assistant", content=content)], True


def _titled_question(value: dict[str, Any], location: str) -> str:
    """Title and desc in two lines; a desc that begins with the title, or says nothing, alone."""
    title = content_of(value, "title", location).strip()
    more = optional_text(value, "desc", location).strip()
    if not more or more == title:
        return title
    return more if more.startswith(title) else f"{title}\n{more}"


def _prompt_completion(value: dict[str, Any], location: str) -> Parsed:
    messages = _opening(value, location)
    for key in ("prompt", "completion"):
        for number, entry in enumerate(value[key], start=1):
            if not isinstance(entry, dict):
                raise wrong_type(location, f"message {number} of {key!r}", "an object", entry)
            message = read_message(entry, f"{location}: message {number} of {key!r}")
            if key == "prompt" and message.role == "assistant" and message.train is None:
                message = replace(message, train=False)
            messages.append(message)
    return messages, False


def _opening(value: dict[str, Any], location: str) -> list[Message]:
    """The system message and what was said before."""
    messages = system_of(value, location)
    history = value.get("history") or []
    if not isinstance(history, list):
        raise wrong_type(location, "'history'", "a list of [question, answer] pairs", history)
    for number, entry in enumerate(history, start=1):
        where = f"{location}: pair {number} of 'history'"
        if isinstance(entry, dict) and "role" in entry:
            messages.append(read_message(entry, f"{location}: message {number} of 'history'"))
            continue
        pair = entry
        train, weight = None, 1.0
        if isinstance(entry, dict):
            keys = next((keys for keys in _PAIR_KEYS if keys[0] in entry and keys[1] in entry), ())
            pair = [entry[key] for key in keys]
            train, weight = train_and_weight(entry, where, "assistant")
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong_type(location, f"pair {number} of 'history'", "[question, answer]", entry)
        question, answer = (filled(text_of(one, where), where) for one in pair)
        messages.append(Message(role="user", content=question))
        messages.append(Message(role="assistant", content=answer, train=train, weight=weight))
    return messages


def _is_belle(instruction: Any) -> bool:
    if not isinstance(instruction, str):
        return False
    inside = instruction.strip()
    return inside.startswith(("Human:", "Human：")) and inside.endswith(
        ("Assistant:", "Assistant：")
    )
