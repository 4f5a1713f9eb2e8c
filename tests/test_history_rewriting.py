"""Templates that write an earlier answer otherwise once more messages follow."""

from typing import Any

import pytest
from session_fixtures import megatron_tokenizer, tiny_hugging_face
from template_jobs import as_messages, chat, encode_all, jinja_template

from megatron_multiturn.encoding import SessionEncoder
from megatron_multiturn.errors import SessionError
from megatron_multiturn.messages import Message
from megatron_multiturn.modes import LEADING_SYSTEM, MESSAGE_START, TARGET_BEGIN
from megatron_multiturn.sessions import Session
from megatron_multiturn.vocabulary import Vocabulary, open_vocabulary

# Drops the reasoning of all answers before the user's last message, as Qwen3's does.
SOURCE = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def thinking(content: str, reasoning: str, **fields: Any) -> Message:
    return Message(role="assistant", content=content, reasoning=reasoning, **fields)


REWRITTEN = chat(
    ("system", "s"),
    ("user", "one"),
    thinking("1", "hm"),
    ("user", "two"),
    Message(role="assistant", content="none", train=False),
    ("user", "three"),
    thinking("3", "well"),
)
KEPT = chat(("user", "one"), thinking("1", "hm"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face())


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return open_vocabulary(tokenizer)


def expected_ids(tokenizer: Any, session: Session, count: int) -> list[int]:
    below = tokenizer._tokenizer.tokenizer
    return below.apply_chat_template(
        as_messages(session, count), chat_template=SOURCE, tokenize=True, return_dict=False
    )


def targets(vocabulary: Vocabulary, document: Any) -> list[str]:
    pieces = zip(document.modes, document.pieces, strict=True)
    return vocabulary.decode([piece for mode, piece in pieces if mode == TARGET_BEGIN])


def test_expanded_documents_are_the_renderings_of_prefixes(
    tokenizer: Any, vocabulary: Vocabulary
) -> None:
    first, second = encode_all(jinja_template(SOURCE, vocabulary), vocabulary, REWRITTEN)
    assert first.ids == expected_ids(tokenizer, REWRITTEN, 3)
    assert second.ids == expected_ids(tokenizer, REWRITTEN, 7)
    assert targets(vocabulary, first) == ["<think>hm</think>\n1<|im_end|>\n"]
    assert targets(vocabulary, second) == ["<think>well</think>\n3<|im_end|>\n"]
    assert first.modes[0] == second.modes[0] == LEADING_SYSTEM | MESSAGE_START
    assert "hm" not in vocabulary.decode([second.ids])[0]


def test_the_last_answer_alone(tokenizer: Any, vocabulary: Vocabulary) -> None:
    template = jinja_template(SOURCE, vocabulary, history_rewriting="last")
    (only,) = encode_all(template, vocabulary, REWRITTEN)
    assert only.ids == expected_ids(tokenizer, REWRITTEN, 7)
    assert targets(vocabulary, only) == ["<think>well</think>\n3<|im_end|>\n"]


def test_rewriting_as_an_error(vocabulary: Vocabulary) -> None:
    template = jinja_template(SOURCE, vocabulary, history_rewriting="error")
    with pytest.raises(
        SessionError, match=r"x.jsonl:1: template made.jinja rewrites message 3 when later messages"
    ) as raised:
        encode_all(template, vocabulary, REWRITTEN)
    assert raised.value.reason == "history-rewritten"
    assert len(encode_all(template, vocabulary, KEPT)) == 1


def test_a_session_that_is_kept_stays_one_document(tokenizer: Any, vocabulary: Vocabulary) -> None:
    calls = chat(("user", "q"), thinking("a", "x"), ("tool", "t"), thinking("b", "y"))
    template = jinja_template(SOURCE, vocabulary)
    for session, turns in ((KEPT, 1), (calls, 2)):
        (only,) = encode_all(template, vocabulary, session)
        assert only.ids == expected_ids(tokenizer, session, len(session.messages))
        assert len(targets(vocabulary, only)) == turns


def test_an_answer_that_is_not_trained_may_be_rewritten(
    tokenizer: Any, vocabulary: Vocabulary
) -> None:
    """Nothing is learnt from it, so the last rendering of it is enough."""
    session = chat(
        ("user", "q"), thinking("a", "x", train=False), ("user", "r"), thinking("b", "y")
    )
    (only,) = encode_all(jinja_template(SOURCE, vocabulary), vocabulary, session)
    assert only.ids == expected_ids(tokenizer, session, 4)
    assert targets(vocabulary, only) == ["<think>y</think>\nb<|im_end|>\n"]


def test_the_users_last_message_can_rewrite(tokenizer: Any, vocabulary: Vocabulary) -> None:
    session = chat(("user", "q"), thinking("a", "x"), ("user", "and?"))
    (only,) = encode_all(jinja_template(SOURCE, vocabulary), vocabulary, session)
    assert only.ids == expected_ids(tokenizer, session, 2)


def test_rewritten_sessions_are_counted_with_their_documents(vocabulary: Vocabulary) -> None:
    encoder = SessionEncoder(jinja_template(SOURCE, vocabulary), vocabulary)
    batch = encoder.encode([KEPT, REWRITTEN, KEPT])
    assert batch.sources.tolist() == [0, 1, 1, 2]
    assert batch.totals["num_rewritten_sessions"] == 1


def test_variables_decide_too(vocabulary: Vocabulary) -> None:
    source = SOURCE.replace("loop.index0 > ns.last", "(keep or loop.index0 > ns.last)")
    (only,) = encode_all(jinja_template(source, vocabulary, keep=True), vocabulary, REWRITTEN)
    assert len(targets(vocabulary, only)) == 2
    own = chat(*REWRITTEN.messages, template_variables={"keep": False})
    assert len(encode_all(jinja_template(source, vocabulary, keep=True), vocabulary, own)) == 2
