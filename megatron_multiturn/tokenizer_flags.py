"""Megatron's tokenizer flags for our own commands, and the tokenizer that they describe."""

import argparse
import contextlib
import logging
import os
import warnings
from typing import Any

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.library_tokenizers import (
    SENTENCEPIECE_TYPES,
    hidden_torch,
    make_library_tokenizer,
)

TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")


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


def build_tokenizer(args: argparse.Namespace, *, hides_torch: bool = False) -> Any:
    """The tokenizer for the flags in `args`: Megatron's, or what is alike and quicker to make.

    hides_torch: from `transformers`, which in this process cannot use it any more then. Raises
    ConfigError if the tokenizer cannot be built.
    """
    if not os.path.exists(args.tokenizer_model) and args.tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(f"--tokenizer-model {args.tokenizer_model}: no such file; correct it")
    try:
        with hidden_torch() if hides_torch else contextlib.nullcontext():
            tokenizer = make_library_tokenizer(args)
        return tokenizer or build_with_megatron(args)
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
            f"the {args.tokenizer_type} of --tokenizer-model {args.tokenizer_model} cannot be "
            f"built: {reason}; {remedy}"
        ) from error


def build_with_megatron(args: argparse.Namespace) -> Any:
    """Megatron's own tokenizer for the flags in `args`; raises whatever Megatron raises."""
    with warnings.catch_warnings():  # Megatron warns of accelerators that only training misses
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # Takes seconds to import.
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
    return build_megatron_tokenizer(argparse.Namespace(**(unused | vars(args))))
