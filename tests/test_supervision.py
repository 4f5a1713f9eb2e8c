"""Which answers --train-on leaves to be trained on."""

from dataclasses import replace

import pytest

from megatron_multiturn.errors import SessionError
from megatron_multiturn.messages import Message, ToolCall
from megatron_multiturn.sessions import Session
from megatron_multiturn.supervision import TRAIN_ON, select_answers

CALL = (ToolCall(name="f"),)


def drawn(letters: str) -> Session:
    """u user, t tool, a answer, A one that says train true, n one that is left out, c a call."""
    made = {
        "u": Message(role="user", content="q"),
        "t": Message(role="tool", content="r"),
        "a": Message(role="assistant", content="a"),
        "A": Message(role="assistant", content="a", train=True),
        "n": Message(role="assistant", content="a", train=False),
        "c": Message(role="assistant", content="", tool_calls=CALL),
    }
    return Session(messages=tuple(made[letter] for letter in letters), location="in.jsonl:7")


def trained(session: Session) -> str:
    return "".join("x" if message.is_answer else "-" for message in session.messages)


@pytest.mark.parametrize(
    ("train_on", "letters", "expected"),
    [
        ("all", "uauctA", "-x-x-x"),
        ("all", "unuct", "---x-"),
        ("last", "uauctA", "-----x"),
        ("last", "uAuau", "---x-"),
        ("last", "auct", "--x-"),
        ("last-exchange", "uauctcta", "---x-x-x"),
        ("last-exchange", "uauctn", "---x--"),
        ("last-exchange", "aca", "xxx"),
        ("assistant", "uauctA", "-x---x"),
        ("assistant", "unucta", "-----x"),
    ],
)
def test_answers_are_chosen(train_on: str, letters: str, expected: str) -> None:
    assert trained(select_answers(drawn(letters), train_on)) == expected


@pytest.mark.parametrize(
    ("train_on", "letters"),
    [("last", "uaun"), ("last-exchange", "uau"), ("last-exchange", "uaun"), ("assistant", "uct")],
)
def test_a_session_without_an_answer_left_is_refused(train_on: str, letters: str) -> None:
    message = f"^in.jsonl:7: --train-on {train_on} leaves no answer.*or pass --train-on all"
    with pytest.raises(SessionError, match=message) as caught:
        select_answers(drawn(letters), train_on)
    assert caught.value.reason == "nothing-to-train"


@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_plain_text_is_trained_on(train_on: str) -> None:
    text = replace(drawn("a"), plain=True)
    assert select_answers(text, train_on) is text


def test_nothing_but_train_changes() -> None:
    given = drawn("uauca")
    chosen = select_answers(given, "last")
    assert [replace(one, train=None) for one in chosen.messages] == list(given.messages)
    assert select_answers(given, "all") is given


def test_weights_that_a_dataset_cannot_hold_are_refused() -> None:
    heavy = replace(drawn("a").messages[0], weight=0.5)
    session = replace(drawn("uaua"), messages=(*drawn("u").messages, heavy, *drawn("ua").messages))
    with pytest.raises(SessionError, match=r"^in.jsonl:7: message 2 has the weight 0.5") as caught:
        select_answers(session, "all")
    assert caught.value.reason == "weight"
    assert trained(select_answers(session, "last")) == "---x"  # what is context weighs nothing
