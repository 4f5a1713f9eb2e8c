"""Hugging Face's chat templates: ids and mask, against transformers' own."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import make_session, megatron_tokenizer, tiny_hugging_face
from template_jobs import (
    MARKED,
    UNMARKED,
    as_messages,
    chat,
    encode_all,
    family_template,
    jinja_template,
)

from megatron_multiturn.encoding import SessionEncoder
from megatron_multiturn.errors import MultiTurnError, SessionError
from megatron_multiturn.messages import Message, ToolCall
from megatron_multiturn.modes import LEADING_SYSTEM, MESSAGE_START, TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.sessions import Session, read_sessions
from megatron_multiturn.vocabulary import Vocabulary, open_vocabulary

FAMILIES = [
    ("llama3", "llama3_training"),
    ("qwen2_5", "qwen2_5_training"),
    ("qwen2_5_vl", "qwen2_5_vl_training"),
]
UNMARKED_ONLY = [
    *("axolotl_chatml", "axolotl_llama3", "axolotl_mistral_v1", "axolotl_mistral_v2v3"),
    *("axolotl_mistral_v7_tekken", "llama3_1", "llama3_2", "qwen3"),
]
CORPORA = [
    *("smile/messages.jsonl", "sgd/messages.jsonl", "sgd/messages_openai.jsonl"),
    *("alpaca_zh/messages.jsonl", "native_formats/fastchat_dummy_conversation.json"),
    *("native_formats/glaive_toolcall_en_demo.json", "native_formats/identity.json"),
]


def answer(content: str, **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


CALL = ToolCall(name="look", arguments='{"for": "x", "n": [1, 2]}', id="call00001")
EDGE_CASES = {
    "plain": chat(("user", "q"), answer("a")),
    "leading system": chat(("system", "s"), ("user", "q"), answer("a")),
    "two questions": chat(("user", "q"), ("user", "r"), answer("a")),
    "answer first": chat(answer("hello"), ("user", "q"), answer("a")),
    "two answers": chat(("user", "q"), answer("a"), answer("b")),
    "not trained": chat(("user", "q"), answer("a", train=False), ("user", "r"), answer("b")),
    "a gap": chat(("user", "q"), answer("one two three", masked=((4, 7),))),
    "a gap at the end": chat(("user", "q"), answer("one two", masked=((3, 7),))),
    "no tool message": chat(
        ("user", "q"), answer("", tool_calls=(CALL,)), ("tool", ""), answer("a")
    ),
    "white space": chat(("user", "  q \n"), answer("\n a  "), ("user", "r"), answer("b\n\n")),
    "a question at the end": chat(("user", "q"), answer("a"), ("user", "r")),
    "other scripts": chat(("user", "你好🙂"), answer("今天天气\u3000很好 é")),
    "tools": chat(
        ("user", "q"),
        answer("look", tool_calls=(CALL, CALL)),
        Message(role="tool", content='{"found": 1}', name="look", tool_call_id="call00001"),
        answer("a"),
        tools=({"type": "function", "function": {"name": "look", "parameters": {"a": "<&é"}}},),
    ),
}


@pytest.fixture(scope="module")
def tokenizer(shared_tokenizers: Path) -> Any:
    return megatron_tokenizer("HuggingFaceTokenizer", str(shared_tokenizers / "qwen2.5-hf"))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return open_vocabulary(tokenizer)


@pytest.fixture(scope="module")
def tiny() -> Vocabulary:
    return open_vocabulary(megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face()))


def reference(
    tokenizer: Any, source: str, session: Session, count: int | None = None
) -> tuple[list[int], list[int]] | None:
    """(ids, mask) by transformers; None if the template refuses."""
    below = tokenizer._tokenizer.tokenizer
    try:
        found = below.apply_chat_template(
            as_messages(session, count),
            chat_template=source,
            tools=list(session.tools) or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask="{% generation" in source or "{%- generation" in source,
            bos_token="",
            eos_token="<|im_end|>",
            **session.template_variables,
        )
    except Exception:  # a template can raise of every kind
        return None
    return found["input_ids"], found.get("assistant_masks", [])


def source_of(folder: Path, name: str) -> str:
    return (folder / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def outcome(
    name: str, folder: Path, vocabulary: Vocabulary, session: Session, **options: Any
) -> Any:
    """The documents of a session, or the reason why there are none."""
    try:
        return encode_all(family_template(folder, name, vocabulary, **options), vocabulary, session)
    except SessionError as error:
        return error.reason


@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize("name", [*itertools.chain(*FAMILIES), *UNMARKED_ONLY, "qwen3_training"])
def test_ids_are_those_of_apply_chat_template(
    name: str, case: str, tokenizer: Any, vocabulary: Vocabulary, shared_tokenizers: Path
) -> None:
    session = EDGE_CASES[case]
    found = outcome(name, shared_tokenizers, vocabulary, session)
    source = source_of(shared_tokenizers, name)
    expected = reference(tokenizer, source, session)
    if isinstance(found, str):
        # A template may also refuse the messages before an answer, or write none for it.
        assert expected is None or found in ("template-refused", "no-turn-span")
        return
    assert expected is not None
    if len(found) > 1 or name == "qwen3":
        trained = [n for n, m in enumerate(session.messages, start=1) if m.is_answer]
        counts = trained if len(found) > 1 else [len(session.messages), trained[-1]]
        wanted = [reference(tokenizer, source, session, count) for count in counts]
        assert all(one.ids in [pair[0] for pair in wanted if pair] for one in found)
        return
    assert found[0].ids == expected[0]


@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize(("unmarked", "marked"), FAMILIES)
def test_marked_and_unmarked_templates_give_one_mask(
    unmarked: str, marked: str, case: str, vocabulary: Vocabulary, shared_tokenizers: Path
) -> None:
    session = EDGE_CASES[case]
    found = [outcome(name, shared_tokenizers, vocabulary, session) for name in (unmarked, marked)]
    if case == "answer first" and unmarked != "llama3":  # they write something before all messages
        assert found[0] == "no-turn-span"
        assert found[1][0].modes.count(TARGET_BEGIN) == 2
        return
    assert found[0] == found[1]
    assert isinstance(found[0], str) or TARGET_BEGIN in found[0][0].modes


def sampled(folder: Path, step: int) -> Iterator[Session]:
    """Every `step`-th session of the example data."""
    paths = [str(folder / path) for path in CORPORA]
    found = (one for one in read_sessions(paths) if isinstance(one, Session))
    return itertools.islice(found, 0, None, step)


@pytest.mark.parametrize("name", [marked for _, marked in FAMILIES] + ["qwen3_training"])
def test_masks_are_those_of_transformers_on_real_sessions(
    name: str, tokenizer: Any, vocabulary: Vocabulary, shared_tokenizers: Path, shared_data: Path
) -> None:
    _compare_masks(name, tokenizer, vocabulary, shared_tokenizers, sampled(shared_data, 100), 180)


@pytest.mark.slow
@pytest.mark.parametrize("name", [marked for _, marked in FAMILIES] + ["qwen3_training"])
def test_masks_are_those_of_transformers_on_every_tenth_session(
    name: str, tokenizer: Any, vocabulary: Vocabulary, shared_tokenizers: Path, shared_data: Path
) -> None:
    _compare_masks(name, tokenizer, vocabulary, shared_tokenizers, sampled(shared_data, 10), 1800)


def _compare_masks(
    name: str,
    tokenizer: Any,
    vocabulary: Vocabulary,
    folder: Path,
    sessions: Iterator[Session],
    at_least: int,
) -> None:
    source = source_of(folder, name)
    template = family_template(folder, name, vocabulary, markers="verbatim")
    num_turns = num_sessions = 0
    for session in sessions:
        (found,) = encode_all(template, vocabulary, session)
        assert (found.ids, found.mask) == reference(tokenizer, source, session), session.location
        num_sessions += 1
        num_turns += found.modes.count(TARGET_BEGIN)
    assert num_turns > num_sessions >= at_least


@pytest.mark.parametrize(("unmarked", "marked"), FAMILIES)
def test_families_give_one_mask_on_real_sessions(
    unmarked: str, marked: str, vocabulary: Vocabulary, shared_tokenizers: Path, shared_data: Path
) -> None:
    templates = [family_template(shared_tokenizers, n, vocabulary) for n in (unmarked, marked)]
    sessions = list(sampled(shared_data, 100))
    first, second = (SessionEncoder(t, vocabulary).encode(sessions) for t in templates)
    assert not first.errors
    assert first.num_sessions >= len(sessions)
    for name in ("tokens", "modes", "segment_lengths", "first_segments", "sources"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
    assert first.totals == second.totals


def test_a_block_may_begin_within_the_prompt(
    vocabulary: Vocabulary, shared_tokenizers: Path
) -> None:
    """Qwen2.5's blocks begin with the line's end behind the role, which the prompt writes."""
    session = EDGE_CASES["plain"]
    texts = []
    for markers in ("verbatim", "answer"):
        (found,) = outcome(
            "qwen2_5_training", shared_tokenizers, vocabulary, session, markers=markers
        )
        pieces = zip(found.modes, found.pieces, strict=True)
        texts += vocabulary.decode([piece for mode, piece in pieces if mode == TARGET_BEGIN])
    assert texts == ["\na<|im_end|>\n", "a<|im_end|>\n"]


GOLDENS: dict[str, tuple[list[str], list[int]]] = {
    "plain": (
        ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>\n"],
        [MESSAGE_START, TARGET_BEGIN],
    ),
    "leading system": (
        [
            "<|im_start|>system\ns<|im_end|>\n",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
            "a<|im_end|>\n",
        ],
        [MESSAGE_START | LEADING_SYSTEM, MESSAGE_START, TARGET_BEGIN],
    ),
    "answer first": (
        [
            "<|im_start|>assistant\n",
            "hello<|im_end|>\n",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
            "a<|im_end|>\n",
        ],
        [MESSAGE_START, TARGET_BEGIN, MESSAGE_START, TARGET_BEGIN],
    ),
    "two answers": (
        [
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
            "a<|im_end|>\n",
            "<|im_start|>assistant\n",
            "b<|im_end|>\n",
        ],
        [MESSAGE_START, TARGET_BEGIN, MESSAGE_START, TARGET_BEGIN],
    ),
    "not trained": (
        [
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
            "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
            "b<|im_end|>\n",
        ],
        [MESSAGE_START, MESSAGE_START, TARGET_BEGIN],
    ),
    "a gap": (
        [
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
            "one",
            " two",  # a token that reaches into a gap is the gap's
            " three<|im_end|>\n",
        ],
        [MESSAGE_START, TARGET_BEGIN, 0, TARGET_CONTINUE],
    ),
    "a question at the end": (
        [
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
            "a<|im_end|>\n",
            "<|im_start|>user\nr<|im_end|>\n",
        ],
        [MESSAGE_START, TARGET_BEGIN, MESSAGE_START],
    ),
}


@pytest.mark.parametrize("case", GOLDENS)
@pytest.mark.parametrize("source", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_golden_segments(source: str, case: str, tiny: Vocabulary) -> None:
    (found,) = encode_all(jinja_template(source, tiny), tiny, EDGE_CASES[case])
    assert (tiny.decode(found.pieces), found.modes) == GOLDENS[case]


def test_answers_without_a_closing_token_are_counted(tiny: Vocabulary) -> None:
    source = MARKED.replace("{{ body }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}")
    encoder = SessionEncoder(jinja_template(source, tiny), tiny)
    assert encoder.encode([make_session(3)]).totals["num_open_turns"] == 3
    closed = SessionEncoder(jinja_template(MARKED, tiny), tiny)
    assert closed.encode([make_session(3)]).totals["num_open_turns"] == 0


@pytest.mark.parametrize(
    ("source", "match", "reason"),
    [
        (
            "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
            "message 2: template made.jinja does not write the answer behind what it writes to ask",
            "no-turn-span",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
            "answer: {% endif %}",
            "mark answers in the template with {% generation %}",
            "no-turn-span",
        ),
        (
            "{% for m in messages %}{% if m.role == 'tool' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% endif %}{{ m.content }}{% endfor %}",
            "puts no {% generation %} block around this answer, though it has such blocks",
            "no-turn-span",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses the session: roles must alternate; correct the session",
            "template-refused",
        ),
    ],
)
def test_templates_in_which_answers_cannot_be_found(
    source: str, match: str, reason: str, tiny: Vocabulary
) -> None:
    with pytest.raises(MultiTurnError) as raised:
        encode_all(jinja_template(source, tiny), tiny, EDGE_CASES["plain"])
    assert match in str(raised.value)
    assert isinstance(raised.value, SessionError)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("content", "masked", "match"),
    [
        ("a   b", (1, 4), "what is masked at 1 is only white space"),
        ("a xyz", (2, 5), "what is masked, 'xyz', is left out or repeated by the template"),
    ],
)
def test_gaps_that_cannot_be_found(
    content: str, masked: tuple[int, int], match: str, tiny: Vocabulary
) -> None:
    source = UNMARKED.replace("{{- m.content }}", "{{- m.content }}{{ m.content[2:5] }}")
    session = chat(("user", "q"), answer(content, masked=(masked,)))
    with pytest.raises(SessionError, match=match) as raised:
        encode_all(jinja_template(source, tiny), tiny, session)
    assert raised.value.reason == "masked-span"


def test_the_hash_follows_all_that_decides_the_text(tiny: Vocabulary) -> None:
    made = [
        jinja_template(UNMARKED, tiny),
        jinja_template(MARKED, tiny),
        jinja_template(UNMARKED, tiny, history_rewriting="last"),
        jinja_template(MARKED, tiny, markers="verbatim"),
        jinja_template(UNMARKED, tiny, note="x"),
        jinja_template(UNMARKED, tiny, named_tokens={"bos_token": "<s>"}),
    ]
    assert len({template.content_hash for template in made}) == len(made)
    assert jinja_template(UNMARKED, tiny).content_hash == made[0].content_hash


def test_plain_text_needs_no_chat_template(tiny: Vocabulary) -> None:
    session = chat(answer("some text"), plain=True)
    (found,) = encode_all(jinja_template(UNMARKED, tiny), tiny, session)
    assert tiny.decode(found.pieces)[-1] == "some text<|endoftext|>"
