"""Input formats, and each kind of bad input with its place and remedy."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import make_record, write_jsonl

from megatron_multiturn import records
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.messages import Message
from megatron_multiturn.records import RawRecord, check_input_files, read_records
from megatron_multiturn.sessions import Session, parse_session, read_sessions

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def parse(record: Any, form: str = "auto") -> Session:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_session(RawRecord(data=data, location="in.jsonl:7"), form=form)


def said(session: Session) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in session.messages]


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "form", "expected"),
    [
        ({"messages": [USER, ANSWER]}, "openai", QA),
        ({"messages": [USER, ANSWER], "system": "s"}, "openai", [("system", "s"), *QA]),
        (
            {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
            "openai",
            [("system", "s"), *QA],
        ),
        (
            {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"output": "b"}]},
            "xtuner",
            [("system", "s"), *QA, ("assistant", "b")],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "f"},
                    {"from": "observation", "value": "o"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "f"), ("tool", "o"), ("assistant", "a")],
        ),
        ({"conversations": [USER, ANSWER]}, "sharegpt", QA),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", QA),
        (
            {"instruction": "q", "input": "x", "output": "a", "history": [["h", "i"]]},
            "alpaca",
            [("user", "h"), ("assistant", "i"), ("user", "q\nx"), ("assistant", "a")],
        ),
    ],
)
def test_formats_are_found_and_named(record: Any, form: str, expected: Any) -> None:
    assert said(parse(record)) == said(parse(record, form)) == expected
    assert not parse(record).plain


def test_xtuner_output_alone_is_plain_text() -> None:
    session = parse({"conversation": [{"system": "", "input": "", "output": "a text"}]})
    assert session.plain
    assert said(session) == [("assistant", "a text")]
    two = parse({"conversation": [{"output": "a"}, {"output": "b"}]})
    assert not two.plain


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"loss": False}])
def test_a_message_can_be_left_out_of_training(flag: dict[str, Any]) -> None:
    session = parse({"messages": [USER, ANSWER | flag, ANSWER]})
    assert [message.train for message in session.messages] == [None, False, None]
    assert [message.is_answer for message in session.messages] == [False, False, True]
    again = parse({"conversations": [{"from": "gpt", "value": "a"} | flag, ANSWER]})
    assert again.messages[0].train is False


@pytest.mark.parametrize("key", ["output_with_loss", "train"])
def test_xtuner_output_without_loss_is_context(key: str) -> None:
    entries = [{"input": "q", "output": "a", key: False}, {"output": "b"}]
    assert parse({"conversation": entries}).messages[1].train is False


def test_content_parts_mask_gaps() -> None:
    parts = [
        {"type": "text", "text": "ab"},
        {"type": "text", "text": "c", "train": False},
        {"type": "text", "text": "d", "train": False},
        {"type": "text", "text": "e"},
    ]
    message = parse({"messages": [{"role": "assistant", "content": parts}]}).messages[0]
    assert message == Message(role="assistant", content="abcde", masked=((2, 4),))
    assert message.runs() == [("ab", True), ("cd", False), ("e", True)]


BAD_SESSIONS = {
    "not JSON": (b'{"messages": [', "not-json", "not JSON .*one line is one whole object"),
    "deep JSON": (b"[" * 100_000, "not-json", "not JSON"),
    "not an object": ([1], "wrong-type", "record must be an object, not \\[1\\]"),
    "invalid UTF-8": (b'{"messages": "\xff"}', "not-utf8", "byte 0xff at position 14 is not UTF-8"),
    "second BOM": (codecs.BOM_UTF8 + b"{}", "not-json", "byte-order mark"),
    "half a surrogate": (
        b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
        "not-utf8",
        "message 1: 'content' holds half a surrogate pair",
    ),
    "no messages": ({"text": "t"}, "no-messages", 'no messages: the record has only "text"'),
    "no keys": ({}, "no-messages", "the record has no keys"),
    "empty list": ({"messages": []}, "no-messages", "'messages' is an empty list"),
    "not a list": ({"messages": "hi"}, "wrong-type", "'messages' must be a list of messages"),
    "entry": ({"messages": ["hi"]}, "wrong-type", 'message 1 must be an object, not "hi"'),
    "unknown role": (
        {"messages": [USER, {"role": "human", "content": "a"}]},
        "unknown-role",
        'message 2 has the unknown role "human"; known are system, ',
    ),
    "role of a wrong type": (
        {"messages": [{"role": ["user"], "content": "a"}]},
        "unknown-role",
        "unknown role",
    ),
    "unknown from": (
        {"conversations": [{"from": "bing", "value": "a"}]},
        "unknown-role",
        'unknown from "bing"',
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
    "tool calls": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
        "tool-calls",
        "message 2: 'tool_calls' is not rendered.*render the calls into",
    ),
    "tools": (make_record(tools=[{"name": "f"}]), "tools", "'tools' is not rendered by any"),
    "tools as text": (make_record(tools='[{"name": "f"}]'), "tools", "'tools' is not rendered"),
    "fractional weight": (
        {"messages": [USER, ANSWER | {"weight": 0.5}]},
        "wrong-weight",
        "message 2: 'weight' is 0.5, .*use 0 or 1",
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


def test_the_named_format_is_meant() -> None:
    with pytest.raises(SessionError, match=r"'conversations' is missing, .*--format"):
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
    monkeypatch.setattr(records, "_READ_BYTES", read_bytes)
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
    monkeypatch.setattr(records, "_READ_BYTES", 1)
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
    with pytest.raises(ConfigError, match=r"is a folder; --input takes files, .*\*.jsonl"):
        check_input_files([str(tmp_path)])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        check_input_files([str(tmp_path / "pipe")])
    check_input_files([good])


@pytest.mark.parametrize(
    ("name", "num_sessions", "num_refused"),
    [
        ("native_formats/fastchat_dummy_conversation.json", 500, 0),
        ("native_formats/identity.json", 91, 0),
        ("native_formats/glaive_toolcall_en_demo.json", 109, 191),
        ("native_formats/glaive_toolcall_zh_demo.json", 100, 200),
        ("sgd/messages_openai.jsonl", 0, 1600),
    ],
)
def test_real_files(shared_data: Path, name: str, num_sessions: int, num_refused: int) -> None:
    found = list(read_sessions([str(shared_data / name)]))
    reasons = [one.reason for one in found if isinstance(one, SessionError)]
    assert reasons == ["tools"] * num_refused
    assert len(found) - len(reasons) == num_sessions
