"""Every name of Megatron that has moved or may move, and what differs between versions.

The other modules take Megatron's datasets, tokenizers and runtime from here, so that a new
Megatron is one file's work. Supported: megatron-core 0.19 and later. What only training needs
is imported when it is called: preprocessing must start quickly in every worker.
"""

import argparse
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron_multiturn.errors import ConfigError

__all__ = [
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "build_megatron_tokenizer",
    "get_args",
    "get_bin_path",
    "get_idx_path",
    "get_timers",
    "hook_arguments",
    "hook_pretrain",
    "print_rank_0",
    "run_gpt",
    "skip_needless_compilation",
    "tensor_parallel_group",
    "tensor_parallel_source_rank",
    "validate_loss",
]

# A loss this many times the largest seen so far counts as spiky, as in pretrain_gpt.py.
_SPIKY_LOSS_FACTOR = 10

ArgsHook = Callable[[argparse.Namespace], None]
ParserHook = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def build_megatron_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's own tokenizer for the tokenizer flags in `args`."""
    return build_tokenizer(args)


def get_args() -> argparse.Namespace:
    """Megatron's parsed arguments; only in a training process."""
    from megatron.training import get_args

    return get_args()


def get_timers() -> Any:
    """Megatron's timers."""
    from megatron.training import get_timers

    return get_timers()


def print_rank_0(message: str) -> None:
    """Print on global rank 0."""
    from megatron.training import print_rank_0

    print_rank_0(message)


def get_tokenizer() -> Any:
    """The tokenizer of this training process."""
    from megatron.training import get_tokenizer

    return get_tokenizer()


def get_blends(args: argparse.Namespace) -> tuple[Any, Any]:
    """(blend, blend per split) of the `--data-path` family, for the blended dataset builder."""
    from megatron.training.utils import get_blend_and_blend_per_split

    return get_blend_and_blend_per_split(args)


def tensor_parallel_group() -> Any:
    """The process group of this rank's tensor parallel peers."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def tensor_parallel_source_rank() -> int:
    """The global rank of tensor parallel rank 0 of this rank's group."""
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_src_rank())


def validate_loss(loss: torch.Tensor, *, check_finite: bool, check_spiky: bool) -> None:
    """Hand the loss of a micro-batch to Megatron's rerun state machine, as its own script does."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    machine = get_rerun_state_machine()
    if check_finite:
        for rejects, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=rejects,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if check_spiky:
        machine.validate_result(
            result=loss,
            rejection_func=functools.partial(
                machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def skip_needless_compilation() -> None:
    """Let `pretrain` start where the dataset helpers are compiled and cannot be built.

    The wheel brings the compiled helpers and no Makefile; `compile_helpers` would end the
    process. It is replaced only then: a checkout goes on building its own.
    """
    from megatron.core.datasets import utils

    if os.path.exists(os.path.join(os.path.dirname(utils.__file__), "Makefile")):
        return
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        raise ConfigError(
            f"Megatron's dataset helpers are not compiled ({error}), and the installed Megatron "
            "has no Makefile to build them; install the megatron-core wheel for this Python, or "
            "run with the pretrain_gpt.py of a checkout"
        ) from error
    utils.compile_helpers = lambda: None


def hook_arguments(add_args: ParserHook, prepare: ArgsHook) -> None:
    """Let Megatron's parser know our flags, and `prepare` see the arguments before validation.

    Patches `parse_args` and `validate_args` of `megatron.training.arguments`: scripts parse by
    functions of that module which offer a caller no other way in. In between Megatron may take
    over arguments of a checkpoint. A YAML configuration is validated elsewhere, so `prepare`
    sees it at once.
    """
    from megatron.training import arguments

    parse_args, validate_args = arguments.parse_args, arguments.validate_args

    @functools.wraps(parse_args)
    def parse_args_with_ours(
        extra_args_provider: ParserHook | None = None, *args: Any, **kwargs: Any
    ) -> argparse.Namespace:
        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = add_args(parser)
            return extra_args_provider(parser) if extra_args_provider else parser

        parsed = parse_args(provider, *args, **kwargs)
        if parsed.yaml_cfg is not None:
            prepare(parsed)
        return parsed

    @functools.wraps(validate_args)
    def validate_prepared_args(parsed: argparse.Namespace, *args: Any, **kwargs: Any) -> Any:
        prepare(parsed)
        return validate_args(parsed, *args, **kwargs)

    arguments.parse_args = parse_args_with_ours
    arguments.validate_args = validate_prepared_args


def hook_pretrain(replacements: Callable[[], dict[str, Any]]) -> None:
    """Hand `pretrain` our arguments by parameter name, whatever its signature in this version.

    replacements: called when the script calls `pretrain`, with arguments parsed; the values
        take the place of the script's.
    """
    from megatron import training

    pretrain = training.pretrain

    @functools.wraps(pretrain)
    def pretrain_with_ours(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(pretrain).bind(*args, **kwargs)
        bound.arguments.update(replacements())
        return pretrain(*bound.args, **bound.kwargs)

    training.pretrain = training.training.pretrain = pretrain_with_ours


def run_gpt() -> None:
    """What `pretrain_gpt.py` does, for the wheel, which has no such script."""
    from megatron import training
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    training.pretrain(config, None, ModelType.encoder_or_decoder, None)


def build_blended_datasets(
    dataset_class: type,
    num_samples: Sequence[int | None],
    is_built: Callable[[], bool],
    config: Any,
) -> list[Any]:
    """(train, valid, test) by Megatron's blended builder; collective over all ranks."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    return BlendedMegatronDatasetBuilder(dataset_class, num_samples, is_built, config).build()
