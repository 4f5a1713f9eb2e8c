"""Records of every format, bent: other values, lost keys, deep nesting, broken bytes."""

import copy
import json
import random
from typing import Any

TEXTS = ["", " ", "\n", "a", "你好", "🙂", "\x00", "\ud800", "<|im_end|>", "</s>", "▁", "x" * 300]
KEYS = (
    "messages conversations conversation role from speaker content value text train weight loss "
    "system input output instruction history query response title desc target human assistant "
    "tools tool_calls function_call name arguments tool_call_id reasoning_content type data "
    "chat_template_kwargs prompt completion images chosen rejected sep need_eos_token"
).split()
NUMBERS = [None, True, False, 0, 1, -1, 0.5, 1e999, -(10**400), 12345678901234567890]
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation"]


def whole_records() -> list[Any]:
    """A sound record of every format."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    return [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "reasoning_content": "r"},
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "a", "train": False},
                        {"type": "text", "text": "b"},
                    ],
                },
            ],
            "chat_template_kwargs": {"x": True},
        },
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "1", "tool_call_id": "i", "name": "f"},
                {"role": "assistant", "content": "a", "train": True, "weight": 1},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "conversation": [
                {"system": "s", "input": "q", "output": "a"},
                {"input": "", "output": "b"},
            ]
        },
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"kind": "k", "input": "q", "target": "a"},
        {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
        {"instruction": "Human:q\nAssistant:a\nHuman:r\nAssistant:", "input": "", "output": "b"},
        {"title": "t", "desc": "d", "content": "a"},
        {"query": "q", "response": "a"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        {"data": ["q", "a", "r", "b"]},
        ["q", "a"],
        {"text": "plain"},
    ]


def any_value(draw: random.Random, depth: int = 3) -> Any:
    """Some JSON value."""
    kind = draw.randrange(10 if depth else 6)
    if kind < 3:
        return draw.choice(TEXTS)
    if kind < 6:
        return draw.choice(
            [None, True, False, 0, 1, -1, 0.5, 1e999, -(10**400), 12345678901234567890]
        )
    if kind == 6:
        return draw.choice(ROLES)
    if kind < 9:
        return [any_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(KEYS): any_value(draw, depth - 1) for _ in range(draw.randrange(4))}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                waiting.append(one[key])
    return found


def bend(record: Any, draw: random.Random) -> Any:
    """A copy of a record with something about it changed, or nothing."""
    record = copy.deepcopy(record)
    for _ in range(draw.randrange(4)):
        places = _places(record)
        if not places:
            return any_value(draw)
        container, key = places[draw.randrange(len(places))]
        change = draw.randrange(6)
        if change == 0:
            del container[key]
        elif change == 1:
            container[key] = draw.choice(TEXTS)
        elif change == 2 and isinstance(container, dict):
            container[draw.choice(KEYS)] = container.pop(key)
        elif change == 3 and isinstance(container, list):
            container.insert(draw.randrange(len(container) + 1), copy.deepcopy(container[key]))
        elif change == 4 and isinstance(container[key], dict | list):
            container[key] = json.dumps(container[key])
        else:
            container[key] = any_value(draw)
    return record


def bent_line(draw: random.Random) -> bytes:
    """A line of a file: a record bent, and perhaps its bytes broken."""
    kind = draw.randrange(20)
    if kind == 0:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(40))).replace(b"\n", b"")
    if kind == 1:
        depth = draw.choice([10, 900, 5000])
        return b'{"messages":' + b"[" * depth + b"]" * draw.choice([depth, 1]) + b"}"
    record = bend(draw.choice(whole_records()), draw)
    line = json.dumps(record, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == 2:
        at = draw.randrange(len(line))
        line = line[:at] + bytes([draw.randrange(256)]) + line[at + draw.randrange(2) :]
    if kind == 3:
        line = line[: draw.randrange(len(line))]
    return line.replace(b"\n", b" ")
