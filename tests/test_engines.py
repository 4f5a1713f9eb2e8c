"""Engines give the ids of the tokenizer's own library, or are not used."""

import itertools
import json
from pathlib import Path
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

from megatron_multiturn import engines
from megatron_multiturn.engines import (
    EncodedTexts,
    GigatokenEngine,
    ReferenceEngine,
    choose_engine,
)
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.vocabulary import Vocabulary, open_vocabulary

pytest.importorskip("gigatoken")


@pytest.fixture(scope="module")
def byte_level() -> Vocabulary:
    return open_vocabulary(megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face()))


@pytest.fixture(scope="module")
def byte_fallback() -> Vocabulary:
    return open_vocabulary(megatron_tokenizer("SentencePieceTokenizer", tiny_sentencepiece()))


def lists(encoded: EncodedTexts) -> list[list[int]]:
    return [encoded[index].tolist() for index in range(len(encoded.offsets) - 1)]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8))
@settings(max_examples=60, deadline=None)
def test_all_engines_give_the_librarys_ids(
    kind: str, texts: list[str], byte_level: Vocabulary, byte_fallback: Vocabulary
) -> None:
    vocabulary = byte_level if kind == "byte_level" else byte_fallback
    engine, note = _kept.setdefault(kind, choose_engine("auto", vocabulary, ["question 1"]))
    assert engine.name == "gigatoken", note
    wanted = vocabulary.encode(texts)
    encoded = engine.encode(texts)
    assert lists(encoded) == wanted == lists(ReferenceEngine(vocabulary).encode(texts))
    assert (encoded.ids.dtype, encoded.offsets.dtype) == (np.int32, np.int64)
    lossy = [text != found for text, found in zip(texts, vocabulary.decode(wanted), strict=True)]
    assert engine.find_lossy(texts, encoded).tolist() == lossy


_kept: dict[str, Any] = {}


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_control_tokens_stay_text(kind: str, request: pytest.FixtureRequest) -> None:
    vocabulary: Vocabulary = request.getfixturevalue(kind)
    control = {vocabulary.id_of(token.literal) for token in vocabulary.control_tokens()}
    text = "a<|im_end|>\n<|im_start|>system </s><s><|endoftext|>b"
    (ids,) = lists(GigatokenEngine(vocabulary).encode([text]))
    assert control.isdisjoint(ids)
    assert vocabulary.decode([ids]) == [text]


def test_text_that_cannot_come_back_is_found(byte_level: Vocabulary) -> None:
    """Of two texts together no length says so; both engines agree."""
    texts = ["plain", "e\u0301", "more"]
    changed = EncodedTexts(
        ids=np.concatenate([byte_level.encode(["plain", "é", "more"])[i] for i in range(3)]).astype(
            np.int32
        ),
        offsets=np.cumsum([0, *map(len, byte_level.encode(["plain", "é", "more"]))]),
    )
    for engine in (ReferenceEngine(byte_level), GigatokenEngine(byte_level)):
        assert engine.find_lossy(texts, changed).tolist() == [False, True, False]


class OneIsOther:
    """A vocabulary that encodes one text otherwise than what it is written as."""

    def __init__(self, vocabulary: Vocabulary, other: str) -> None:
        self._vocabulary = vocabulary
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vocabulary, name)

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._vocabulary.encode(texts)
        return [
            [*ids[:-1], ids[-1] ^ 1] if text == self._other else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]


def test_a_difference_on_the_sample_falls_back_and_says_so(byte_level: Vocabulary) -> None:
    vocabulary: Any = OneIsOther(byte_level, "the odd one")
    sample = ["a text", "the odd one", "another"]
    engine, note = choose_engine("auto", vocabulary, sample)
    assert engine.name == "reference"
    assert "slower reference tokenizer: gigatoken differs" in note
    assert "at id" in note
    assert "'the odd one'" in note
    with pytest.raises(ConfigError, match="differs from the tokenizer's own library"):
        choose_engine("gigatoken", vocabulary, sample)
    assert choose_engine("auto", vocabulary, ["a text"])[0].name == "gigatoken"
    assert choose_engine("reference", vocabulary, sample)[0].name == "reference"


