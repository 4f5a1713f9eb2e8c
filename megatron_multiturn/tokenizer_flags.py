"""Megatron's tokenizer flags for our own commands, and the tokenizer that they describe."""

import argparse
import logging
import os
import warnings
from typing import Any

from megatron_multiturn.errors import ConfigError

TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
)


def add_tokenizer_flags(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the flags, under Megatron's names."""
    group = parser.add_argument_group("tokenizer", "as for training; see Megatron's own flags")
    group.add_argument("--tokenizer-type", required=required, choices=TOKENIZER_TYPES)
    group.add_argument("--tokenizer-model", required=required, metavar="PATH")
    group.add_argument("--tokenizer-metadata", dest="metadata_path", metavar="FILE")
    group.add_argument("--vocab-file", metavar="FILE")
    group.add_argument("--merge-file", metavar="FILE")
    group.add_argument(
        "--tokenizer-special-tokens", dest="special_tokens", nargs="*", metavar="TOKEN"
    )
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true")
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")


def build_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer for the flags in `args`; ConfigError if it cannot be built."""
    if not os.path.exists(args.tokenizer_model) and args.tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(f"--tokenizer-model {args.tokenizer_model}: no such file; correct it")
    with warnings.catch_warnings():  # Megatron warns of accelerators that only training misses
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # Takes seconds to import: not for --help or a mistyped file name.
        from megatron_multiturn.megatron_compat import build_megatron_tokenizer

    # What else Megatron reads: only of use to training, or to other tokenizer types.
    unused = {
        "chat_template": None,
        "vocab_size": None,
        "pad_vocab_size": False,
        "padded_vocab_size": None,
        "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
        "rank": 0,
    }
    try:
        return build_megatron_tokenizer(argparse.Namespace(**(unused | vars(args))))
    except Exception as error:  # Megatron and the tokenizer libraries raise of every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "pass the model file that SentencePiece wrote"
        if args.special_tokens and not args.tokenizer_sentencepiece_legacy:
            remedy = "pass --tokenizer-sentencepiece-legacy too, which adds special tokens to it"
        if args.tokenizer_type == "HuggingFaceTokenizer":
            remedy = "pass a folder that holds tokenizer.json"
            if not os.path.exists(args.tokenizer_model):
                reason = f"there is no such folder here, and no hub gave it either ({reason})"
        raise ConfigError(
            f"Megatron cannot build the {args.tokenizer_type} of --tokenizer-model "
            f"{args.tokenizer_model}: {reason}; {remedy}"
        ) from error
