"""The tokenizers that Megatron wraps, made without Megatron, whose import takes seconds.

What is made here has all that this package reads of Megatron's tokenizers, and the same ids,
special tokens and fingerprint. Tokenizers that Megatron itself has a hand in are left to it.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryTokenizer:
    """A tokenizer of a library, under the names that Megatron's wrapper has for it."""

    library: str  # "sentencepiece" or "huggingface"
    tokenizer: Any
    vocab_size: int
    # Of SentencePiece alone:
    special_token_to_id: dict[str, int]  # added by the wrapper
    ignore_extra_whitespaces: bool = True

    @property
    def vocab(self) -> list[str]:
        """The pieces of a SentencePiece model, in the order of their ids."""
        return self.tokenizer.id_to_piece(list(range(self.vocab_size)))


def make_library_tokenizer(args: argparse.Namespace) -> LibraryTokenizer | None:
    """The tokenizer for the flags in `args`; None if Megatron has to make it.

    Raises whatever the library raises.
    """
    if args.metadata_path or args.trust_remote_code:
        return None
    if args.tokenizer_type in SENTENCEPIECE_TYPES and not args.special_tokens:
        return _sentencepiece(args.tokenizer_model)
    if args.tokenizer_type == "HuggingFaceTokenizer" and not args.vocab_file:
        return _hugging_face(args)
    return None


@contextlib.contextmanager
def hidden_torch() -> Iterator[None]:
    """Lets `transformers` be imported without torch, which takes longer than all else.

    It asks but once whether there is torch: only for a process that wants no more than tokenizers
    of it, and in which neither is imported yet.
    """
    if not sys.modules.keys().isdisjoint(("torch", "transformers")):
        yield
        return
    find_spec = importlib.util.find_spec
    # Else it warns that models cannot be had.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    importlib.util.find_spec = lambda name, package=None: (
        None if name == "torch" else find_spec(name, package)
    )
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec


def _sentencepiece(path: str) -> LibraryTokenizer:
    processor = importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=path)
    return LibraryTokenizer(
        library="sentencepiece",
        tokenizer=processor,
        vocab_size=processor.get_piece_size(),
        special_token_to_id={},
    )


def _hugging_face(args: argparse.Namespace) -> LibraryTokenizer:
    """As Megatron does it: of the end and the separator one stands in for the other, and of the
    beginning and the class token too."""
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
        args.tokenizer_model, use_fast=not args.tokenizer_hf_no_use_fast, trust_remote_code=False
    )
    special: dict[str, Any] = {}
    for one, other in (("eos_token", "sep_token"), ("bos_token", "cls_token")):
        given, stand_in = getattr(tokenizer, one), getattr(tokenizer, other)
        if given and stand_in is None:
            special[other] = given
        elif stand_in and given is None:
            special[one] = stand_in
    special["additional_special_tokens"] = args.special_tokens or []
    tokenizer.add_special_tokens(special)
    return LibraryTokenizer(
        library="huggingface",
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        special_token_to_id={},
    )
