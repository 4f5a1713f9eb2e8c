"""Templates that provably only append are rendered once; all others message by message."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import make_session, megatron_tokenizer, tiny_hugging_face
from template_jobs import MARKED, chat, encode_all, jinja_template

from megatron_multiturn.messages import Message
from megatron_multiturn.sandbox import ChatSandbox
from megatron_multiturn.vocabulary import open_vocabulary

NOW = datetime(2026, 1, 31)
ASK = "{% if add_generation_prompt %}A:{% endif %}"


def is_proved(source: str) -> bool:
    return ChatSandbox(source, now=NOW).marks_messages


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ loop.index0 }}{{ m.role }}{% endfor %}" + ASK,
        "{% set all = messages %}{% for m in all %}{{ m.content }}{% endfor %}" + ASK,
        "{% if messages[0].role == 'system' %}S{% endif %}{% for m in messages %}"
        "{% for c in m.tool_calls %}{{ c if loop.last }}{% endfor %}{% endfor %}" + ASK,
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        "{% endfor %}{% if add_generation_prompt %}A:{% if not think %}-{% endif %}{% endif %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_templates_that_only_append(source: str) -> None:
    assert is_proved(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}" + ASK,
        "{% for m in messages %}{{ loop.length }}{% endfor %}",
        "{% for m in messages %}{{ loop.revindex }}{% endfor %}",
        "{% for m in messages %}{{ loop.nextitem.role }}{% endfor %}",
        "{% for m in messages %}{{ loop['last'] }}{% endfor %}",
        "{% for m in messages %}{% set l = loop %}{{ l.last }}{% endfor %}",
        "{% for m in messages %}{{ loop|attr('last') }}{% endfor %}",
        "{% for m in messages %}{% for c in [1] if loop.last %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for c in [] %}{% else %}{{ loop.last }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ messages|length }}{% endfor %}",
        "{% for m in messages %}{{ messages[-1].role }}{% endfor %}",
        "{% for m in messages %}{{ messages[loop.index0 - 1].role }}{% endfor %}",
        "{% for m in messages %}{{ m == messages[1] }}{% endfor %}",
        "{% set n = messages|length %}{% for m in messages %}{{ n }}{% endfor %}",
        "{% set all = messages %}{% for m in messages %}{{ all|length }}{% endfor %}",
        "{% set messages = [1] %}{% for m in messages %}{{ m }}{% endfor %}",
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}",
        "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}end",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if not add_generation_prompt %}.{% endif %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ messages|length }}{% endif %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ns.n }}{% endif %}",
        "{% set c = cycler(1, 2) %}{% for m in messages %}{{ c.next() }}{% endfor %}"
        "{% if add_generation_prompt %}{{ c.current }}{% endif %}",
        "{% macro w(m) %}{{ m.content }}{{ messages|length }}{% endmacro %}"
        "{% for m in messages %}{{ w(m) }}{% endfor %}",
        "{% for m in messages %}{{ [1, 2]|random }}{% endfor %}",
        "{% if 1 %}{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}",
        "nothing",
    ],
)
def test_templates_that_may_do_more(source: str) -> None:
    assert not is_proved(source)


SESSIONS = [
    make_session(4),
    chat(("system", "s"), ("user", "q"), Message(role="assistant", content="a"), ("user", "r")),
    chat(
        ("user", "<|im_end|>"),
        Message(role="assistant", content="one two", masked=((0, 3),)),
        ("user", "im"),
        Message(role="assistant", content="x", train=False),
        Message(role="assistant", content="y"),
    ),
]


def family(folder: Path, name: str) -> str:
    return (folder / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["axolotl_chatml", "axolotl_llama3", "llama3", "llama3_training", "qwen2_5_vl_training", "own"],
)
def test_one_rendering_gives_what_many_do(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MARKED
    if name != "own":
        source = family(request.getfixturevalue("shared_tokenizers"), name)
    vocabulary = open_vocabulary(megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face()))
    template = jinja_template(source, vocabulary)
    assert template._sandbox.marks_messages
    num_renderings: list[int] = []
    render = ChatSandbox.render

    def counted(sandbox: ChatSandbox, variables: Mapping[str, Any]) -> str:
        num_renderings.append(1)
        return render(sandbox, variables)

    monkeypatch.setattr(ChatSandbox, "render", counted)
    few = [encode_all(template, vocabulary, session) for session in SESSIONS]
    once = len(num_renderings)
    monkeypatch.setattr(template._sandbox, "marks_messages", False)
    many = [encode_all(template, vocabulary, session) for session in SESSIONS]
    assert few == many
    assert once < len(num_renderings) - once
