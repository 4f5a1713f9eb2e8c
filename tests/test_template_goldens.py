"""Built-in templates: texts and masks by hand, and the same texts by their Jinja templates."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import megatron_tokenizer, tiny_hugging_face, tiny_sentencepiece
from template_jobs import NOW, as_messages, chat, encode_all

from megatron_multiturn.errors import SessionError
from megatron_multiturn.messages import Message
from megatron_multiturn.modes import CONTEXT
from megatron_multiturn.sandbox import MESSAGE_END, ChatSandbox
from megatron_multiturn.sessions import Session
from megatron_multiturn.template_families import TEMPLATES
from megatron_multiturn.templates import BOS, EOS, Special, rendering_text
from megatron_multiturn.vocabulary import Vocabulary, open_vocabulary


def answer(content: str, **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


SESSIONS = {
    "two rounds": chat(("system", "S"), ("user", "q1"), answer("a1"), ("user", "q2"), answer("a2")),
    "no system": chat(("user", "q"), answer("a")),
    "two questions": chat(("user", "q"), ("user", "r"), answer("a")),
    "answer first": chat(answer("hello"), ("user", "q"), answer("a")),
    "two answers": chat(("user", "q"), answer("a"), answer("b")),
    "not trained": chat(("user", "q"), answer("a", train=False), ("user", "r"), answer("b")),
    "a gap": chat(("user", "q"), answer("xyz", masked=((1, 2),))),
    "a gap at the end": chat(("user", "q"), answer("xyz", masked=((2, 3),))),
    "no tool message": chat(("user", "q"), answer("a"), ("tool", ""), answer("b")),
    "white space": chat(("user", " q\n"), answer(" a\n")),
    "a question at the end": chat(("user", "q"), answer("a"), ("user", "r")),
}

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ROLE_ORDER = "role-order"
# What is trained on stands in « ».
GOLDENS = {
    "firefly": {
        "two rounds": "<s>S\nq1</s>«a1</s>»q2</s>«a2</s>»",
        "no system": "<s>q</s>«a</s>»",
        "two questions": "<s>q\nr</s>«a</s>»",
        "answer first": "<s>«hello</s>»q</s>«a</s>»",
        "two answers": "<s>q</s>«a</s>»«b</s>»",
        "not trained": "<s>q</s>a</s>r</s>«b</s>»",
        "a gap": "<s>q</s>«x»y«z</s>»",
        "a gap at the end": "<s>q</s>«xy»z</s>",
        "no tool message": "<s>q</s>«a</s>»</s>«b</s>»",
        "white space": "<s> q\n</s>« a\n</s>»",
        "a question at the end": "<s>q</s>«a</s>»r</s>",
    },
    "plain": {
        "two rounds": "<s>S\nq1\n«a1</s>»q2\n«a2</s>»",
        "a gap at the end": "<s>q\n«xy»z</s>",
        "a question at the end": "<s>q\n«a</s>»r\n",
    },
    "chatml": {
        "two rounds": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\n«a1<|im_end|>»\n<|im_start|>user\nq2<|im_end|>\n"
        "<|im_start|>assistant\n«a2<|im_end|>»\n",
        "answer first": "<|im_start|>assistant\n«hello<|im_end|>»\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n«a<|im_end|>»\n",
        "a gap": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«x»y«z<|im_end|>»\n",
        "no tool message": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n"
        "<|im_start|>tool\n<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n",
        "white space": "<|im_start|>user\n q\n<|im_end|>\n"
        "<|im_start|>assistant\n« a\n<|im_end|>»\n",
    },
    "llama3": {
        "two rounds": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a1<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a2<|eot_id|>»",
        "white space": "<s><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a<|eot_id|>»",
    },
    "llama2": {
        "two rounds": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq1 [/INST]« a1 </s>»"
        "<s>[INST] q2 [/INST]« a2 </s>»",
        "two questions": "<s>[INST] q\nr [/INST]« a </s>»",
        "answer first": ROLE_ORDER,
        "two answers": ROLE_ORDER,
        "a gap": "<s>[INST] q [/INST]« x»y«z </s>»",
        "a gap at the end": "<s>[INST] q [/INST]« xy»z </s>",
        "no tool message": "unwritten-role",
        "white space": "<s>[INST] q [/INST]« a </s>»",
        "a question at the end": "<s>[INST] q [/INST]« a </s>»<s>[INST] r [/INST]",
    },
    "mistral": {
        "two rounds": "<s>[INST]S\n\nq1[/INST]«a1</s>»[INST]q2[/INST]«a2</s>»",
        "answer first": ROLE_ORDER,
        "not trained": "<s>[INST]q[/INST]a</s>[INST]r[/INST]«b</s>»",
    },
    "mistral-v1": {
        "two rounds": "<s> [INST] S\n\nq1 [/INST]« a1</s>» [INST] q2 [/INST]« a2</s>»",
        "white space": "<s> [INST]  q\n [/INST]«  a\n</s>»",
    },
    "alpaca": {
        "no system": f"<s>{_ALPACA}### Instruction:\nq\n\n### Response:\n«a</s>»\n\n",
        "two rounds": "<s>S\n\n### Instruction:\nq1\n\n### Response:\n«a1</s>»\n\n"
        "### Instruction:\nq2\n\n### Response:\n«a2</s>»\n\n",
    },
    "vicuna": {
        "no system": f"<s>{_VICUNA}USER: q ASSISTANT:« a</s>»",
        "two rounds": "<s>S USER: q1 ASSISTANT:« a1</s>»USER: q2 ASSISTANT:« a2</s>»",
        "two answers": ROLE_ORDER,
    },
    "chatglm": {
        "two rounds": "S\n[Round 0]\n问：q1\n答：«a1</s>»\n[Round 1]\n问：q2\n答：«a2</s>»\n",
        "a question at the end": "[Round 0]\n问：q\n答：«a</s>»\n[Round 1]\n问：r\n答：",
    },
    "chatglm2": {
        "two rounds": "[gMASK]sopS\n\n[Round 1]\n\n问：q1\n\n答：«a1</s>»"
        "[Round 2]\n\n问：q2\n\n答：«a2</s>»",
        "no system": "[gMASK]sop[Round 1]\n\n问：q\n\n答：«a</s>»",
        "no tool message": "unwritten-role",
    },
}


def shown(template: str, session: Session) -> str:
    """The rendering, with what is trained on in « »; or the reason why there is none."""
    try:
        segments = TEMPLATES[template].render(session)
    except SessionError as error:
        return error.reason
    texts = [(segment.kind, rendering_text((segment,))) for segment in segments]
    return "".join(text if kind == CONTEXT else f"«{text}»" for kind, text in texts)


@pytest.mark.parametrize(
    ("template", "case"), [(name, case) for name, cases in GOLDENS.items() for case in cases]
)
def test_goldens(template: str, case: str) -> None:
    assert shown(template, SESSIONS[case]) == GOLDENS[template][case]


def test_every_template_has_goldens() -> None:
    assert set(GOLDENS) == set(TEMPLATES)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("vicuna", r"x.jsonl:1: an answer stands where template 'vicuna' wants a question: at the"),
        ("llama2", r"use a template with roles, such as chatml"),
    ],
)
def test_an_answer_without_a_question_is_refused(template: str, match: str) -> None:
    with pytest.raises(SessionError, match=match):
        TEMPLATES[template].render(SESSIONS["answer first"])


def test_a_role_without_a_place_is_refused() -> None:
    with pytest.raises(
        SessionError, match=r"template 'vicuna' has no place for a message of the role 'tool'"
    ):
        TEMPLATES["vicuna"].render(SESSIONS["no tool message"])


# The cases that both forms write: templates of rounds refuse roles that do not alternate.
ALTERNATING = ["two rounds", "no system", "not trained", "white space", "a question at the end"]


@pytest.mark.parametrize(
    ("template", "jinja", "cases"),
    [
        ("chatml", "axolotl_chatml", list(SESSIONS)),
        ("llama3", "llama3", list(SESSIONS)),
        ("llama3", "axolotl_llama3", list(SESSIONS)),
        ("mistral-v1", "axolotl_mistral_v1", ALTERNATING),
    ],
)
def test_the_text_is_that_of_the_jinja_template(
    template: str, jinja: str, cases: list[str], shared_tokenizers: Path
) -> None:
    source = (shared_tokenizers / "chat_templates" / f"{jinja}.jinja").read_text(encoding="utf-8")
    sandbox = ChatSandbox(source, now=NOW)
    for case in cases:
        session = SESSIONS[case]
        variables = {"bos_token": "<s>", "eos_token": "</s>", "messages": as_messages(session)}
        marked = sandbox.render(variables | {"add_generation_prompt": False})
        expected = marked.replace(MESSAGE_END, "")
        assert rendering_text(TEMPLATES[template].render(session)) == expected, case


def test_mistral_with_spaces_is_what_sentencepiece_makes_of_it(shared_tokenizers: Path) -> None:
    """Its model puts the spaces there that the Jinja template writes."""
    vocabulary = opened(shared_tokenizers, "mistral-sp")
    (found,) = encode_all(TEMPLATES["mistral"], vocabulary, SESSIONS["two questions"])
    inst, closing = vocabulary.id_of("[INST]"), vocabulary.id_of("[/INST]")
    texts = vocabulary.encode(["q\nr", "a"])
    assert found.ids == [1, inst, *texts[0], closing, *texts[1], 2]


def opened(folder: Path, name: str) -> Vocabulary:
    if name == "qwen2.5-hf":
        return open_vocabulary(megatron_tokenizer("HuggingFaceTokenizer", str(folder / name)))
    model = str(folder / name / "tokenizer.model")
    return open_vocabulary(megatron_tokenizer("SentencePieceTokenizer", model))


TEXTS = [
    "今天天气很好，适合出去走走。",
    "x = [1, 2]\n\n  return x\t\n",
    "it's 3.14 é 🙂",
    "   ",
    "Ünï\u3000cøde",
]


def real_session() -> Session:
    messages = [("system", "Be brief."), *itertools.product(("user", "assistant"), TEXTS[:1])]
    for one, other in itertools.pairwise([*TEXTS[:3], *TEXTS[4:]]):
        messages += [("user", one), ("assistant", other)]
    return chat(*messages)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "name", ["tiny-sp", "tiny-hf", "mistral-sp", "chinese-llama2-55k", "qwen2.5-hf"]
)
def test_segments_join_to_the_whole_rendering(
    template: str, name: str, request: pytest.FixtureRequest
) -> None:
    """Each text between two special tokens is encoded as a whole, by the library itself."""
    if name == "tiny-sp":
        vocabulary = open_vocabulary(
            megatron_tokenizer("SentencePieceTokenizer", tiny_sentencepiece())
        )
    elif name == "tiny-hf":
        vocabulary = open_vocabulary(
            megatron_tokenizer("HuggingFaceTokenizer", tiny_hugging_face())
        )
    else:
        vocabulary = opened(request.getfixturevalue("shared_tokenizers"), name)
    chosen = TEMPLATES[template]
    ids = {BOS: vocabulary.bos_id, EOS: vocabulary.eos_id}
    ids |= {one: vocabulary.id_of(one.token) for one in chosen.specials if one not in (BOS, EOS)}
    if any(ids[one] is None for one in chosen.specials if one != BOS):
        pytest.skip(f"{name} has not all tokens of {template}")
    for session in [real_session(), *SESSIONS.values()]:
        try:
            segments = chosen.render(session)
        except SessionError:
            continue
        expected: list[int] = []
        parts = [part for segment in segments for part in segment.parts]
        for is_text, group in itertools.groupby(parts, lambda part: isinstance(part, str)):
            run = list(group)
            if is_text:
                expected += vocabulary.encode(["".join(map(str, run))])[0]
                continue
            found = [ids[one] for one in run if isinstance(one, Special)]
            expected += [one for one in found if one is not None]
        (encoded,) = encode_all(chosen, vocabulary, session)
        assert encoded.ids == expected, session
