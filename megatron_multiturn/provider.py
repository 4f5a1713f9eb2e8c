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
from megatron_multiturn.batches import BatchSchedule
from megatron_multiturn.blends import leaves_of, plan_digest
from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.epochs import describe_length, rows_per_epoch, training_blend
from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.provider_names import registered_providers
from megatron_multiturn.resume import PLAN_ARGUMENT, agree_on_plan, check_goes_on, describe_plan
from megatron_multiturn.row_order import BalancedRows, balance_rows, end_of_window
from megatron_multiturn.samples import largest_divisor_unit
from megatron_multiturn.store import manifest_of
from megatron_multiturn.vocabulary import tokenizer_fingerprint

DatasetsProvider = Callable[..., tuple[Any, Any, Any]]

_row_shape: RowShape | None = None
_rows_per_epoch: int = 0


def row_shape() -> RowShape:
    """The shape of this run's rows; known once the datasets are built."""
    if _row_shape is None:
        raise ConfigError("the forward step was called before the datasets provider")
    return _row_shape


def training_epoch(num_rows: int) -> float | None:
    """How many epochs `num_rows` rows of training are; None where a provider does not say."""
    return num_rows / _rows_per_epoch if _rows_per_epoch else None


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Sequence[int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Packed rows of sessions: (train, valid, test), None where a split is empty.

    Built on tensor parallel rank 0 of every pipeline stage, since every stage needs the piece
    boundaries. Collective over all ranks.
    """
    args = megatron.get_args()
    config = dataset_config(args)
    require_data(config)
    num_samples = list(train_val_test_num_samples)
    wanted = num_samples[0]
    num_samples[0] = _rows_to_plan(args, config, wanted)
    train, valid, test = megatron.build_blended_datasets(
        MultiTurnDataset,
        num_samples,
        lambda: megatron.tensor_parallel_group().rank() == 0,
        config,
    )
    if train is None:
        agree_on_plan(None)
        return train, valid, test
    if wanted is not None and len(train) < wanted:
        raise ConfigError(
            f"the training data hold {len(train):,} rows, and --train-iters asks for {wanted:,}: "
            "Megatron does not repeat several datasets without weights; put a weight before each "
            "path, or lower --train-iters"
        )
    plan = None
    if wanted:
        train, plan = _put_in_order(train, wanted, args, config)
        evaluated = [leaf for rows in (valid, test) for leaf in _leaf_datasets([rows])]
        plan = plan | {"the rows of evaluation": str([plan_digest(x.plan) for x in evaluated])}
    agree_on_plan(plan)
    return train, valid, test


def _rows_to_plan(
    args: argparse.Namespace, config: MultiTurnDatasetConfig, wanted: int | None
) -> int | None:
    """How many rows of training data Megatron's builder is asked for."""
    blend = training_blend(config)
    if not wanted or blend is None:
        return wanted
    schedule = batch_schedule(args)
    # The last batch of a schedule ends beyond --train-samples.
    wanted += max(schedule.sizes()) if len(schedule.steps) > 1 else 0
    prefixes, weights = blend
    if args.balance_data_parallel and weights is not None:
        return end_of_window(schedule, wanted)
    if args.balance_data_parallel and len(prefixes) > 1:
        return None  # all there is: which of it comes first is decided here
    return wanted


def _put_in_order(
    train: Any, num_rows: int, args: argparse.Namespace, config: MultiTurnDatasetConfig
) -> tuple[Any, dict[str, str]]:
    """The training rows in the order of this run, and its plan, which must be its checkpoint's."""
    blend = training_blend(config)
    rows = train
    if args.balance_data_parallel:
        rows = balance_rows(
            train,
            batch_schedule(args),
            seed=config.random_seed,
            micro_batch_size=args.micro_batch_size,
            has_weights=blend is not None and blend[1] is not None,
            folder=config.path_to_cache or f"{leaves_of(train)[0].dataset.local_prefix}.plans",
        )
    plan = describe_plan(rows, config)
    check_goes_on(plan)
    setattr(args, PLAN_ARGUMENT, plan)
    _say(rows, train, num_rows, args)
    return rows, plan


def _say(rows: Any, train: Any, num_rows: int, args: argparse.Namespace) -> None:
    """Print, on rank 0, how long the training is and how evenly its ranks work."""
    if torch.distributed.get_rank():
        return
    print(f"> training: {describe_length(train, num_rows, args.consumed_train_samples)}")
    data_parallel_size = megatron.data_parallel_size()
    if isinstance(rows, BalancedRows) and data_parallel_size > 1:
        measured = rows.imbalance(data_parallel_size, args.consumed_train_samples)
        if measured is not None:
            print(
                f"> attention cost of the slowest of {data_parallel_size} data parallel ranks, by "
                f"the mean:\n  {measured[1]}; in shuffled order {measured[0]}",
                flush=True,
            )


def batch_schedule(args: argparse.Namespace) -> BatchSchedule:
    """The sizes of the run's global batches."""
    return BatchSchedule.from_thresholds(
        megatron.batch_size_thresholds(args) or [(0, args.global_batch_size)]
    )


def dataset_config(args: argparse.Namespace) -> MultiTurnDatasetConfig:
    """The dataset's configuration from Megatron's arguments, to train with its tokenizer."""
    config = planning_config(args)
    batch_sizes = [args.global_batch_size, megatron.evaluation_batch_sizes(args)[0]]
    batch_sizes += megatron.scheduled_batch_sizes(args)
    config.divisor_unit = largest_divisor_unit(
        args.loss_average, max(batch_sizes), args.seq_length, _turn_weights(config)
    )
    config.tokenizer_identity = tokenizer_fingerprint(megatron.get_tokenizer(), args.tokenizer_type)
    return config


def _turn_weights(config: MultiTurnDatasetConfig) -> set[float]:
    """All weights that turns of the run's datasets have; on ranks that read none of them, none."""
    if megatron.tensor_parallel_group().rank() != 0:
        return set()
    return {
        weight
        for prefix in dataset_prefixes(config)
        for weight in manifest_of(prefix, config.object_storage_cache_path).turn_weights
    }


def require_data(config: MultiTurnDatasetConfig) -> None:
    """Raise ConfigError if the flags name no dataset."""
    if config.mock:
        raise ConfigError(
            "no data: pass --data-path PREFIX (or --train-data-path and its siblings) as written "
            "by megatron-multiturn-preprocess"
        )


def dataset_prefixes(config: MultiTurnDatasetConfig) -> list[str]:
    """The prefixes of all datasets of the run, of whatever split, sorted."""
    blends = [config.blend, *(config.blend_per_split or ())]
    return sorted({prefix for blend in blends if blend is not None for prefix in blend[0]})


def planning_config(args: argparse.Namespace) -> MultiTurnDatasetConfig:
    """As much of it as decides the rows, which is known before Megatron validates its arguments."""
    blend, blend_per_split = megatron.get_blends(args)
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
        long_session=args.long_session,
        session_window=args.session_window,
        window_context=args.window_context,
        piece_multiple=args.piece_multiple,
    )


