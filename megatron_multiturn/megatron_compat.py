"""Every name of Megatron that has moved or may move, and what differs between versions.

The other modules take Megatron's datasets, tokenizers and runtime from here, so that a new
Megatron is this file's work, and that of `megatron_hooks`, which changes Megatron. Supported:
megatron-core 0.17 and later. What only training needs is imported when it is called:
preprocessing must start quickly in every worker.
"""

import argparse
import dataclasses
import functools
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

__all__ = ["IndexedDataset", "IndexedDatasetBuilder", "get_bin_path", "get_idx_path"]  # Megatron's

# A loss this many times the largest seen so far counts as spiky, as in pretrain_gpt.py.
_SPIKY_LOSS_FACTOR = 10


def build_megatron_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's own tokenizer for the tokenizer flags in `args`."""
    return build_tokenizer(args)


def object_storage_reader(path: str) -> Any:
    """Megatron's reader of a .bin in object storage: read(dtype, count, offset in bytes).

    It asks for what is read and no more: sessions of a row lie far apart, and of the 256 MiB
    that Megatron's S3 reader takes at a time next to nothing would be used.
    """
    from megatron.core.datasets import indexed_dataset, object_storage_utils

    config = object_storage_utils.ObjectStorageConfig(path_to_idx_cache="", bin_chunk_nbytes=1)
    access = object_storage_utils.get_object_storage_access(path)
    return indexed_dataset.OBJECT_STORAGE_BIN_READERS[access](path, config)


def download_object(remote_path: str, local_path: str) -> None:
    """Copy a file from object storage, on whichever rank this is.

    Megatron's `cache_index_file` copies on global rank 0 alone, and no other node has it then.
    """
    from megatron.core.datasets import object_storage_utils

    if object_storage_utils.get_object_storage_access(remote_path) == "s3":
        client = object_storage_utils.boto3.client("s3")
        try:
            object_storage_utils._s3_download_file(client, remote_path, local_path)
        finally:
            client.close()
    else:
        object_storage_utils.MultiStorageClientFeature.import_package().download_file(
            remote_path, local_path
        )


def get_args() -> argparse.Namespace:
    """Megatron's parsed arguments; only in a training process."""
    from megatron.training import get_args

    return get_args()


def parsed_args(add_args: Callable[..., Any] | None) -> argparse.Namespace:
    """Megatron's arguments when a script calls `pretrain`.

    add_args: the script's own `extra_args_provider`. Before 0.18 it is `pretrain` that parses, so
        they are parsed here once more.
    """
    from megatron.training import arguments, global_vars

    if global_vars._GLOBAL_ARGS is not None:
        return get_args()
    return arguments.parse_args(add_args)


def checkpoint_exists(folder: str | None) -> bool:
    """Whether there is a checkpoint of Megatron's to load."""
    from megatron.training.checkpointing import checkpoint_exists

    return bool(checkpoint_exists(folder))


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


def scheduled_batch_sizes(args: argparse.Namespace) -> list[int]:
    """The sizes that `--step-batch-size-schedule` gives the global batch one after the other."""
    return [size for _, size in batch_size_thresholds(args)]


def batch_size_thresholds(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The same, each with the number of rows that must be consumed for it."""
    if not getattr(args, "step_batch_size_schedule", None):
        return []
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    parse = StepBatchsizeNumMicroBatchesCalculator._parse_schedule
    return parse(args.step_batch_size_schedule, args.seq_length)


def evaluation_batch_sizes(args: argparse.Namespace) -> tuple[int, int]:
    """Rows of a global batch and of a micro-batch in evaluation.

    Before 0.18 they are those of training.
    """
    if not hasattr(args, "eval_global_batch_size"):
        return args.global_batch_size, args.micro_batch_size
    return args.eval_global_batch_size, args.eval_micro_batch_size


def tensor_parallel_group() -> Any:
    """The process group of this rank's tensor parallel peers."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def tensor_parallel_host_group() -> Any:
    """A group of the same ranks for tensors on the CPU, made at the first call, of all of them."""
    return _host_group(tensor_parallel_group())


@functools.cache
def _host_group(group: Any) -> Any:
    if group.size() == 1 or torch.distributed.get_backend(group) == "gloo":
        return group
    ranks = torch.distributed.get_process_group_ranks(group)
    return torch.distributed.new_group(ranks, backend="gloo", use_local_synchronization=True)


def tensor_parallel_source_rank() -> int:
    """The global rank of tensor parallel rank 0 of this rank's group."""
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_src_rank())


def context_parallel_group() -> Any:
    """The process group of the ranks that share this rank's rows."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def data_parallel_size() -> int:
    """Number of ranks that read different rows."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def sum_over_readers(value: torch.Tensor) -> torch.Tensor:
    """Sum, over the ranks that read different rows, of what tensor parallel rank 0 has read."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.broadcast(value, tensor_parallel_source_rank(), group=group)
    torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value


def num_micro_batches() -> int:
    """Number of micro-batches of a data parallel rank in the present training step."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return int(get_num_microbatches())


