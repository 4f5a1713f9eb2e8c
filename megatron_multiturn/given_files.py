"""Mistakes in the files that flags name, at which Megatron ends without saying what is wrong."""

import argparse
import os
from collections.abc import Sequence

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.library_tokenizers import SENTENCEPIECE_TYPES


def check_given_files(args: argparse.Namespace) -> None:
    """Raise ConfigError for a mistake in Megatron's parsed arguments, before it opens the files."""
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        _check_blend(f"--{name.replace('_', '-')}", getattr(args, name, None) or [])
    model = args.tokenizer_model or ""
    is_here = model and "://" not in model  # else it is in object storage
    if args.tokenizer_type in SENTENCEPIECE_TYPES and is_here and not os.path.isfile(model):
        found = "is a folder" if os.path.isdir(model) else "is not there"
        raise ConfigError(
            f"--tokenizer-model {model} {found}, where --tokenizer-type {args.tokenizer_type} "
            "wants a file that SentencePiece wrote; for a folder of Hugging Face's pass "
            "--tokenizer-type HuggingFaceTokenizer"
        )
    start = args.pretrained_checkpoint
    if start and not any(map(megatron.checkpoint_exists, (start, args.load))):
        raise ConfigError(
            f"--pretrained-checkpoint {start} holds no checkpoint of Megatron's (a folder with "
            "latest_checkpointed_iteration.txt in it)"
        )
    if args.save and not args.save_interval:
        raise ConfigError("--save needs --save-interval, in iterations")


def _check_blend(flag: str, items: Sequence[str]) -> None:
    """A list of prefixes, or one of weights and prefixes that take turns."""
    are_numbers = [_is_number(item) for item in items]
    if any(are_numbers) and are_numbers != [True, False] * (len(items) // 2):
        raise ConfigError(
            f"{flag} {' '.join(items)}: weights and prefixes do not take turns; give every prefix "
            "a weight before it, or none"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
