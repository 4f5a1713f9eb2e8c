"""Small sessions, session files and tokenizers, made in the test; no network."""

import argparse
import functools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_multiturn.messages import Message
from megatron_multiturn.sessions import Session
from megatron_multiturn.tokenizer_flags import add_tokenizer_flags, build_with_megatron

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

_LINES = [
    "What is the tallest mountain?",
    "Mount Everest is the tallest mountain on land, 8849 metres high.",
    "And the second one?",
    "K2 is the second, 8611 metres; it is harder to climb.",
    "你好，今天天气怎么样？",
    "今天天气很好，适合出去走走。",
    "user assistant system tool",
]


def make_session(turns: int = 2, **overrides: Any) -> Session:
    """A session of `turns` questions and answers; overrides: fields of Session."""
    messages = []
    for turn in range(1, turns + 1):
        messages.append(Message(role="user", content=f"question {turn}"))
        messages.append(Message(role="assistant", content=f"answer {turn}"))
    fields: dict[str, Any] = {"messages": tuple(messages), "location": "made.jsonl:1"}
    return Session(**fields | overrides)


def make_record(turns: int = 2, **overrides: Any) -> dict[str, Any]:
    """The same in the OpenAI format; overrides: keys of the record."""
    messages = [
        {"role": message.role, "content": message.content}
        for message in make_session(turns).messages
    ]
    return {"messages": messages} | overrides


def write_jsonl(path: Path, records: Iterable[Any]) -> str:
    """Write one record a line; bytes and texts go in as they are."""
    with path.open("wb") as stream:
        for record in records:
            if not isinstance(record, bytes | str):
                record = json.dumps(record, ensure_ascii=False)
            stream.write(record.encode() if isinstance(record, str) else record)
            stream.write(b"\n")
    return str(path)


def train_sentencepiece(folder: Path, **options: Any) -> str:
    """Train a tiny SentencePiece model in `folder`; options: of its trainer."""
    import sentencepiece

    settings: dict[str, Any] = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "control_symbols": list(CHATML_TOKENS),
        "minloglevel": 2,
    }
    prefix = str(folder / "tiny")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES * 3), model_prefix=prefix, **settings | options
    )
    return prefix + ".model"


def train_hugging_face(folder: Path, **special: str) -> str:
    """Train a tiny byte-level BPE fast tokenizer in `folder`; special: eos_token and the like."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", *CHATML_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<|endoftext|>"} | special
    )
    wrapped.save_pretrained(folder)
    return str(folder)


def megatron_tokenizer(tokenizer_type: str, model: str, *flags: str) -> Any:
    """Megatron's own tokenizer for the flags of the commands."""
    parser = argparse.ArgumentParser()
    add_tokenizer_flags(parser, required=True)
    given = ["--tokenizer-type", tokenizer_type, "--tokenizer-model", model, *flags]
    return build_with_megatron(parser.parse_args(given))


@functools.cache
def tiny_sentencepiece() -> str:
    """A tiny SentencePiece model, trained once a test process."""
    return train_sentencepiece(_kept_folder())


@functools.cache
def tiny_hugging_face() -> str:
    """A tiny Hugging Face tokenizer, trained once a test process."""
    return train_hugging_face(_kept_folder())


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _kept_folder() -> Path:
    """A folder that lasts as long as the process."""
    _folders.append(tempfile.TemporaryDirectory())
    return Path(_folders[-1].name)
