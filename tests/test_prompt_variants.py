"""Questions that are a bare term, phrased anew."""

import json
from collections import Counter
from pathlib import Path

import pytest
from session_fixtures import megatron_tokenizer, tiny_hugging_face

from megatron_multiturn.encoding import SessionEncoder
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.messages import Message
from megatron_multiturn.plain_chats import PlainChat
from megatron_multiturn.prompt_variants import PromptVariants, is_bare_term, read_phrasings
from megatron_multiturn.sessions import Session
from megatron_multiturn.template_families import TEMPLATES
from megatron_multiturn.vocabulary import open_vocabulary

PHRASINGS = ("什么是{query}?", "{query}是什么?", "请解释{query}。")


@pytest.mark.parametrize(
    ("query", "is_bare"),
    [
        ("光合作用", True),
        (" Node.js ", True),
        ("C++", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("什么是光合作用？", False),
        ("What is it", True),
        ("What is it?", False),
        ("Explain it.", False),
        ("one\ntwo", False),
        ("one; two", False),
        ("", False),
    ],
)
def test_bare_terms(query: str, is_bare: bool) -> None:
    assert is_bare_term(query) == is_bare


def test_draws_depend_on_the_text_and_the_seed_alone() -> None:
    variants = PromptVariants(PHRASINGS, seed=1)
    drawn = [variants.phrase(f"term{number}", [f"answer{number}"]) for number in range(3000)]
    assert drawn == [
        variants.phrase(f"term{number}", [f"answer{number}"]) for number in range(3000)
    ]
    assert drawn[0] in {phrasing.replace("{query}", "term0") for phrasing in PHRASINGS}
    counts = Counter(text.replace(f"term{number}", "") for number, text in enumerate(drawn))
    assert len(counts) == 3
    assert min(counts.values()) > 900
    others = PromptVariants(PHRASINGS, seed=2)
    changed = [others.phrase(f"term{n}", [f"answer{n}"]) != drawn[n] for n in range(3000)]
    assert 0.6 < sum(changed) / 3000 < 0.73


def test_a_term_with_braces_is_kept() -> None:
    assert PromptVariants(["{query}!"], 0).phrase(" {query} {x} ", []) == "{query} {x}!"


@pytest.mark.parametrize("wraps", [False, True])
def test_only_sessions_of_one_question_are_phrased_anew(wraps: bool) -> None:
    vocabulary = open_vocabulary(megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face()))
    encoder = SessionEncoder(
        TEMPLATES["chatml"], vocabulary, prompt_variants=PromptVariants(["<{query}>"], 0)
    )
    for roles, phrased in (
        (("user", "assistant"), True),
        (("system", "user", "assistant"), True),
        (("user", "assistant", "user", "assistant"), False),
        (("assistant",), False),
    ):
        chat = PlainChat(roles, ["term"] * len(roles), "x:1")
        batch = encoder.encode([chat.session() if wraps else chat])
        (text,) = vocabulary.decode([batch.tokens.tolist()])
        assert ("user\n<term>" in text) == phrased
        assert text.count("<term>") == phrased
        assert batch.totals["num_rephrased_sessions"] == phrased
    gap = Message(role="assistant", content="term", masked=((0, 2),))
    session = Session(messages=(Message(role="user", content="term"), gap), location="x:1")
    (text,) = vocabulary.decode([encoder.encode([session]).tokens.tolist()])
    assert "user\n<term>" in text


def test_phrasings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "phrasings"
    path.write_text("\ufeff" + "\n\n".join([*PHRASINGS, " "]), encoding="utf-8")
    assert read_phrasings(str(path)) == PHRASINGS
    path.write_text(json.dumps(PHRASINGS), encoding="utf-8")
    assert read_phrasings(str(path)) == PHRASINGS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no phrasing"),
        ("[]", "holds no phrasing"),
        ("[1]", r"1 must be a text with \{query\} in it once"),
        ("what is it", r'"what is it" must be a text with \{query\}'),
        ("{query} or {query}", "in it once"),
        ("[", "not JSON"),
    ],
)
def test_bad_phrasings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "phrasings"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_phrasings(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_phrasings(str(tmp_path / "missing"))
