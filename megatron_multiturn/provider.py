"""Which datasets a run trains on, and what every rank must know of their rows.

`--dataset-provider` chooses among the providers registered here. A provider has the signature
of Megatron's `train_valid_test_datasets_provider`.
"""

import argparse
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.batch import RowShape
from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.samples import largest_divisor_unit
from megatron_multiturn.vocabulary import tokenizer_fingerprint

DatasetsProvider = Callable[..., tuple[Any, Any, Any]]

_row_shape: RowShape | None = None


def row_shape() -> RowShape:
    """The shape of this run's rows; known once the datasets are built."""
    if _row_shape is None:
        raise ConfigError("the forward step was called before the datasets provider")
    return _row_shape


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Sequence[int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Packed rows of sessions: (train, valid, test), None where a split is empty.

    Built on tensor parallel rank 0 of every pipeline stage, since every stage needs the piece
    boundaries. Collective over all ranks.
    """
    args = megatron.get_args()
    config = dataset_config(args)
    if config.mock:
        raise ConfigError(
            "no data: pass --data-path PREFIX (or --train-data-path and its siblings) as written "
            "by megatron-multiturn-preprocess"
        )
    num_samples = list(train_val_test_num_samples)
    if num_samples[0] is not None:
        # The last batch of a schedule ends beyond --train-samples.
        num_samples[0] += max(megatron.scheduled_batch_sizes(args), default=0)
    train, valid, test = megatron.build_blended_datasets(
        MultiTurnDataset,
        num_samples,
        lambda: megatron.tensor_parallel_group().rank() == 0,
        config,
    )
    wanted = train_val_test_num_samples[0]
    if train is not None and wanted is not None and len(train) < wanted:
        raise ConfigError(
            f"the training data hold {len(train):,} rows, and --train-iters asks for {wanted:,}: "
            "Megatron does not repeat several datasets without weights; put a weight before each "
            "path, or lower --train-iters"
        )
    return train, valid, test


def dataset_config(args: argparse.Namespace) -> MultiTurnDatasetConfig:
    """The dataset's configuration from Megatron's arguments."""
    blend, blend_per_split = megatron.get_blends(args)
    batch_sizes = [args.global_batch_size, args.eval_global_batch_size]
    batch_sizes += megatron.scheduled_batch_sizes(args)
    return MultiTurnDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        loss_average=args.loss_average,
        divisor_unit=largest_divisor_unit(args.loss_average, max(batch_sizes), args.seq_length),
        long_session=args.long_session,
        session_window=args.session_window,
        window_context=args.window_context,
        piece_multiple=args.piece_multiple,
        tokenizer_identity=tokenizer_fingerprint(megatron.get_tokenizer(), args.tokenizer_type),
    )


def select_provider(name: str) -> DatasetsProvider:
    """The datasets provider for `--dataset-provider NAME`, ready for Megatron's `pretrain`.

    NAME is a key of `PROVIDERS` or MODULE:FUNCTION.
    """
    provider = PROVIDERS.get(name) or _import_provider(name)

    takes_vp_stage = "vp_stage" in inspect.signature(provider).parameters

    # With virtual pipeline stages Megatron insists on this parameter.
    def provide(*args: Any, vp_stage: int | None = None, **kwargs: Any) -> tuple[Any, Any, Any]:
        global _row_shape
        if takes_vp_stage:
            kwargs["vp_stage"] = vp_stage
        datasets = provider(*args, **kwargs)
        _row_shape = agree_on_row_shape(datasets, megatron.get_args().seq_length)
        return datasets

    # Megatron then calls it on every rank, and leaves the choice of ranks to it.
    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


PROVIDERS: dict[str, DatasetsProvider] = {"multiturn": train_valid_test_datasets_provider}


def agree_on_row_shape(datasets: Sequence[Any], sequence_length: int) -> RowShape:
    """Make the rows of all datasets on all ranks of one shape; collective over all ranks.

    Each packed dataset knows how many boundaries its rows have at most; the largest number
    over all of them holds for all.
    """
    leaves = list(_leaf_datasets(datasets))
    widths = [len(leaf[0]["cu_seqlens"]) for leaf in leaves]
    largest = torch.tensor(max(widths, default=0), device="cuda")
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    num_boundaries = int(largest)
    for leaf, width in zip(leaves, widths, strict=True):
        if isinstance(leaf, MultiTurnDataset):
            leaf.set_num_boundaries(num_boundaries)
        elif width != num_boundaries:
            raise DatasetError(
                f"{type(leaf).__name__} emits cu_seqlens of length {width} where another dataset "
                f"of this run emits {num_boundaries}; pad them to one length"
            )
    return RowShape(sequence_length=sequence_length, num_boundaries=num_boundaries)


def _leaf_datasets(datasets: Sequence[Any]) -> Iterator[Any]:
    """The datasets under blends and lists of validation sets that hold at least one row."""
    for dataset in datasets:
        if isinstance(dataset, list | tuple):
            yield from _leaf_datasets(dataset)
        elif hasattr(dataset, "datasets"):
            yield from _leaf_datasets(dataset.datasets)
        elif dataset is not None and len(dataset) > 0:
            yield dataset


def _import_provider(name: str) -> DatasetsProvider:
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ConfigError(
            f"--dataset-provider {name}: neither {', '.join(PROVIDERS)} or megatron, nor "
            "MODULE:FUNCTION"
        )
    try:
        provider = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--dataset-provider {name}: {error}; MODULE must be importable (its folder on "
            "PYTHONPATH, or next to the script) and hold FUNCTION"
        ) from error
    if not callable(provider):
        raise ConfigError(f"--dataset-provider {name}: {function_name} is not a function")
    return provider
