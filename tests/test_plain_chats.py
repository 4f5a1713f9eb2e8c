"""Chats read in a hurry are the sessions that the careful reader makes, or none."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutated_records import bent_line, whole_records

from megatron_multiturn import plain_chats
from megatron_multiturn.errors import SessionError
from megatron_multiturn.plain_chats import read_plain_chat
from megatron_multiturn.record_blocks import RawRecord
from megatron_multiturn.sessions import FORMATS, parse_session

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
FORMS = ("auto", *FORMATS)


def check_alike(data: bytes, form: str = "auto") -> bool:
    """Whether it is read in a hurry; then the careful reader reads the same."""
    record = RawRecord(data=data, location="x.jsonl:7")
    chat = read_plain_chat(record, form)
    if chat is not None:
        assert chat.session() == parse_session(record, form=form)
    return chat is not None


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ({"messages": [USER, ANSWER]}, "auto"),
        ({"id": 3, "messages": [USER, ANSWER, USER, ANSWER], "source": "x"}, "openai"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "auto",
        ),
        ({"conversations": [USER, ANSWER]}, "sharegpt"),
        ({"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]}, "auto"),
        ({"messages": [{"role": "tool", "content": "\u00e9\U00020000"}, ANSWER]}, "auto"),
    ],
)
def test_common_chats_are_read_in_a_hurry(value: Any, form: str) -> None:
    assert check_alike(json.dumps(value).encode(), form)
    assert check_alike(json.dumps(value, ensure_ascii=False).encode(), form)


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [USER, ANSWER], "tools": [{"name": "f"}]},
        {"messages": [USER, ANSWER], "system": "s"},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"x": 1}},
        {"messages": [USER, ANSWER], "images": ["x"]},
        {"messages": [USER, ANSWER], "weight": 2},
        {"messages": [USER, ANSWER | {"train": False}, ANSWER]},
        {"messages": [USER, ANSWER | {"weight": 2}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [USER, {"from": "gpt", "value": "a"}]},
        {"messages": [USER, {"role": "function_call", "content": '{"name": "f"}'}]},
        {"messages": [USER, {"role": "assistant", "content": "\u3000\n"}]},
        {"messages": [USER, {"role": "assistant", "content": ""}, ANSWER]},
        {"messages": [USER]},
        {"messages": []},
        {"messages": "[]"},
        {"messages": {"role": "user"}},
        {"messages": [USER, {"role": ["user"], "content": "x"}, ANSWER]},
        {"messages": [USER, {"role": "Assistant", "content": "a"}]},
        {"messages": ["q", "a"]},
        {"messages": None, "text": "t"},
        [USER, ANSWER],
        "text",
        None,
    ],
    ids=str,
)
def test_all_else_is_left_to_the_careful_reader(value: Any) -> None:
    assert not check_alike(json.dumps(value).encode())


@pytest.mark.parametrize("form", FORMS)
def test_the_format_that_is_asked_for_counts(form: str) -> None:
    for key in ("messages", "conversations"):
        data = json.dumps({key: [USER, ANSWER]}).encode()
        wanted = {"messages": ("auto", "openai"), "conversations": ("auto", "sharegpt")}[key]
        assert check_alike(data, form) == (form in wanted)


@pytest.mark.parametrize(
    "data",
    [b'{"messages": [', b"\xff", b"\xef\xbb\xbf{}", b'{"messages": [NaN]}', b"", b"[" * 5000],
)
def test_what_is_not_json_is_left_to_the_careful_reader(data: bytes) -> None:
    assert not check_alike(data)


def test_half_a_surrogate_is_left_to_the_careful_reader() -> None:
    data = b'{"messages": [{"role": "assistant", "content": "a\\ud800"}]}'
    assert not check_alike(data)
    with pytest.raises(SessionError, match="half a surrogate pair"):
        parse_session(RawRecord(data=data, location="x:1"))


@settings(max_examples=400, deadline=None)
@given(draw=st.randoms(use_true_random=False), form=st.sampled_from(FORMS))
def test_bent_records_are_read_alike(draw: random.Random, form: str) -> None:
    check_alike(bent_line(draw), form)


def test_without_orjson_all_is_left_to_the_careful_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_chats, "_orjson", None)
    assert not check_alike(json.dumps({"messages": [USER, ANSWER]}).encode())


def test_some_whole_records_are_read_in_a_hurry() -> None:
    found = [check_alike(json.dumps(record).encode()) for record in whole_records()]
    assert any(found)
    assert not all(found)