def encode_in_two(engine: GigatokenEngine, texts: list[str]) -> None:
    """The interval goes on from one batch to the next."""
    engine.encode(texts[:6])
    engine.encode(texts[6:])


def test_a_difference_in_the_run_stops_it(byte_level: Vocabulary) -> None:
    vocabulary: Any = OneIsOther(byte_level, "the odd one")
    texts = [f"text {number}" for number in range(11)]
    for position, is_found in ((0, True), (3, False), (4, True), (7, False), (8, True)):
        engine = GigatokenEngine(vocabulary, check_interval=4)
        changed = [*texts[:position], "the odd one", *texts[position + 1 :]]
        if is_found:
            with pytest.raises(ConfigError, match="--tokenizer-engine reference"):
                encode_in_two(engine, changed)
        else:
            encode_in_two(engine, changed)


def test_memory_that_has_grown_is_given_back(
    byte_level: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids stay what they are."""
    engine = GigatokenEngine(byte_level)
    backends = []
    for held in (100, 150, 200, 200, 299, 301, 90, 90, 90, 189, 191):
        monkeypatch.setattr(engines, "_resident_bytes", lambda held=held: held)
        monkeypatch.setattr(engines, "_MAX_GROWTH_BYTES", 100)
        assert lists(engine.encode(["a text"])) == byte_level.encode(["a text"])
        backends.append(engine._backend)
    kept = [one is other for one, other in itertools.pairwise(backends)]
    assert kept == [True, True, True, True, False, True, True, True, True, False]


def test_growth_is_left_to_who_asks(
    byte_level: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = GigatokenEngine(byte_level)
    engine.renews = False
    monkeypatch.setattr(engines, "_MAX_GROWTH_BYTES", 100)
    found = []
    for held in (100, 150, 200, 200, 299, 301):
        monkeypatch.setattr(engines, "_resident_bytes", lambda held=held: held)
        backend = engine._backend
        engine.encode(["a text"])
        assert engine._backend is backend
        found.append(engine.has_grown())
    assert found == [False, False, False, False, False, True]
    assert not ReferenceEngine(byte_level).has_grown()


def test_a_model_that_gigatoken_cannot_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train_sentencepiece(tmp_path, model_type="unigram", vocab_size=340)
    unigram = open_vocabulary(megatron_tokenizer("SentencePieceTokenizer", model))
    with pytest.raises(ConfigError, match="gigatoken cannot take this tokenizer"):
        choose_engine("gigatoken", unigram, [])
    engine, note = choose_engine("auto", unigram, [])
    assert engine.name == "reference"
    assert "cannot take this tokenizer" in note

    def missing(name: str) -> None:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r"cannot be imported.*pip install gigatoken"):
        choose_engine("gigatoken", unigram, [])


def test_real_tokenizers(shared_data: Path, shared_tokenizers: Path) -> None:
    """gigatoken is taken for two of them and found out for the third."""
    with open(shared_data / "smile/messages.jsonl", encoding="utf-8") as stream:
        lines = [next(stream) for _ in range(150)]
    sample = [one["content"] for line in lines for one in json.loads(line)["messages"]]
    for kind, name, chosen in (
        ("HuggingFaceTokenizer", "qwen2.5-hf", "gigatoken"),
        ("SentencePieceTokenizer", "mistral-sp/tokenizer.model", "gigatoken"),
        ("SentencePieceTokenizer", "chinese-llama2-55k/tokenizer.model", "reference"),
    ):
        tokenizer = megatron_tokenizer(kind, str(shared_tokenizers / name))
        engine, note = choose_engine("auto", open_vocabulary(tokenizer), sample)
        assert engine.name == chosen, note
