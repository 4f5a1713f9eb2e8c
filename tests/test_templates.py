"""What is a target, and which turn it is in, by hand-written segments."""

from dataclasses import replace

import pytest
from session_fixtures import make_session

from megatron_multiturn.messages import Message
from megatron_multiturn.modes import CONTEXT, TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.sessions import Session
from megatron_multiturn.template_families import IM_END, IM_START, TEMPLATES
from megatron_multiturn.templates import BOS, EOS, Part, Segment, Template, rendering_text

FIREFLY = TEMPLATES["firefly"]
CHATML = TEMPLATES["chatml"]


def context(*parts: Part, starts: bool = False, leading: bool = False, masked: str = "") -> Segment:
    """masked: "head", "end" or "head end", where it is what is masked of an answer."""
    return Segment(
        kind=CONTEXT,
        parts=parts,
        starts_message=starts,
        leading_system=leading,
        starts_masked="head" in masked,
        ends_masked="end" in masked,
    )


def begin(*parts: Part) -> Segment:
    return Segment(kind=TARGET_BEGIN, parts=parts)


def go_on(*parts: Part) -> Segment:
    return Segment(kind=TARGET_CONTINUE, parts=parts)


def session(*messages: tuple[str, str] | Message, plain: bool = False) -> Session:
    made = [
        one if isinstance(one, Message) else Message(role=one[0], content=one[1])
        for one in messages
    ]
    return Session(messages=tuple(made), location="x:1", plain=plain)


def answer(content: str, *masked: tuple[int, int], train: bool | None = None) -> Message:
    return Message(role="assistant", content=content, masked=masked, train=train)


OPENING = context(BOS, leading=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            session(("user", "i1"), answer("t1"), ("user", "i2"), answer("t2")),
            [
                OPENING,
                context("i1", EOS, starts=True),
                begin("t1", EOS),
                context("i2", EOS, starts=True),
                begin("t2", EOS),
            ],
        ),
        (
            session(("system", "s"), ("user", "i"), answer("t")),
            [
                context(BOS, "s\n", starts=True, leading=True),
                context("i", EOS, starts=True),
                begin("t", EOS),
            ],
        ),
        (
            session(("user", "i"), answer("f"), ("tool", "r"), ("user", "j"), answer("t")),
            [
                OPENING,
                context("i", EOS, starts=True),
                begin("f", EOS),
                context("r\n", starts=True),
                context("j", EOS, starts=True),
                begin("t", EOS),
            ],
        ),
        (session(answer("t1"), answer("t2")), [OPENING, begin("t1", EOS), begin("t2", EOS)]),
        (
            session(answer("c", train=False), answer("t")),
            [OPENING, context("c", EOS, starts=True), begin("t", EOS)],
        ),
        (
            session(("user", "i"), answer("abc", (1, 2))),
            [
                OPENING,
                context("i", EOS, starts=True),
                begin("a"),
                context("b", masked="head end"),
                go_on("c", EOS),
            ],
        ),
        (
            session(answer("ab", (0, 1)), answer("cd", (1, 2))),
            [
                OPENING,
                context("a", starts=True, masked="end"),
                begin("b", EOS),
                begin("c"),
                context("d", EOS, masked="head"),
            ],
        ),
        (session(answer("text"), plain=True), [context(BOS, starts=True), begin("text", EOS)]),
    ],
)
def test_firefly(given: Session, expected: list[Segment]) -> None:
    assert list(FIREFLY.render(given)) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            session(("system", "s"), ("user", "u"), answer("a")),
            [
                context(IM_START, "system\n", "s", IM_END, "\n", starts=True, leading=True),
                context(IM_START, "user\n", "u", IM_END, "\n", starts=True),
                context(IM_START, "assistant\n", starts=True),
                begin("a", IM_END),
                context("\n"),
            ],
        ),
        (
            session(answer("abc", (1, 2)), answer("d", train=False)),
            [
                context(IM_START, "assistant\n", starts=True),
                begin("a"),
                context("b", masked="head end"),
                go_on("c", IM_END),
                context("\n"),
                context(IM_START, "assistant\n", "d", IM_END, "\n", starts=True),
            ],
        ),
        (
            session(answer("ab", (0, 1))),
            [
                context(IM_START, "assistant\n", "a", starts=True, masked="end"),
                begin("b", IM_END),
                context("\n"),
            ],
        ),
        (session(answer("text"), plain=True), [context(BOS, starts=True), begin("text", EOS)]),
    ],
)
def test_chatml(given: Session, expected: list[Segment]) -> None:
    assert list(CHATML.render(given)) == expected


def test_system_messages_lead_only_at_the_head() -> None:
    given = session(("system", "a"), ("system", "b"), answer("t"), ("system", "c"), answer("t"))
    for template in (FIREFLY, CHATML, TEMPLATES["llama3"], TEMPLATES["plain"]):
        leading = [s.leading_system for s in template.render(given) if s.starts_message]
        assert leading[:3] == [True, True, False] or leading == [True, True, False]
        assert sum(leading) == 2


def test_each_trained_answer_is_one_turn() -> None:
    for template in TEMPLATES.values():
        for turns in (1, 2, 5):
            kinds = [segment.kind for segment in template.render(make_session(turns))]
            assert kinds.count(TARGET_BEGIN) == turns
            assert kinds.count(TARGET_CONTINUE) == 0


def test_rendering_reads_as_documented() -> None:
    given = make_session(2)
    assert rendering_text(FIREFLY.render(given)) == (
        "<s>question 1</s>answer 1</s>question 2</s>answer 2</s>"
    )
    assert rendering_text(CHATML.render(make_session(1))) == (
        "<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\nanswer 1<|im_end|>\n"
    )


def test_special_tokens_spelt_in_text_stay_text() -> None:
    given = session(("user", "<|im_end|></s>"), answer("<s>"))
    for template in TEMPLATES.values():
        texts = [p for s in template.render(given) for p in s.parts if isinstance(p, str)]
        assert any("<|im_end|></s>" in text for text in texts)
        assert any("<s>" in text for text in texts)


def test_the_content_hash_follows_the_rendering() -> None:
    chatml = CHATML
    assert isinstance(chatml, Template)
    hashes = {template.content_hash for template in TEMPLATES.values()}
    assert len(hashes) == len(TEMPLATES)
    assert replace(CHATML).content_hash == CHATML.content_hash
    assert replace(CHATML, opening=(BOS,)).content_hash != CHATML.content_hash

    def without_newline(message: Message, following: Message | None) -> list[tuple[Part, bool]]:
        return chatml.render_message(message, following)[:-1]

    assert replace(chatml, render_message=without_newline).content_hash != CHATML.content_hash
