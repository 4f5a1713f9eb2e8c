"""Tokens and modes, with Megatron's own tokenizers."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from session_fixtures import (
    make_session,
    megatron_tokenizer,
    tiny_hugging_face,
    tiny_sentencepiece,
    train_hugging_face,
    train_sentencepiece,
)
from template_jobs import jinja_template

from megatron_multiturn.encoding import EncodedSession, SessionEncoder
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.messages import Message
from megatron_multiturn.modes import (
    CONTEXT,
    KIND_MASK,
    LEADING_SYSTEM,
    MESSAGE_START,
    TARGET_BEGIN,
    TARGET_CONTINUE,
)
from megatron_multiturn.sessions import Session, read_sessions
from megatron_multiturn.template_families import TEMPLATES
from megatron_multiturn.templates import Document, Segment
from megatron_multiturn.vocabulary import open_vocabulary, tokenizer_fingerprint

SP_TYPES = ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"]


@pytest.fixture(scope="module")
def sentencepiece_tokenizer() -> Any:
    return megatron_tokenizer("SentencePieceTokenizer", tiny_sentencepiece())


@pytest.fixture(scope="module")
def hugging_face_tokenizer() -> Any:
    return megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face())


def encoder_of(tokenizer: Any, template: str) -> SessionEncoder:
    return SessionEncoder(TEMPLATES[template], open_vocabulary(tokenizer))


def encode(tokenizer: Any, template: str, session: Session) -> EncodedSession:
    batch = encoder_of(tokenizer, template).encode([session])
    assert (batch.num_sessions, batch.errors) == (1, [])
    return batch.session(0)


def cut(encoded: EncodedSession) -> list[list[int]]:
    ends = np.cumsum(encoded.segment_lengths)
    return [part.tolist() for part in np.split(encoded.tokens, ends[:-1])]


def chat(*messages: tuple[str, str]) -> Session:
    made = tuple(Message(role=role, content=content) for role, content in messages)
    return Session(messages=made, location="x.jsonl:1")


@pytest.mark.parametrize("kind", SP_TYPES)
def test_firefly_with_sentencepiece(kind: str) -> None:
    model = tiny_sentencepiece()
    tokenizer = megatron_tokenizer(kind, model)
    encoded = encode(tokenizer, "firefly", make_session(1))

    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_file=model)
    question, answer = plain.encode("question 1"), plain.encode("answer 1")
    bos, eos = plain.bos_id(), plain.eos_id()
    assert cut(encoded) == [[bos], [*question, eos], [*answer, eos]]
    assert encoded.modes.tolist() == [LEADING_SYSTEM, MESSAGE_START, TARGET_BEGIN]
    dtypes = [
        array.dtype.name for array in (encoded.tokens, encoded.segment_lengths, encoded.modes)
    ]
    assert dtypes == ["int32", "int32", "int8"]


def test_chatml_with_hugging_face(hugging_face_tokenizer: Any) -> None:
    encoded = encode(hugging_face_tokenizer, "chatml", make_session(1))
    below = hugging_face_tokenizer._tokenizer.tokenizer
    text = "<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\nanswer 1<|im_end|>\n"
    assert encoded.tokens.tolist() == below(text, add_special_tokens=False).input_ids
    assert [below.decode(part) for part in cut(encoded)] == [
        "<|im_start|>user\nquestion 1<|im_end|>\n",
        "<|im_start|>assistant\n",
        "answer 1<|im_end|>",
        "\n",
    ]
    assert encoded.modes.tolist() == [MESSAGE_START, MESSAGE_START, TARGET_BEGIN, 0]


def test_runs_that_go_on_get_no_space(sentencepiece_tokenizer: Any) -> None:
    vocabulary = open_vocabulary(sentencepiece_tokenizer)
    message = Message(role="assistant", content="你好，今天天气很好", masked=((3, 7),))
    session = Session(messages=(message,), location="x:1")
    encoded = encode(sentencepiece_tokenizer, "chatml", session)
    assert encoded.modes.tolist() == [MESSAGE_START, TARGET_BEGIN, 0, TARGET_CONTINUE, 0]
    text_ids = [i for i in encoded.tokens.tolist() if i != vocabulary.id_of("<|im_start|>")]
    text_ids = text_ids[: text_ids.index(vocabulary.id_of("<|im_end|>"))]
    assert vocabulary.decode([text_ids]) == ["assistant\n你好，今天天气很好"]
    spaced = vocabulary.encode(["今天天气"])[0]
    assert cut(encoded)[2] != spaced  # encoded by itself it would get a space
    assert vocabulary.decode([vocabulary.encode(["你好，"])[0] + spaced]) == ["你好， 今天天气"]


def test_a_token_that_reaches_into_a_gap_is_context(sentencepiece_tokenizer: Any) -> None:
    vocabulary = open_vocabulary(sentencepiece_tokenizer)
    assert len(vocabulary.encode(["a今天天气"])[0]) == len(vocabulary.encode(["a"])[0]) + 1
    message = Message(role="assistant", content="你好，今天天气很好", masked=((3, 5),))
    encoded = encode(
        sentencepiece_tokenizer, "chatml", Session(messages=(message,), location="x:1")
    )
    gap = vocabulary.encode(["a今天天气"])[0][-1:]
    assert cut(encoded)[2] == gap
    assert encoded.modes.tolist() == [MESSAGE_START, TARGET_BEGIN, 0, TARGET_CONTINUE, 0]


@pytest.mark.parametrize("template", ["firefly", "chatml"])
@pytest.mark.parametrize("kind", ["sentencepiece", "hugging_face"])
def test_special_tokens_in_text_stay_text(
    template: str, kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    spelt = "a<|im_end|>\n<|im_start|>system </s><s><|endoftext|>b"
    session = chat(("user", spelt), ("assistant", spelt))
    encoded = encode(tokenizer, template, session)
    harmless = encode(tokenizer, template, chat(("user", "x"), ("assistant", "x")))
    special = set(range(3 if kind == "hugging_face" else 5))
    counts = [sum(one in special for one in e.tokens.tolist()) for e in (encoded, harmless)]
    assert counts[0] == counts[1] > 0
    vocabulary = open_vocabulary(tokenizer)
    target = cut(encoded)[list(encoded.modes).index(TARGET_BEGIN)][:-1]
    assert spelt in vocabulary.decode([target])[0]


def test_tokens_read_out_of_text_are_broken_up(tmp_path: Path) -> None:
    model = train_sentencepiece(
        tmp_path, control_symbols=[], user_defined_symbols=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", model)
    vocabulary = open_vocabulary(tokenizer)
    closing = vocabulary.id_of("<|im_end|>")
    assert closing in vocabulary.encode(["a<|im_end|>b"])[0]
    encoded = encode(tokenizer, "chatml", chat(("user", "a<|im_end|>b"), ("assistant", "c")))
    assert encoded.tokens.tolist().count(closing) == 2
    text = encoded.tokens.tolist()[1 : encoded.tokens.tolist().index(closing)]
    assert vocabulary.decode([text]) == ["user\na<|im_end|>b"]


def test_a_template_token_that_is_missing_is_an_error(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, control_symbols=[])
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", model)
    with pytest.raises(ConfigError, match=r"'chatml' needs '<\|im_start\|>' as one token"):
        encoder_of(tokenizer, "chatml")


def test_a_missing_eos_is_an_error(tmp_path: Path) -> None:
    tokenizer = megatron_tokenizer(
        "SentencePieceTokenizer", train_sentencepiece(tmp_path, bos_id=-1, eos_id=-1)
    )
    with pytest.raises(ConfigError, match="no end-of-sentence token, which closes every answer"):
        encoder_of(tokenizer, "firefly")
    chatml = encoder_of(tokenizer, "chatml")
    chatml.encode([make_session(1)])
    with pytest.raises(ConfigError, match=r"made.jsonl:1: plain text ends with an end-of-sent"):
        chatml.encode([make_session(1, messages=make_session(1).messages[1:], plain=True)])


def test_a_missing_bos_is_left_out(tmp_path: Path) -> None:
    tokenizer = megatron_tokenizer(
        "SentencePieceTokenizer", train_sentencepiece(tmp_path, bos_id=-1)
    )
    encoder = encoder_of(tokenizer, "firefly")
    assert encoder.omits_bos
    encoded = encoder.encode([make_session(1)]).session(0)
    assert encoded.modes.tolist() == [MESSAGE_START, TARGET_BEGIN]
    assert -1 not in encoded.tokens


def test_plain_text(sentencepiece_tokenizer: Any) -> None:
    session = make_session(1, messages=make_session(1).messages[1:], plain=True)
    encoded = encode(sentencepiece_tokenizer, "chatml", session)
    assert len(cut(encoded)[0]) == 1
    assert encoded.modes.tolist() == [MESSAGE_START, TARGET_BEGIN]
    assert encoded.tokens[[0, -1]].tolist() == [1, 2]


def test_batches_and_single_sessions_are_encoded_alike(hugging_face_tokenizer: Any) -> None:
    encoder = encoder_of(hugging_face_tokenizer, "chatml")
    sessions = [make_session(turns) for turns in (1, 3, 2, 1)]
    batch = encoder.encode(sessions)
    assert batch.sources.tolist() == [0, 1, 2, 3]
    for number, alone in enumerate(sessions):
        together = batch.session(number)
        single = encode(hugging_face_tokenizer, "chatml", alone)
        assert together.tokens.tolist() == single.tokens.tolist()
        assert together.modes.tolist() == single.modes.tolist()
    empty = encoder.encode([])
    assert (empty.num_sessions, len(empty.tokens), empty.errors) == (0, 0, [])


def test_text_that_the_vocabulary_cannot_write_is_counted(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, byte_fallback=False)
    encoder = encoder_of(megatron_tokenizer("SentencePieceTokenizer", model), "firefly")
    known, unknown = (
        (("user", "the"), ("assistant", "land")),
        (("user", "a"), ("assistant", "🙂 🙂")),
    )
    batch = encoder.encode([chat(*known), chat(*unknown), chat(*unknown)])
    assert batch.totals["num_unknown_tokens"] == 4
    assert batch.totals["num_lossy_sessions"] == 2
    assert batch.totals["num_recut_sessions"] == 0


def test_an_edge_inside_a_token_is_counted(hugging_face_tokenizer: Any) -> None:
    below = hugging_face_tokenizer._tokenizer.tokenizer
    word = next(w for w in ("mountain", "tallest", "metres") if len(below(" " + w).input_ids) == 1)
    gap = Message(role="assistant", content=f"the {word}", masked=((6, 7),))
    batch = encoder_of(hugging_face_tokenizer, "chatml").encode(
        [Session(messages=(gap,), location="x:1"), make_session(1)]
    )
    assert batch.totals["num_recut_sessions"] == 1


@pytest.mark.parametrize("is_jinja", [False, True])
def test_what_is_masked_gets_the_tokens_across_its_edges(
    hugging_face_tokenizer: Any, is_jinja: bool
) -> None:
    """At the head and the end of an answer as inside it: nothing masked is ever learnt."""
    vocabulary = open_vocabulary(hugging_face_tokenizer)
    word = next(w for w in ("mountain", "tallest", "metres") if one_token(vocabulary, " " + w))
    template: Any = TEMPLATES["chatml"]
    if is_jinja:
        template = jinja_template(CHATML_PROMPTED, vocabulary)
    encoder = SessionEncoder(template, vocabulary)
    size = len(word)
    for content, masked, learnt in (
        (f"the {word}", (6, 4 + size), "the"),
        (f" {word} is", (0, 3), " is"),
        (f"the {word} is", (6, 8), "the is"),
        (f"the {word} is", (4, 6), "the is"),
    ):
        gap = Message(role="assistant", content=content, masked=(masked,))
        session = Session(messages=(Message(role="user", content="q"), gap), location="x:1")
        encoded = encoder.encode([session]).session(0)
        targets = [
            text
            for text, mode in zip(vocabulary.decode(cut(encoded)), encoded.modes, strict=True)
            if mode & KIND_MASK
        ]
        assert "".join(targets).replace("<|im_end|>", "").removesuffix("\n") == learnt


def one_token(vocabulary: Any, text: str) -> bool:
    return len(vocabulary.encode([text])[0]) == 1


CHATML_PROMPTED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_is_unknown_on_both_sides_of_an_edge_is_the_answers(tmp_path: Path) -> None:
    """SentencePiece makes one token of any run of characters that it does not know."""
    model = train_sentencepiece(tmp_path, byte_fallback=False)
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", model)
    vocabulary = open_vocabulary(tokenizer)
    context = Segment(kind=CONTEXT, parts=("the🙂",), starts_message=True)
    answer = Segment(kind=TARGET_BEGIN, parts=("🙂 land",))
    encoder = SessionEncoder(Fixed([[context, answer]]), vocabulary)
    batch = encoder.encode([make_session(1)])
    (whole,) = vocabulary.encode(["the🙂🙂 land"])
    assert batch.tokens.tolist() == whole
    assert [one == vocabulary.unknown_id for one in whole].count(True) == 1
    assert vocabulary.unknown_id in cut(batch.session(0))[1]
    assert batch.totals["num_recut_sessions"] == 1


class Fixed:
    """A template that writes the same documents whatever the session."""

    name = "fixed"
    content_hash = ""
    specials = ()
    opens_with_bos = trains_any_role = strips = False

    def __init__(self, documents: list[list[Segment]]) -> None:
        self._documents = [Document(segments=tuple(segments)) for segments in documents]

    def batch(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def documents(self, session: Session) -> list[Document]:
        return self._documents if session.messages[0].content == "question 1" else []

    def units(self, roles: Sequence[str], answers: Sequence[bool]) -> None:
        return None

    def write_unit(self, key: Any, messages: Sequence[Message]) -> list[Segment]:
        raise AssertionError


def test_the_documents_of_a_session_fail_together(
    hugging_face_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = hugging_face_tokenizer._tokenizer.tokenizer
    word = next(w for w in ("mountain", "tallest", "metres") if len(below(" " + w).input_ids) == 1)
    good = [Segment(kind=TARGET_BEGIN, parts=("the",))]
    across = [
        Segment(kind=CONTEXT, parts=(f"the {word[:2]}",)),
        Segment(kind=TARGET_BEGIN, parts=(word[2:],)),
    ]
    vocabulary = open_vocabulary(hugging_face_tokenizer)
    encoder = SessionEncoder(Fixed([good, across]), vocabulary)
    assert encoder.encode([make_session(1)]).sources.tolist() == [0, 0]
    monkeypatch.setattr(vocabulary, "encode_with_ends", lambda text: None)
    batch = encoder.encode([make_session(1)])
    assert batch.num_sessions == len(batch.tokens) == len(batch.modes) == 0
    ((source, error),) = batch.errors
    assert (source, error.reason) == (0, "token-across-edge")
    assert "made.jsonl:1: a token lies across the edge of an answer" in str(error)


@pytest.mark.parametrize(
    ("kind", "train", "option"),
    [
        ("SentencePieceTokenizer", train_sentencepiece, {"vocab_size": 390}),
        ("HuggingFaceTokenizer", train_hugging_face, {"eos_token": "<|im_end|>"}),
    ],
)
def test_the_identity_is_that_of_the_content(
    tmp_path: Path, kind: str, train: Any, option: dict[str, Any]
) -> None:
    identities = []
    for name, options in (("a", {}), ("b", {}), ("c", option)):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = megatron_tokenizer(kind, train(folder, **options))
        identities.append(tokenizer_fingerprint(tokenizer, kind))
        assert identities[-1].vocab_size == tokenizer.vocab_size
    assert identities[0] == identities[1]
    assert identities[0].content_hash != identities[2].content_hash


CHATML_JINJA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("corpus", ["smile", "sgd"])
def test_chatml_matches_apply_chat_template(
    shared_data: Path, shared_tokenizers: Path, corpus: str
) -> None:
    """Token by token, on real sessions, against transformers' own rendering."""
    tokenizer = megatron_tokenizer("HuggingFaceTokenizer", str(shared_tokenizers / "qwen2.5-hf"))
    encoder = encoder_of(tokenizer, "chatml")
    below = tokenizer._tokenizer.tokenizer
    path = str(shared_data / corpus / "messages.jsonl")
    sessions = []
    for found in read_sessions([path]):
        if isinstance(found, Session):
            sessions.append(found)
        if len(sessions) == 150:
            break
    num_matching = 0
    batch = encoder.encode(sessions)
    assert batch.totals["num_recut_sessions"] == batch.totals["num_lossy_sessions"] == 0
    assert batch.errors == []
    for number, session in enumerate(sessions):
        encoded = batch.session(number)
        messages = [{"role": m.role, "content": m.content} for m in session.messages]
        expected = below.apply_chat_template(
            messages, chat_template=CHATML_JINJA, tokenize=True, return_dict=False
        )
        assert encoded.tokens.tolist() == expected
        num_matching += 1
    assert num_matching == 150


def test_firefly_matches_sentencepiece_on_real_sessions(
    shared_data: Path, shared_tokenizers: Path
) -> None:
    """The concatenation that the firefly form describes, made here by hand."""
    import sentencepiece

    model = str(shared_tokenizers / "chinese-llama2-55k" / "tokenizer.model")
    encoder = encoder_of(megatron_tokenizer("Llama2Tokenizer", model), "firefly")
    plain = sentencepiece.SentencePieceProcessor(model_file=model)
    with (shared_data / "alpaca_zh" / "messages.jsonl").open(encoding="utf-8") as stream:
        records = [json.loads(next(stream))["messages"] for _ in range(200)]
    sessions = [chat(*((m["role"], m["content"]) for m in messages)) for messages in records]
    batch = encoder.encode(sessions)
    assert (batch.num_sessions, batch.errors) == (len(records), [])
    for number, messages in enumerate(records):
        expected = [1]
        for message in messages:
            expected += [*plain.encode(message["content"]), 2]
        assert batch.session(number).tokens.tolist() == expected
