"""Every input format: found out and named, a golden each, and all of them alike."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiturn.errors import SessionError
from megatron_multiturn.messages import Message, ToolCall
from megatron_multiturn.records import RawRecord
from megatron_multiturn.sessions import FORMATS, Session, parse_session, read_sessions

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def parse(record: Any, form: str = "auto") -> Session:
    data = json.dumps(record).encode()
    return parse_session(RawRecord(data=data, location="in.jsonl:7"), form=form)


def user(content: str, **fields: Any) -> Message:
    return Message(role="user", content=content, **fields)


def answer(content: str, **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def tool(content: str, **fields: Any) -> Message:
    return Message(role="tool", content=content, **fields)


CALL_F = ToolCall(name="f", arguments='{"y": 1, "x": "山"}')
ARGUMENTS = {"y": 1, "x": "山"}
QA = [user("q"), answer("a")]

GOLDENS: dict[str, tuple[Any, str, list[Message]]] = {
    "messages": ({"messages": [USER, ANSWER]}, "openai", QA),
    "system beside": ({"messages": [USER, ANSWER], "system": "s"}, "openai", [system("s"), *QA]),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
        "openai",
        [system("s"), *QA],
    ),
    "tool calls": (
        {
            "messages": [
                USER | {"name": "Ann"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "f", "arguments": json.dumps(ARGUMENTS)},
                        },
                        {"function": {"name": "g", "arguments": ""}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "name": "f", "content": ""},
                ANSWER,
            ]
        },
        "openai",
        [
            user("q", name="Ann"),
            answer(
                "",
                reasoning="hm",
                tool_calls=(
                    ToolCall(name="f", arguments='{"y": 1, "x": "山"}', id="c1"),
                    ToolCall(name="g"),
                ),
            ),
            tool("", tool_call_id="c1", name="f"),
            answer("a"),
        ],
    ),
    "function call of before": (
        {
            "messages": [
                USER,
                ANSWER | {"function_call": {"name": "f", "arguments": ARGUMENTS}},
                {"role": "function", "name": "f", "content": "r"},
                ANSWER,
            ]
        },
        "openai",
        [user("q"), answer("a", tool_calls=(CALL_F,)), tool("r", name="f"), answer("a")],
    ),
    "weights": (
        {"messages": [USER, ANSWER | {"weight": 0.5}, USER, ANSWER | {"weight": 0}]},
        "openai",
        [user("q"), answer("a", weight=0.5, train=True), user("q"), answer("a", train=False)],
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {
                    "from": "function_call",
                    "value": json.dumps({"name": "f", "arguments": ARGUMENTS}),
                },
                {"from": "observation", "value": "o"},
                {"from": "gpt", "value": "a"},
            ],
        },
        "sharegpt",
        [system("s"), user("q"), answer("", tool_calls=(CALL_F,)), tool("o"), answer("a")],
    ),
    "sharegpt, several calls": (
        {
            "conversations": [
                {"from": "Human", "value": "q"},
                {"role": "tool_call", "content": json.dumps([{"name": "f"}, {"name": "g"}])},
                {"role": "tool_response", "content": "o"},
                {"from": "chatgpt", "text": "a"},
            ]
        },
        "sharegpt",
        [
            user("q"),
            answer("", tool_calls=(ToolCall(name="f"), ToolCall(name="g"))),
            tool("o"),
            answer("a"),
        ],
    ),
    "sharegpt, role and content": ({"conversations": [USER, ANSWER]}, "sharegpt", QA),
    "a list as text": (
        {"conversations": json.dumps([USER, ANSWER]), "tools": "[]"},
        "sharegpt",
        QA,
    ),
    "history as text": (
        {"instruction": "q", "output": "a", "history": '[["h", "i"]]'},
        "alpaca",
        [user("h"), answer("i"), *QA],
    ),
    "sharegpt, conversation": (
        {"conversation": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        "sharegpt",
        QA,
    ),
    "xtuner": (
        {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"output": "b"}]},
        "xtuner",
        [system("s"), *QA, answer("b")],
    ),
    "firefly, several turns": (
        {
            "conversation_id": 1,
            "category": "Brainstorming",
            "conversation": [
                {"human": "q", "assistant": "a"},
                {"human": "r", "assistant": "b", "train": False},
            ],
            "dataset": "moss",
            "system": "s",
        },
        "firefly",
        [system("s"), *QA, user("r"), answer("b", train=False)],
    ),
    "firefly": ({"kind": "NLI", "input": "q", "target": "a"}, "firefly", QA),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, "alpaca", QA),
    "alpaca with history": (
        {"instruction": "q", "input": "x", "output": "a", "history": [["h", "i"]], "system": "s"},
        "alpaca",
        [system("s"), user("h"), answer("i"), user("q\nx"), answer("a")],
    ),
    "belle": (
        {
            "instruction": "Human:你好\nAssistant: 你好！\n再问？\nHuman：山 Human: 海\nAssistant:",
            "input": "",
            "output": "a",
        },
        "belle",
        [user("你好"), answer("你好！\n再问？"), user("山 Human: 海"), answer("a")],
    ),
    "titled": ({"title": "t", "desc": "d", "content": "a"}, "qa", [user("t\nd"), answer("a")]),
    "titled, desc repeats": (
        {"title": "t", "desc": "t and d", "answer": "a", "category": "x"},
        "qa",
        [user("t and d"), answer("a")],
    ),
    "titled, no desc": ({"title": "t", "desc": "", "content": "a"}, "qa", [user("t"), answer("a")]),
    "query": (
        {"query": "q", "response": "a", "history": [{"role": "user", "content": "h"}, ANSWER]},
        "qa",
        [user("h"), answer("a"), *QA],
    ),
    "question": (
        {"question": "q", "answer": "a", "history": [{"question": "h", "answer": "i"}]},
        "qa",
        [user("h"), answer("i"), *QA],
    ),
    "prompt": ({"prompt": "q", "completion": "a"}, "qa", QA),
    "instruction and response": (
        {"instruction": "q", "input": "x", "response": "a"},
        "qa",
        [user("q\nx"), answer("a")],
    ),
    "prompt of messages": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        "qa",
        [user("q"), answer("a", train=False), user("q"), answer("a")],
    ),
    "utterances": (["q", "a", "r", "b"], "utterances", [*QA, user("r"), answer("b")]),
    "utterances at a key": ({"id": "0", "data": ["q", "a"]}, "utterances", QA),
    "utterances in conversations": ({"conversations": ["q", "a"]}, "utterances", QA),
    "text": ({"text": "a text"}, "text", [answer("a text")]),
    "xtuner, text": (
        {"conversation": [{"system": "", "input": "", "output": "a text"}]},
        "xtuner",
        [answer("a text")],
    ),
}
PLAIN = ("text", "xtuner, text")


@pytest.mark.parametrize("name", GOLDENS)
def test_formats_are_found_and_named(name: str) -> None:
    record, form, messages = GOLDENS[name]
    assert parse(record) == parse(record, form)
    assert parse(record) == Session(
        messages=tuple(messages), location="in.jsonl:7", plain=name in PLAIN
    )


def test_every_format_has_a_golden() -> None:
    assert {form for _, form, _ in GOLDENS.values()} == set(FORMATS)


def test_two_xtuner_outputs_are_no_plain_text() -> None:
    assert not parse({"conversation": [{"output": "a"}, {"output": "b"}]}).plain


def test_alpaca_is_taken_as_it_stands_when_named() -> None:
    record = {"instruction": "Human:q\nAssistant:", "output": "a"}
    assert parse(record).messages == (user("q"), answer("a"))
    assert parse(record, "alpaca").messages == (user("Human:q\nAssistant:"), answer("a"))
    assert parse({"instruction": "q", "output": "a"}, "belle").messages == tuple(QA)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tools": [TOOL]}, (TOOL,)),
        ({"tools": json.dumps([TOOL])}, (TOOL,)),
        ({"tools": [json.dumps(TOOL)]}, (TOOL,)),
        ({"tools": TOOL}, (TOOL,)),
        ({"functions": [TOOL["function"]]}, (TOOL["function"],)),
        ({"tools": "[]", "functions": None}, ()),
        ({"tools": ""}, ()),
    ],
)
def test_tools_are_kept_as_they_are_given(given: dict[str, Any], expected: Any) -> None:
    for record in ({"messages": [USER, ANSWER]}, {"conversations": [USER, ANSWER]}):
        assert parse(record | given).tools == expected


@pytest.mark.parametrize("given", [{"x": {"y": [1]}, "z": "山"}, '{"x": {"y": [1]}, "z": "山"}'])
def test_template_variables_are_of_the_session(given: Any) -> None:
    session = parse({"messages": [USER, ANSWER], "chat_template_kwargs": given})
    assert session.template_variables == {"x": {"y": [1]}, "z": "山"}


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


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(key: str) -> None:
    assert parse({"messages": [USER, ANSWER | {key: "hm"}]}).messages[1].reasoning == "hm"


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


# The same conversation in every format that can hold it.

Turn = tuple[str, str]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def _chat(role: str, content: str, question: str, reply: str) -> Callable[[list[Turn]], Any]:
    def write(pairs: list[Turn]) -> list[dict[str, str]]:
        entries = []
        for asked, answered in pairs:
            entries.append({role: question, content: asked})
            entries.append({role: reply, content: answered})
        return entries

    return write


def _single(question: str, reply: str) -> Callable[[list[Turn]], Any]:
    def write(pairs: list[Turn]) -> dict[str, Any]:
        *before, (asked, answered) = pairs
        return {question: asked, "input": "", reply: answered, "history": before}

    return write


WRITERS: dict[str, Callable[[list[Turn]], Any]] = {
    "openai": lambda pairs: {"messages": _chat("role", "content", "user", "assistant")(pairs)},
    "sharegpt": lambda pairs: {"conversations": _chat("from", "value", "human", "gpt")(pairs)},
    "sharegpt roles": lambda pairs: {
        "conversations": _chat("role", "content", "user", "assistant")(pairs)
    },
    "xtuner": lambda pairs: {"conversation": [{"input": q, "output": a} for q, a in pairs]},
    "firefly": lambda pairs: {"conversation": [{"human": q, "assistant": a} for q, a in pairs]},
    "alpaca": _single("instruction", "output"),
    "qa": _single("query", "response"),
    "utterances": lambda pairs: [text for pair in pairs for text in pair],
}


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60, deadline=None)
@given(pairs=turns)
def test_a_conversation_parses_alike_in_every_format(name: str, pairs: list[Turn]) -> None:
    expected = [message for q, a in pairs for message in (user(q), answer(a))]
    assert parse(WRITERS[name](pairs)).messages == tuple(expected)


@settings(max_examples=60, deadline=None)
@given(
    question=texts,
    reply=texts,
    result=texts,
    arguments=st.dictionaries(texts, st.one_of(st.integers(), texts, st.booleans()), max_size=3),
)
def test_calls_parse_alike_in_every_spelling(
    question: str, reply: str, result: str, arguments: dict[str, Any]
) -> None:
    one = {"name": "f", "arguments": arguments}
    called = {"name": "f", "arguments": json.dumps(arguments)}
    asked, said = {"role": "user", "content": question}, {"role": "assistant", "content": reply}
    back = {"role": "tool", "content": result}

    def session(entry: dict[str, Any], spelling: str = "messages") -> Session:
        return parse({spelling: [asked, entry, back, said], "tools": [TOOL]})

    calling: dict[str, Any] = {"role": "assistant", "content": ""}
    spellings = [
        session(calling | {"tool_calls": [{"type": "function", "function": one}]}),
        session(calling | {"tool_calls": [{"type": "function", "function": called}]}),
        session(calling | {"tool_calls": json.dumps([one])}),
        session(calling | {"function_call": called}),
        session({"from": "function_call", "value": json.dumps(one)}, "conversations"),
        session({"role": "tool_call", "content": json.dumps([one])}, "conversations"),
    ]
    assert all(each == spellings[0] for each in spellings)
    (made,) = spellings[0].messages[1].tool_calls
    assert list(json.loads(made.arguments).items()) == list(arguments.items())


def leaves(depth: int = 3) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(
        "messages conversations conversation role from content value text instruction output input "
        "history tools tool_calls function_call name arguments function weight train title desc "
        "answer query prompt completion data reasoning_content chat_template_kwargs id".split()
    )
    simple = st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.floats(), texts,
        st.sampled_from(["user", "assistant", "human", "gpt", "tool", "function_call", "", "[]"]),
    )  # fmt: skip
    return st.recursive(
        simple,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=5)
        ),
        max_leaves=20,
    )


@settings(max_examples=1500, deadline=None)
@given(record=leaves(), form=st.sampled_from(["auto", *FORMATS]))
def test_any_record_is_a_session_or_has_a_reason(record: Any, form: str) -> None:
    outcome = outcome_of(record, form)
    if isinstance(outcome, Session):
        assert outcome.messages
        return
    assert re.match(r"in\.jsonl:7\b[^\n]*$", str(outcome))
    assert re.fullmatch("[a-z0-9-]+", outcome.reason)


def outcome_of(record: Any, form: str) -> Session | SessionError:
    try:
        return parse(record, form)
    except SessionError as error:
        return error


def test_the_drawn_records_are_of_both_kinds() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=800, deadline=None, derandomize=True, database=None)
    @given(record=leaves(), form=st.sampled_from(["auto", *FORMATS]))
    def count(record: Any, form: str) -> None:
        outcome = outcome_of(record, form)
        seen["kept" if isinstance(outcome, Session) else outcome.reason] += 1

    count()
    assert len(seen) >= 5


@pytest.mark.parametrize(
    ("name", "num_sessions", "num_calls", "num_with_tools", "refused"),
    [
        ("native_formats/fastchat_dummy_conversation.json", 500, 0, 0, {}),
        ("native_formats/identity.json", 91, 0, 0, {}),
        ("native_formats/glaive_toolcall_en_demo.json", 300, 211, 191, {}),
        ("native_formats/glaive_toolcall_zh_demo.json", 300, 216, 200, {}),
        ("alpaca_zh/alpaca_zh.json", 11571, 0, 0, {}),
        ("sgd/messages_openai.jsonl", 1600, 4450, 1600, {}),
        ("smile/messages.jsonl", 3995, 0, 0, {"no-assistant": 4, "empty-content": 1}),
    ],
)
def test_real_files(
    shared_data: Path,
    name: str,
    num_sessions: int,
    num_calls: int,
    num_with_tools: int,
    refused: dict[str, int],
) -> None:
    found = list(read_sessions([str(shared_data / name)]))
    assert Counter(one.reason for one in found if isinstance(one, SessionError)) == refused
    sessions = [one for one in found if isinstance(one, Session)]
    assert len(sessions) == num_sessions
    calls = [one for each in sessions for message in each.messages for one in message.tool_calls]
    assert len(calls) == num_calls
    assert sum(bool(each.tools) for each in sessions) == num_with_tools


def test_alpaca_and_messages_of_the_same_corpus_are_alike(shared_data: Path) -> None:
    native = read_sessions([str(shared_data / "alpaca_zh" / "alpaca_zh.json")])
    converted = read_sessions([str(shared_data / "alpaca_zh" / "messages.jsonl")])
    for one, other in zip(native, converted, strict=True):
        assert isinstance(one, Session)
        assert isinstance(other, Session)
        assert one.messages == other.messages
