"""Input formats, and each kind of bad input with its place and remedy."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import make_record, write_jsonl

from megatron_multiturn import json_lists, sessions
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.records import RawRecord, check_input_files, read_records
from megatron_multiturn.sessions import Session, parse_session, read_sessions

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {}}


def call(calls: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": calls}]}


def parse(record: Any, form: str = "auto") -> Session:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_session(RawRecord(data=data, location="in.jsonl:7"), form=form)


BAD_SESSIONS = {
    "not JSON": (b'{"messages": [', "not-json", "not JSON .*one line is one whole object"),
    "deep JSON": (b"[" * 100_000, "not-json", "not JSON"),
    "not an object": (5, "wrong-type", "record must be an object, not 5"),
    "a list of no texts": ([1], "wrong-type", "an object, or a list of texts, not \\[1\\]"),
    "an empty list": ([], "no-assistant", "among the roles \\(none\\)"),
    "one utterance": (["q"], "no-assistant", "no assistant message among the roles user"),
    "an empty utterance": (["q", " "], "empty-content", "utterance 2 has empty content"),
    "invalid UTF-8": (b'{"messages": "\xff"}', "not-utf8", "byte 0xff at position 14 is not UTF-8"),
    "second BOM": (codecs.BOM_UTF8 + b"{}", "not-json", "byte-order mark"),
    "half a surrogate": (
        b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
        "not-utf8",
        "message 1: 'content' holds half a surrogate pair",
    ),
    "no messages": ({"body": "t"}, "no-messages", 'no messages: the record has only "body"'),
    "unknown entries": (
        {"conversations": [{"q": "x", "a": "y"}]},
        "unknown-format",
        'message 1 has only "q", "a", and none of',
    ),
    "no keys": ({}, "no-messages", "the record has no keys"),
    "empty list": ({"messages": []}, "no-messages", "'messages' is an empty list"),
    "not a list": ({"messages": "hi"}, "wrong-type", "'messages' must be a list of messages"),
    "a list as broken text": (
        {"messages": "[{"},
        "not-json",
        "'messages' is text that is not JSON",
    ),
    "entry": ({"messages": [5]}, "wrong-type", "message 1 must be an object, not 5"),
    "unknown role": (
        {"messages": [USER, {"role": "narrator", "content": "a"}]},
        "unknown-role",
        'message 2 has the unknown role "narrator"; known are system, ',
    ),
    "role of a wrong type": (
        {"messages": [{"role": ["user"], "content": "a"}]},
        "unknown-role",
        "unknown role",
    ),
    "unknown from": (
        {"conversations": [{"from": "nobody", "value": "a"}]},
        "unknown-role",
        'unknown from "nobody"',
    ),
    "empty content": (
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        "empty-content",
        "message 2 has empty content",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "empty-content", "message 1 has no 'content'"),
    "empty output": ({"conversation": [{"input": "q", "output": ""}]}, "empty-content", "empty"),
    "content of a wrong type": (
        {"messages": [{"role": "user", "content": 5}]},
        "wrong-type",
        "'content': the value must be text, not 5",
    ),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "not-text",
        "content part 1 is .* only .* parts can be trained on",
    ),
    "call without a name": (
        call([{"id": "1"}]),
        "wrong-tool-call",
        "message 2: 'tool_calls': call 1 has the name null; name the tool",
    ),
    "call of another type": (
        call([{"type": "custom", "custom": {"name": "f"}}]),
        "wrong-tool-call",
        "call 1 is .*only calls like",
    ),
    "call that is no object": (call([5]), "wrong-tool-call", "call 1 is 5, .*|call 1 is 5; only"),
    "calls that are no list": (call(7), "wrong-tool-call", "'tool_calls' is 7; it must be"),
    "calls as broken text": (
        call("[{]"),
        "wrong-tool-call",
        "'tool_calls' is text that is not JSON",
    ),
    "arguments that are no object": (
        call([{"name": "f", "arguments": "[1]"}]),
        "wrong-tool-call",
        "call 1: 'arguments' is \\[1\\]; it must be an object, or its JSON text",
    ),
    "arguments as broken text": (
        call([{"function": {"name": "f", "arguments": "{x"}}]),
        "wrong-tool-call",
        "call 1: 'arguments' is text that is not JSON .*{x",
    ),
    "arguments that JSON lacks": (
        call([{"name": "f", "arguments": '{"x": NaN}'}]),
        "wrong-tool-call",
        "holds a number that JSON does not have",
    ),
    "a ShareGPT call in words": (
        {"conversations": [{"from": "function_call", "value": "I call f"}]},
        "wrong-tool-call",
        "message 1: 'value' is text that is not JSON",
    ),
    "an empty ShareGPT call": (
        {"conversations": [{"from": "function_call", "value": ""}]},
        "empty-content",
        "message 1 has empty content",
    ),
    "both spellings of calls": (
        {"messages": [USER, ANSWER | {"tool_calls": [CALL], "function_call": CALL}]},
        "wrong-tool-call",
        "message 2: both 'tool_calls' and 'function_call'",
    ),
    "a user calls": (
        {"messages": [USER | {"tool_calls": [CALL]}, ANSWER]},
        "wrong-tool-call",
        'message 1 calls tools but has the role "user"',
    ),
    "tools of a wrong type": (make_record(tools=3), "wrong-tools", "'tools' is 3; it must be"),
    "a tool of a wrong type": (
        make_record(tools=[{"name": "f"}, 5]),
        "wrong-tools",
        "tool 2 is 5; it must be an object",
    ),
    "tools as broken text": (make_record(tools="[{]"), "wrong-tools", "'tools' is text that is no"),
    "tools and functions": (
        make_record(tools=[{"name": "f"}], functions=[{"name": "g"}]),
        "wrong-tools",
        "both 'tools' and 'functions'",
    ),
    "tools on a message": (
        {"messages": [{"role": "system", "content": "s", "tools": [{"name": "f"}]}, USER, ANSWER]},
        "misplaced-key",
        "message 1: 'tools' stands on a message: .*put 'tools' beside the list",
    ),
    "half a surrogate in a tool": (
        b'{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"x": "\\ud800"}]}',
        "not-utf8",
        "tool 1 holds half a surrogate pair",
    ),
    "reasoning of a user": (
        {"messages": [USER | {"reasoning_content": "hm"}, ANSWER]},
        "wrong-reasoning",
        "message 1 has 'reasoning_content' but the role 'user'",
    ),
    "two reasonings": (
        {"messages": [USER, ANSWER | {"reasoning_content": "hm", "thinking": "ah"}]},
        "wrong-reasoning",
        "message 2: 'reasoning_content' and 'thinking' contradict",
    ),
    "variables of a wrong type": (
        make_record(chat_template_kwargs=[1]),
        "wrong-template-variables",
        "'chat_template_kwargs' is \\[1\\]; it must be an object",
    ),
    "variables that are set anyway": (
        make_record(chat_template_kwargs={"messages": []}),
        "wrong-template-variables",
        "sets 'messages', which every template is given",
    ),
    "images": (make_record(images=["x.png"]), "images", "'images' cannot be trained on"),
    "preferences": (make_record(rejected="no"), "rejected", "'rejected' cannot be .*preference"),
    "disliked": (make_record(kto_tag=False), "kto-tag", "'kto_tag' cannot be .*preference data"),
    "negative weight": (
        {"messages": [USER, ANSWER | {"weight": -1}]},
        "wrong-weight",
        "message 2: 'weight' is -1; it must be 0 .*or a number from 0.001 to 1000",
    ),
    "infinite weight": (
        {"messages": [USER, ANSWER | {"weight": float("inf")}]},
        "wrong-weight",
        "'weight' is Infinity",
    ),
    "huge weight": (
        {"messages": [USER, ANSWER | {"weight": 10**400}]},
        "wrong-weight",
        "'weight' is 1000",
    ),
    "weight that is no number": (
        {"messages": [USER, ANSWER | {"weight": True}]},
        "wrong-weight",
        "'weight' is true",
    ),
    "weight of a part": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "text", "text": "a", "weight": 0.5}]},
            ]
        },
        "wrong-weight",
        "content part 1: 'weight' is 0.5, but a turn has one weight",
    ),
    "train of a wrong type": (
        {"messages": [USER, ANSWER | {"train": "no"}]},
        "wrong-type",
        "'train' must be true or false",
    ),
    "contradiction": (
        {"messages": [USER, ANSWER | {"train": True, "weight": 0}]},
        "wrong-train",
        "message 2: 'train' and 'weight' contradict each other",
    ),
    "weight of the session": (
        make_record(weight=0.5),
        "wrong-train",
        "'weight' is 0.5 for the whole session, .*put 'weight' on the messages",
    ),
    "user trained on": (
        {"messages": [USER | {"train": True}, ANSWER]},
        "untrainable-role",
        "message 1 is to be trained on but has the role 'user'",
    ),
    "user part trained on": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q", "train": True}]},
                ANSWER,
            ]
        },
        "untrainable-role",
        "content part 1 is to be trained on but has the role 'user'",
    ),
    "no assistant": ({"messages": [USER]}, "no-assistant", "no assistant message among the roles"),
    "nothing to train on": (
        {"messages": [USER, ANSWER | {"train": False}]},
        "nothing-to-train",
        "every answer has train false",
    ),
    "no EOS": (
        {"conversation": [{"input": "q", "output": "a", "need_eos_token": False}]},
        "need-eos-token",
        "'need_eos_token' is false",
    ),
    "separator": (
        {"conversation": [{"input": "q", "output": "a", "sep": "\n"}]},
        "sep",
        "'sep' is",
    ),
    "speakers out of turn": (
        {"instruction": "Human:a\nHuman:b\nAssistant:", "output": "c"},
        "not-alternating",
        "speech 2 of 'instruction' is Human's again: .*--format alpaca",
    ),
    "no answer": ({"title": "t", "answer": " "}, "empty-content", "has empty content"),
    "empty text": ({"text": ""}, "empty-content", "has empty content"),
    "a prompt of no messages": (
        {"prompt": [1], "completion": [ANSWER]},
        "wrong-type",
        "message 1 of 'prompt' must be an object, not 1",
    ),
    "history of no pairs": (
        {"query": "q", "response": "a", "history": [{"x": 1}]},
        "wrong-type",
        "pair 1 of 'history' must be",
    ),
    "history that is no list": (
        {"instruction": "q", "output": "a", "history": {"q": "a"}},
        "wrong-type",
        "'history' must be a list of",
    ),
    "history": (
        {"instruction": "q", "output": "a", "history": [["x"]]},
        "wrong-type",
        "pair 1 of 'history' must be \\[question, answer\\]",
    ),
}


@pytest.mark.parametrize("name", BAD_SESSIONS)
def test_bad_sessions_say_where_what_and_why(name: str) -> None:
    record, reason, message = BAD_SESSIONS[name]
    with pytest.raises(SessionError, match=f"^in.jsonl:7.*{message}") as caught:
        parse(record)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_what_lies_too_deep_has_its_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RecursionError

    monkeypatch.setattr(sessions, "_parse", fail)  # where the limit lies differs between Pythons
    with pytest.raises(SessionError, match="lists and objects lie too deep") as caught:
        parse({"messages": [USER, ANSWER]})
    assert caught.value.reason == "too-deep"


def test_the_named_format_is_meant() -> None:
    with pytest.raises(SessionError, match=r"'conversations' or .* is missing, .*--format"):
        parse({"messages": [USER, ANSWER]}, "sharegpt")


def test_harmless_keys_and_empty_tools_are_let_pass() -> None:
    record = make_record(tools="[]", images=[], id="x")
    assert len(parse(record).messages) == 4


def test_reading_goes_on_after_a_bad_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [make_record(1), "{", "", b"\xff", make_record(3)])
    found = list(read_sessions([path]))
    assert [type(one) for one in found] == [Session, SessionError, SessionError, Session]
    assert str(found[1]).startswith(f"{path}:2: ")
    assert str(found[2]).startswith(f"{path}:4: ")  # the blank line counts as a line
    assert isinstance(found[3], Session)
    assert found[3].location == f"{path}:5"
    assert len(found[3].messages) == 6


@pytest.mark.parametrize("read_bytes", [1, 3, 1 << 20])
def test_a_json_list_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(json_lists, "_READ_BYTES", read_bytes)
    wanted = [{"a": "山", "b": [1, {"c": "]},\n"}]}, 123, {"d": "\\"}]
    path = tmp_path / "in.json"
    path.write_text(json.dumps(wanted, indent=1, ensure_ascii=False), encoding="utf-8")
    found = list(read_records(str(path)))
    assert [json.loads(record.data) for record in found] == wanted
    lines = path.read_text(encoding="utf-8").split("\n")
    line_of_123 = 1 + next(number for number, line in enumerate(lines) if "123" in line)
    assert [record.location for record in found] == [
        f"{path}:2 (item 1)",
        f"{path}:{line_of_123} (item 2)",
        f"{path}:{line_of_123 + 1} (item 3)",
    ]


def test_a_value_cut_by_the_window_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lists, "_READ_BYTES", 1)
    path = tmp_path / "in.json"
    path.write_text("[123, 456]")
    assert [record.data for record in read_records(str(path))] == [b"123", b"456"]


def test_a_leading_bom_is_no_content(tmp_path: Path) -> None:
    for text in ('{"a": 1}\n', '[{"a": 1}]'):
        path = tmp_path / "in"
        path.write_bytes(codecs.BOM_UTF8 + text.encode())
        assert [json.loads(record.data) for record in read_records(str(path))] == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "only white space"),
        (codecs.BOM_UTF16_LE + b"x\0", "in:1: the file is UTF-16; convert it, .*iconv"),
        (b"[]", "in:1: the list is empty"),
        (b'[{"a": 1}, {"a":\n 2', "in:1: item 2 of the JSON list is broken"),
        (b'[{"a": 1}\n{"a": 2}]', "in:2: item 1 .* expected, found '{'"),
        (b'[{"a": 1}', "in:1: item 1 .*expected, found ''"),
        (b'[{"a": 1},]', "item 2 of the JSON list is broken"),
        (b'[{"a": 1}]\n[{"a": 2}]', "in:2: '\\[' follows after the end of the list"),
        (b'[\n{"a": "\xff"}]', "in:2: byte 0xff is not UTF-8"),
    ],
)
def test_files_that_cannot_be_read_on_from(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "in"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read_records(str(path)))


def test_missing_files_and_folders_are_found_before_the_work(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [make_record()])
    with pytest.raises(ConfigError, match=r"gone.jsonl: no such file; check --input"):
        check_input_files([good, str(tmp_path / "gone.jsonl")])
    with pytest.raises(ConfigError, match="is a folder, where a file is wanted"):
        check_input_files([str(tmp_path)])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        check_input_files([str(tmp_path / "pipe")])
    check_input_files([good])
