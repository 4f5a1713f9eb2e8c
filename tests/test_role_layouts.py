"""Chats that are filled into the layout of their roles come out as if rendered one by one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_fixtures import (
    megatron_tokenizer,
    tiny_hugging_face,
    tiny_sentencepiece,
    train_sentencepiece,
)

from megatron_multiturn import encoding, message_layouts
from megatron_multiturn.encoding import EncodedBatch, SessionEncoder
from megatron_multiturn.engines import Engine, GigatokenEngine, ReferenceEngine
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.plain_chats import PlainChat
from megatron_multiturn.supervision import TRAIN_ON
from megatron_multiturn.template_families import TEMPLATES
from megatron_multiturn.vocabulary import Vocabulary, open_vocabulary

KINDS = ("byte_level", "sentencepiece", "user_defined", "strips")

# What joins with a neighbour, is read as a control token or looks like a slot of a layout.
TEXTS = st.one_of(
    st.sampled_from(
        [
            "question 1",
            " a ",
            "\n\nb",
            "c\n",
            "今天天气",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_",
            "end|>",
            "</s><s>",
            "\ue0000\ue001",
            ": ",
            "e\u0301",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
).filter(lambda text: not text.isspace())
CHATS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS),
    min_size=1,
    max_size=6,
).filter(lambda messages: any(role == "assistant" for role, _ in messages))


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    literals = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    user_defined = train_sentencepiece(
        tmp_path_factory.mktemp("user"), control_symbols=[], user_defined_symbols=literals[2:]
    )
    strips = train_sentencepiece(tmp_path_factory.mktemp("strips"), remove_extra_whitespaces=True)
    return {
        kind: open_vocabulary(megatron_tokenizer(name, path))
        for kind, name, path in (
            ("byte_level", "HuggingFaceTokenizer", tiny_hugging_face()),
            ("sentencepiece", "SentencePieceTokenizer", tiny_sentencepiece()),
            ("user_defined", "SentencePieceTokenizer", user_defined),
            ("strips", "SentencePieceTokenizer", strips),
        )
    }


_encoders: dict[tuple[Any, ...], SessionEncoder | None] = {}


def encoder_of(vocabulary: Vocabulary, kind: str, template: str, **options: Any) -> Any:
    """One a choice, so that its layouts are used again; None if the vocabulary lacks a token."""
    key = (kind, template, *sorted(options.items()))
    if key not in _encoders:
        try:
            engine: Engine = GigatokenEngine(vocabulary, check_interval=1)
        except ConfigError:
            engine = ReferenceEngine(vocabulary)
        try:
            made = SessionEncoder(TEMPLATES[template], vocabulary, engine=engine, **options)
        except ConfigError:
            made = None
        _encoders[key] = made
    return _encoders[key]


def as_lists(batch: EncodedBatch) -> dict[str, Any]:
    names = ("tokens", "segment_lengths", "modes", "first_segments", "sources")
    return {name: getattr(batch, name).tolist() for name in names} | {
        "errors": [(source, str(error), error.reason) for source, error in batch.errors],
        "totals": {name: number for name, number in batch.totals.items() if number},
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(
    chats=st.lists(CHATS, min_size=1, max_size=4),
    template=st.sampled_from(sorted(TEMPLATES)),
    train_on=st.sampled_from(sorted(TRAIN_ON)),
    literals=st.sampled_from(encoding.LITERAL_CONTROL_TOKENS),
)
def test_filled_layouts_are_the_renderings(
    vocabularies: dict[str, Vocabulary],
    kind: str,
    chats: list[list[tuple[str, str]]],
    template: str,
    train_on: str,
    literals: str,
) -> None:
    encoder = encoder_of(
        vocabularies[kind], kind, template, train_on=train_on, literal_control_tokens=literals
    )
    if encoder is None:
        return
    plain = [
        PlainChat(tuple(role for role, _ in chat), [text for _, text in chat], f"x.jsonl:{line}")
        for line, chat in enumerate(chats, start=1)
    ]
    filled = as_lists(encoder.encode(plain))
    assert filled == as_lists(encoder.encode([chat.session() for chat in plain]))
    # Alone as in company.
    alone = [as_lists(encoder.encode([chat])) for chat in plain]
    assert filled["tokens"] == [token for one in alone for token in one["tokens"]]
    assert filled["modes"] == [mode for one in alone for mode in one["modes"]]


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_layouts_are_used(
    vocabularies: dict[str, Vocabulary], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would compare the slow way with itself."""
    for kind in ("byte_level", "sentencepiece"):
        encoder = encoder_of(vocabularies[kind], kind, template)
        if encoder is None:
            continue
        chat = PlainChat(("system", "user", "assistant"), ["s", "q", "a"], "x:1")
        with monkeypatch.context() as patch:
            patch.setattr(type(TEMPLATES[template]), "documents", _fail)
            first = encoder.encode([chat])
            patch.setattr(type(TEMPLATES[template]), "write_unit", _fail)
            again = encoder.encode([chat._replace(contents=["t", "r", "b"])])
        assert first.modes.tolist() == again.modes.tolist()
        assert not np.array_equal(first.tokens, again.tokens)


def _fail(*_: object) -> None:
    raise AssertionError("rendered")


@pytest.mark.parametrize("template", ["chatml", "firefly", "chatglm"])
def test_the_layouts_kept_are_bounded(
    vocabularies: dict[str, Vocabulary], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_layouts, "_MAX_CHATS", 3)
    monkeypatch.setattr(message_layouts, "_MAX_KEPT_MESSAGES", 8)

    def units_of(encoder: SessionEncoder) -> set[Any]:
        return {*encoder._message_layouts._ends, *encoder._message_layouts._layouts}

    def fresh() -> SessionEncoder:
        return SessionEncoder(TEMPLATES[template], vocabularies["byte_level"])

    encoder, unbounded = fresh(), fresh()
    for length in range(1, 12):
        roles = ("user", *("user", "assistant")[length % 2 :], "assistant") * length
        chat = PlainChat(roles, ["x"] * len(roles), "x:1")
        unbounded.encode([chat])
        alone = fresh()
        alone.encode([chat])
        with monkeypatch.context() as patch:
            patch.setattr(message_layouts, "_MAX_UNITS", 1)
            found = as_lists(encoder.encode([chat]))
        assert found == as_lists(encoder.encode([chat.session()]))
        assert len(encoder._message_layouts._chats) <= 3
        assert all(len(kept) <= 8 for kept in encoder._message_layouts._chats)
        assert units_of(encoder) == units_of(alone)
    assert units_of(unbounded) > units_of(alone)