def rows_after_this_step(args: argparse.Namespace) -> int:
    """Rows that will have been trained on after the present training step."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    return int(args.consumed_train_samples + get_current_global_batch_size())


def all_to_all(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Exchange equal parts of the first dimension among the ranks; differentiable."""
    from megatron.core.tensor_parallel import all_to_all

    return all_to_all(group, tensor)


def model_config(model: Any) -> Any:
    """The `TransformerConfig` of a wrapped model."""
    from megatron.core.utils import get_model_config

    return get_model_config(model)


def is_first_model_chunk(model: Any) -> bool:
    """Whether `model` is the first virtual pipeline stage of this rank, or its only part."""
    from megatron.core.utils import get_attr_wrapped_model

    return not get_attr_wrapped_model(model, "vp_stage")


def has_embedding(model: Any) -> bool:
    """Whether `model` holds the first layers, and so embeds the tokens."""
    from megatron.core.utils import get_attr_wrapped_model

    return bool(get_attr_wrapped_model(model, "pre_process"))


def routers(model: Any) -> list[Any]:
    """The routers of the mixtures of experts in `model`."""
    from megatron.core.transformer.moe.router import Router

    return [module for module in model.modules() if isinstance(module, Router)]


def scale_auxiliary_losses(config: Any, scale: Callable[[], torch.Tensor]) -> None:
    """Let `scale` give the factor of the routers' losses before each backward pass.

    Before 0.19 the configuration has no place for it, and the function that Megatron hands its own
    factor to is replaced.
    """
    if hasattr(config, "moe_grad_scale_func"):
        config.moe_grad_scale_func = scale
        return
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    set_loss_scale = _own_set_loss_scale()
    MoEAuxLossAutoScaler.set_loss_scale = staticmethod(lambda _: set_loss_scale(scale()))


@functools.cache
def _own_set_loss_scale() -> Callable[[torch.Tensor], None]:
    """Megatron's own function, before it is replaced."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    setter: Callable[[torch.Tensor], None] = MoEAuxLossAutoScaler.set_loss_scale
    return setter


def packed_seq_params(**fields: Any) -> Any:
    """Megatron's `PackedSeqParams` of those fields that this version has."""
    from megatron.core.packed_seq_params import PackedSeqParams

    known = {field.name for field in dataclasses.fields(PackedSeqParams)}
    return PackedSeqParams(**{name: fields[name] for name in known & fields.keys()})


def attention_window(config: Any, layer_number: int) -> int | None:
    """How many earlier positions a query of this layer sees; None: all."""
    from megatron.core.transformer.utils import is_layer_window_attention

    if not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    left = int(config.window_size[0])
    return None if left < 0 else left


def te_attention_class() -> Any:
    """Megatron's wrapper of Transformer Engine's attention; only where that is installed."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def keep_what_is_sent(config: Any) -> None:
    """Let outputs live that gloo may still be sending to the next pipeline stage.

    0.17 frees them at once with virtual stages, which on a CPU sends what comes to lie there.
    """
    if is_older_than(0, 18):
        config.deallocate_pipeline_outputs = False


def is_older_than(major: int, minor: int) -> bool:
    """Whether the Megatron that runs is of an earlier version."""
    from megatron.core.package_info import MAJOR, MINOR

    return (int(MAJOR), int(MINOR)) < (major, minor)


def local_norms() -> tuple[type, ...]:
    """The classes that Megatron's layer specs without Transformer Engine name for norms."""
    from megatron.core.models import backends

    return tuple(filter(None, (backends.WrappedTorchNorm, backends.FusedLayerNorm)))


def block_spec(spec: Any, config: Any, vp_stage: int | None) -> Any:
    """A spec of Megatron's for the layers of this rank as a block: `layer_specs`, `layer_norm`."""
    from megatron.core.transformer import transformer_block

    if hasattr(spec, "layer_specs"):
        return spec
    num_layers = transformer_block.get_num_layers_to_build(config, vp_stage)
    return transformer_block.TransformerBlockSubmodules(
        layer_specs=[spec] * num_layers, layer_norm=transformer_block.LayerNormImpl
    )


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
    training.pretrain(
        config,
        None,
        ModelType.encoder_or_decoder,
        None,
        get_embedding_ranks=functools.partial(embedding_ranks, args),
    )


def embedding_ranks(args: argparse.Namespace, pipeline_ranks: Sequence[int]) -> list[int]:
    """Which of a pipeline's ranks hold the word embedding, whose gradients they share.

    The first; the last with tied embeddings; and those with layers of multi-token prediction.
    """
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
    from megatron.training.arguments import core_transformer_config_from_args

    ranks = {pipeline_ranks[0]}
    if len(pipeline_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline_ranks[-1])
        if args.mtp_num_layers:
            ranks |= {*get_mtp_ranks(list(pipeline_ranks), core_transformer_config_from_args(args))}
    return sorted(ranks)


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
