"""Which answers --train-on leaves to be trained on."""

from dataclasses import replace

import numpy as np
import pytest
from session_fixtures import megatron_tokenizer, tiny_hugging_face

from megatron_multiturn.encoding import SessionEncoder
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.messages import Message, ToolCall
from megatron_multiturn.modes import TARGET_BEGIN
from megatron_multiturn.plain_chats import PlainChat
from megatron_multiturn.sessions import Session
from megatron_multiturn.supervision import TRAIN_ON, select_answers
from megatron_multiturn.template_families import TEMPLATES
from megatron_multiturn.vocabulary import open_vocabulary

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
    message = (
        f"^in.jsonl:7: --train-on {train_on} leaves no answer of the roles assistant: .*or pass "
        "--train-on all"
    )
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


@pytest.mark.parametrize(
    ("train_roles", "train_on", "letters", "expected"),
    [
        (["user"], "all", "uaucta", "x-x---"),
        (["user", "assistant"], "all", "uanct", "xx-x-"),
        (["tool", "assistant"], "last", "uct", "--x"),
        (["tool", "assistant"], "last-exchange", "uauct", "---xx"),
        (["user"], "last", "uaua", "--x-"),
    ],
)
def test_other_roles_can_be_answers(
    train_roles: list[str], train_on: str, letters: str, expected: str
) -> None:
    assert trained(select_answers(drawn(letters), train_on, train_roles)) == expected


def test_a_session_without_the_role_is_refused() -> None:
    with pytest.raises(SessionError, match="leaves no answer of the roles tool"):
        select_answers(drawn("ua"), "all", ["tool"])


def test_only_some_templates_train_other_roles() -> None:
    vocabulary = open_vocabulary(megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face()))
    encoder = SessionEncoder(TEMPLATES["chatml"], vocabulary, train_roles=["user"])
    chat = PlainChat(("user", "assistant"), ["q", "a"], "x:1")
    for session in (chat, chat.session()):
        batch = encoder.encode([session])
        encoded = batch.session(0)
        ends = np.cumsum(encoded.segment_lengths)
        pieces = [piece.tolist() for piece in np.split(encoded.tokens, ends[:-1])]
        targets = [
            text
            for text, mode in zip(vocabulary.decode(pieces), encoded.modes.tolist(), strict=True)
            if mode == TARGET_BEGIN
        ]
        assert targets == ["q<|im_end|>"]
    with pytest.raises(ConfigError, match=r"--train-roles user: template 'firefly' marks only"):
        SessionEncoder(TEMPLATES["firefly"], vocabulary, train_roles=["user"])
