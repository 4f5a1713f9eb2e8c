"""How many rows an epoch has, and how many iterations so many epochs take.

An epoch is every session of the training split once. Of a blend by weights, which repeats some
datasets more often than others, it is as many rows as its datasets hold together.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from megatron.core.datasets.utils import Split

from megatron_multiturn.batches import BatchSchedule
from megatron_multiturn.blends import leaves_of
from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.store import SessionStore


def set_training_length(
    args: argparse.Namespace, config: MultiTurnDatasetConfig, schedule: BatchSchedule
) -> str:
    """Set the `train_iters` that make `train_epochs`, in place; returns what to tell the user.

    With a batch size that grows, Megatron counts in rows: then `train_samples`. The rows of a
    last batch that does not fill are left out.
    """
    epochs = args.train_epochs
    given = [name for name in ("train_iters", "train_samples") if getattr(args, name)]
    if given:
        raise ConfigError(
            f"--train-epochs and --{given[0].replace('_', '-')} both say how long to train; pass "
            "one of them"
        )
    if not (epochs > 0 and math.isfinite(epochs)):
        raise ConfigError(f"--train-epochs is {epochs}; it must be above 0")
    blend = training_blend(config)
    if blend is None:
        raise ConfigError("--train-epochs needs training data; pass --data-path PREFIX")
    prefixes, weights = blend
    if len(prefixes) > 1 and weights is None and epochs > 1:
        raise ConfigError(
            f"--train-epochs {epochs:g}: Megatron does not repeat several datasets without "
            "weights; put a weight before each path"
        )
    rows_per_epoch = sum(len(rows) for rows in _one_epoch(config, prefixes))
    num_rows = math.floor(epochs * rows_per_epoch * (1 + 1e-12))
    end, size = schedule.batch_of(num_rows)
    if not end:
        raise ConfigError(
            f"--train-epochs {epochs:g} is {num_rows:,} rows, which do not fill a global batch of "
            f"{size:,}; lower --global-batch-size or train longer"
        )
    if len(schedule.steps) > 1:
        args.train_samples = end
        length = f"--train-samples {end}"
    else:
        args.train_iters = end // size
        length = f"--train-iters {end // size}"
    return f"--train-epochs {epochs:g}: {rows_per_epoch:,} rows an epoch, so {length}"


def training_blend(config: MultiTurnDatasetConfig) -> tuple[list[str], list[float] | None] | None:
    """(prefixes, weights) of the training data; None if there are none."""
    blend = config.blend
    if config.blend_per_split is not None:
        blend = config.blend_per_split[Split.train.value]
    return None if blend is None else (blend[0], blend[1])


def rows_per_epoch(rows: Any) -> int:
    """Rows of an epoch of the training data, a packed dataset or a blend of them."""
    return sum(leaf.plan.stats.num_rows for leaf in leaves_of(rows))


def describe_length(rows: Any, num_rows: int, consumed: int) -> str:
    """How many epochs `num_rows` rows are, of each dataset, and where in them the run is."""
    epoch = rows_per_epoch(rows)
    lines = [f"{num_rows / epoch:.4g} epochs of {epoch:,} rows"]
    if consumed:
        lines.append(f"goes on at epoch {consumed / epoch:.4f} (row {consumed:,})")
    if hasattr(rows, "dataset_index") and len(leaves_of(rows)) > 1:
        seen = np.bincount(rows.dataset_index[:num_rows], minlength=len(rows.datasets))
        lines += [
            f"{leaf.dataset.prefix} {count / max(1, leaf.plan.stats.num_rows):.4g} times"
            for leaf, count in zip(rows.datasets, seen.tolist(), strict=True)
        ]
    return "; ".join(lines)


def training_sessions(store: SessionStore, config: MultiTurnDatasetConfig) -> range:
    """Which sessions of a dataset are trained on."""
    begin, end = 0.0, 1.0
    if config.blend_per_split is None:
        begin, end = config.split_matrix[Split.train.value] or (0.0, 0.0)
    # Rounded as by Megatron's builder.
    return range(*(round(share * float(store.num_sessions)) for share in (begin, end)))


def _one_epoch(config: MultiTurnDatasetConfig, prefixes: Sequence[str]) -> list[MultiTurnDataset]:
    """The training split of every dataset, one epoch of it, before there are process groups."""
    datasets = []
    for prefix in prefixes:
        store = MultiTurnDataset.build_low_level_dataset(prefix, config)
        indices = np.array(training_sessions(store, config), dtype=np.int32)
        datasets.append(MultiTurnDataset(store, prefix, indices, None, Split.train, config))
    return datasets