def select_provider(name: str) -> DatasetsProvider:
    """The datasets provider for `--dataset-provider NAME`, ready for Megatron's `pretrain`.

    NAME is a key of `PROVIDERS`, the name of an entry point or MODULE:FUNCTION.
    """
    provider = PROVIDERS.get(name) or _registered_provider(name) or _import_provider(name)

    takes_vp_stage = "vp_stage" in inspect.signature(provider).parameters

    # With virtual pipeline stages Megatron insists on this parameter.
    def provide(*args: Any, vp_stage: int | None = None, **kwargs: Any) -> tuple[Any, Any, Any]:
        global _row_shape, _rows_per_epoch
        if takes_vp_stage:
            kwargs["vp_stage"] = vp_stage
        datasets = provider(*args, **kwargs)
        _row_shape = agree_on_row_shape(datasets, megatron.get_args().seq_length)
        _rows_per_epoch = agree_on_epoch(datasets[0])
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


def agree_on_epoch(train: Any) -> int:
    """Rows of an epoch of the training data on all ranks, 0 if unknown; collective over them."""
    leaves = [] if train is None else leaves_of(train)
    is_ours = bool(leaves) and all(isinstance(leaf, MultiTurnDataset) for leaf in leaves)
    num_rows = torch.tensor(rows_per_epoch(train) if is_ours else 0, device="cuda")
    torch.distributed.all_reduce(num_rows, op=torch.distributed.ReduceOp.MAX)
    return int(num_rows)


def _leaf_datasets(datasets: Sequence[Any]) -> Iterator[Any]:
    """The datasets under blends and lists of validation sets that hold at least one row."""
    for dataset in datasets:
        if isinstance(dataset, list | tuple):
            yield from _leaf_datasets(dataset)
        elif hasattr(dataset, "datasets"):
            yield from _leaf_datasets(dataset.datasets)
        elif dataset is not None and len(dataset) > 0:
            yield dataset


def _registered_provider(name: str) -> DatasetsProvider | None:
    """The provider that an installed distribution offers under this name."""
    found = [point for point in registered_providers() if point.name == name]
    if not found:
        return None
    offering = [f"{point.value} of {point.dist.name if point.dist else '?'}" for point in found]
    if len(found) > 1:
        raise ConfigError(
            f"--dataset-provider {name}: {len(found)} installed distributions offer one of this "
            f"name: {', '.join(offering)}; pass MODULE:FUNCTION in its place"
        )
    try:
        return _checked_provider(name, found[0].load())
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--dataset-provider {name}: {offering[0]} cannot be loaded: {error}"
        ) from error


def _import_provider(name: str) -> DatasetsProvider:
    module_name, _, function_name = name.partition(":")
    if not function_name:
        names = [*PROVIDERS, "megatron", *(point.name for point in registered_providers())]
        raise ConfigError(
            f"--dataset-provider {name}: there is none of this name; pass one of "
            f"{', '.join(names)}, or MODULE:FUNCTION"
        )
    try:
        provider = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--dataset-provider {name}: {error}; MODULE must be importable (its folder on "
            "PYTHONPATH, or next to the script) and hold FUNCTION"
        ) from error
    return _checked_provider(name, provider)


def _checked_provider(name: str, provider: Any) -> DatasetsProvider:
    if not callable(provider):
        raise ConfigError(f"--dataset-provider {name}: {provider!r} is not a function")
    return provider
