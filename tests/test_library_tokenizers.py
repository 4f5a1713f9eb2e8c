"""Tokenizers made without Megatron are alike to Megatron's own."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import train_hugging_face, train_sentencepiece

from megatron_multiturn.engines import _TRICKY_TEXTS
from megatron_multiturn.library_tokenizers import LibraryTokenizer
from megatron_multiturn.tokenizer_flags import (
    add_tokenizer_flags,
    build_tokenizer,
    build_with_megatron,
)
from megatron_multiturn.vocabulary import open_vocabulary, tokenizer_fingerprint

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"


def flags_of(kind: str, model: str | Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_tokenizer_flags(parser, required=True)
    return parser.parse_args(["--tokenizer-type", kind, "--tokenizer-model", str(model), *more])


def check_alike(flags: argparse.Namespace, texts: list[str]) -> None:
    made, megatron = build_tokenizer(flags), build_with_megatron(flags)
    assert isinstance(made, LibraryTokenizer)
    assert not isinstance(megatron, LibraryTokenizer)
    identity = tokenizer_fingerprint(made, flags.tokenizer_type)
    assert identity == tokenizer_fingerprint(megatron, flags.tokenizer_type)
    assert identity.vocab_size == megatron.vocab_size
    ours, wanted = open_vocabulary(made), open_vocabulary(megatron)
    assert type(ours) is type(wanted)
    for name in ("size", "bos_id", "eos_id", "unknown_id"):
        assert getattr(ours, name) == getattr(wanted, name)
    assert ours.control_tokens() == wanted.control_tokens()
    assert ours.named_tokens() == wanted.named_tokens()
    assert ours.serialized() == wanted.serialized()
    encoded = wanted.encode(texts)
    assert any(encoded)
    assert ours.encode(texts) == encoded
    assert ours.decode(encoded) == wanted.decode(encoded)
    assert [ours.encode_with_ends(text) for text in texts] == [
        wanted.encode_with_ends(text) for text in texts
    ]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SENTENCEPIECE, "mistral-sp/tokenizer.model"),
        ("Llama2Tokenizer", "chinese-llama2-55k/tokenizer.model"),
        ("GPTSentencePieceTokenizer", "tiny-sentencepiece/test_model.model"),
        (SENTENCEPIECE, "tiny-sentencepiece/test_ja_model.model"),
        (HUGGING_FACE, "qwen2.5-hf"),
        (HUGGING_FACE, "gpt2-50k"),
    ],
)
def test_real_tokenizers(
    kind: str, name: str, shared_tokenizers: Path, shared_data: Path, tmp_path: Path
) -> None:
    model = shared_tokenizers / name
    if name == "gpt2-50k":  # no more than a vocabulary and its merges
        for file in ("vocab.json", "merges.txt"):
            (tmp_path / file).symlink_to(model / file)
        config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        model = tmp_path
    with (shared_data / "smile" / "messages.jsonl").open(encoding="utf-8") as stream:
        sessions = [json.loads(next(stream))["messages"] for _ in range(20)]
    texts = [message["content"] for messages in sessions for message in messages]
    check_alike(flags_of(kind, model), [*_TRICKY_TEXTS, *texts])


@pytest.mark.parametrize(
    ("special", "more"),
    [
        ({}, ()),
        ({"eos_token": "<|im_end|>"}, ("--tokenizer-special-tokens", "<|im_start|>", "<new>")),
        ({"eos_token": None, "sep_token": "<|endoftext|>"}, ()),
        ({"bos_token": "<|im_start|>"}, ("--tokenizer-hf-no-include-special-tokens",)),
        ({"cls_token": "<|im_start|>"}, ()),
        ({"bos_token": "<|im_start|>", "cls_token": "<|im_end|>"}, ()),
    ],
)
def test_special_tokens_of_hugging_face(
    tmp_path: Path, special: dict[str, Any], more: tuple[str, ...]
) -> None:
    model = train_hugging_face(tmp_path, **special)
    check_alike(flags_of(HUGGING_FACE, model, *more), [*_TRICKY_TEXTS, "a<|im_end|><new>b"])


def test_sentencepiece_of_our_own(tmp_path: Path) -> None:
    check_alike(flags_of(SENTENCEPIECE, train_sentencepiece(tmp_path)), [*_TRICKY_TEXTS])


def test_what_megatron_has_a_hand_in_is_left_to_it(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path)
    more = ("--tokenizer-special-tokens", "<new>", "--tokenizer-sentencepiece-legacy")
    tokenizer = build_tokenizer(flags_of(SENTENCEPIECE, model, *more))
    assert not isinstance(tokenizer, LibraryTokenizer)
    assert open_vocabulary(tokenizer).id_of("<new>") == tokenizer.vocab_size - 1


@pytest.mark.parametrize("kind", [SENTENCEPIECE, HUGGING_FACE])
def test_neither_torch_nor_megatron_is_imported(
    tmp_path: Path, repository: Path, kind: str
) -> None:
    train = train_hugging_face if kind == HUGGING_FACE else train_sentencepiece
    code = (
        "import argparse, importlib.util, sys\n"
        "from megatron_multiturn.tokenizer_flags import add_tokenizer_flags, build_tokenizer\n"
        "parser = argparse.ArgumentParser()\n"
        "add_tokenizer_flags(parser, required=True)\n"
        "build_tokenizer(parser.parse_args(), hides_torch=True)\n"
        "print(*(name for name in ('torch', 'megatron', 'transformers') if name in sys.modules))\n"
        "assert importlib.util.find_spec('torch') is not None\n"
    )
    command = [sys.executable, "-c", code, "--tokenizer-type", kind]
    command += ["--tokenizer-model", train(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.split() == (["transformers"] if kind == HUGGING_FACE else [])
    assert done.stderr == ""
