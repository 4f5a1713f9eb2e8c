"""The order in which a run trains on its rows, from one packed dataset or a blend of them.

`BalancedRows` stands between Megatron's sampler and the dataset that Megatron's builder made. The
order is an array on disk, built once per node and memory-mapped, for one window of rows after the
other; a longer run's order begins with the shorter one's. A window is

    one dataset            an epoch; a batch over its end holds rows of both epochs
    a blend by weights     so many batches; each dataset's rows keep the order of its epochs
    a blend without        all of it: every dataset once
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.balance import (
    Imbalance,
    balanced_order,
    choose_group_size,
    keep_epochs,
    measure_imbalance,
    row_in_batch,
)
from megatron_multiturn.batches import BatchSchedule
from megatron_multiturn.blends import (
    costs_of,
    epochs_of,
    leaves_of,
    plan_digest,
)
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.shared_files import atomic, locked

# Raise it whenever the same rows would come in another order.
_ORDER_VERSION = 2

# Batches of a blend that are put together from the same rows.
_WINDOW_BATCHES = 256

# Rows of an order that its digest is of at most.
_DIGEST_ROWS = 2**16

# As many rows as the log's figures are of at most, in whole batches.
_MEASURED_ROWS = 2**14


def end_of_window(schedule: BatchSchedule, row: int) -> int:
    """The end of the last window that a blend by weights needs, to train on rows before `row`."""
    stop = 0
    while stop < row:
        stop = schedule.end_of_batches(stop, _WINDOW_BATCHES)
    return stop


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOrder:
    """Which row comes when, before `row_in_batch` lays it out for a micro-batch size."""

    order: NDArray[np.int64]  # (num_rows,)
    group_sizes: dict[int, int]  # by batch size
    first_window: int  # rows of the first window, whose order no later one changes


class BalancedRows:
    """A dataset whose rows come in an order that evens the attention cost of ranks."""

    def __init__(
        self, rows: Any, row_order: RowOrder, schedule: BatchSchedule, micro_batch_size: int
    ) -> None:
        self.datasets = [rows]
        self.split = rows.index_split if hasattr(rows, "index_split") else rows.split
        self.schedule = schedule
        self._rows = rows
        self._order = row_order.order
        self._group_sizes = row_order.group_sizes
        self._first_window = row_order.first_window
        self._micro_batch_size = micro_batch_size

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, idx: int) -> dict[str, NDArray[Any]]:
        """The row that is trained on after `idx` others."""
        return self._rows[self.row_at(idx)]

    def row_at(self, idx: int) -> int:
        """Which row of the dataset that is."""
        first, size = self.schedule.batch_of(idx)
        if first + size <= len(self._order):
            idx = first + row_in_batch(
                idx - first,
                batch_size=size,
                group_size=self._group_sizes[size],
                micro_batch_size=self._micro_batch_size,
            )
        return int(self._order[idx])

    def digest(self) -> str:
        """Names the order, by its beginning; a longer order has the same."""
        num_rows = min(self._first_window, _DIGEST_ROWS)
        digest = hashlib.sha256(json.dumps(sorted(self._group_sizes.items())).encode())
        digest.update(np.ascontiguousarray(self._order[:num_rows]).tobytes())
        return digest.hexdigest()[:16]

    def imbalance(
        self, data_parallel_size: int, begin: int = 0
    ) -> tuple[Imbalance, Imbalance] | None:
        """Of ranks that read batches from row `begin` on as they were, and in this order.

        None if no whole batch is left, or if the ranks cannot share one.
        """
        begin, size = self.schedule.batch_of(begin)
        stop = min(len(self), begin + max(size, _MEASURED_ROWS))
        steps = [step for step, _ in self.schedule.steps if step > begin]
        numbers = np.arange(begin, begin + (min([stop, *steps]) - begin) // size * size)
        if not len(numbers) or size % (data_parallel_size * self._micro_batch_size):
            return None
        ordered = np.array([self.row_at(number) for number in numbers.tolist()])
        before, after = (
            measure_imbalance(
                costs_of(self._rows, rows).reshape(-1, size),
                data_parallel_size=data_parallel_size,
                micro_batch_size=self._micro_batch_size,
            )
            for rows in (numbers, ordered)
        )
        return before, after


def balance_rows(
    rows: Any,
    schedule: BatchSchedule,
    *,
    seed: int,
    micro_batch_size: int,
    has_weights: bool,
    folder: str | Path,
) -> BalancedRows:
    """`rows`, a packed dataset or a blend of them, in balanced order.

    has_weights: the blend repeats its datasets by weights, else it holds each once.
    folder: keeps the order for other processes and runs.
    Raises DatasetError if the folder cannot be written.
    """
    key = {
        "version": _ORDER_VERSION,
        "data": [leaf.dataset.manifest.to_json() for leaf in leaves_of(rows)],
        "plans": [plan_digest(leaf.plan) for leaf in leaves_of(rows)],
        "num_rows": len(rows),
        "blend": getattr(rows, "unique_description_hash", None),
        "has_weights": has_weights,
        "batches": schedule.steps,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    stem = Path(folder) / f"order-{digest}"
    try:
        row_order = _load(stem)
        if row_order is None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            with locked(stem.with_suffix(".lock"), f"put {len(rows):,} rows in order"):
                row_order = _load(stem)  # another process may have built it meanwhile
                if row_order is None:
                    _build(stem, rows, schedule, seed, has_weights)
                    row_order = _load(stem)
    except OSError as error:
        raise DatasetError(
            f"cannot keep the order of rows in {stem.parent}: {error}; pass a writable folder with "
            "--data-cache-path"
        ) from error
    assert row_order is not None
    return BalancedRows(rows, row_order, schedule, micro_batch_size)


def _load(stem: Path) -> RowOrder | None:
    try:
        description = json.loads(stem.with_suffix(".json").read_text())
        order = np.asarray(np.load(stem.with_suffix(".npy"), mmap_mode="r"))
    except (FileNotFoundError, ValueError):
        return None  # not made yet, or damaged since
    return RowOrder(
        order=order,
        group_sizes={int(size): group for size, group in description["group_sizes"].items()},
        first_window=description["first_window"],
    )


def _build(stem: Path, rows: Any, schedule: BatchSchedule, seed: int, has_weights: bool) -> None:
    """Write the order and, last, its description."""
    windows = list(_windows(rows, schedule, has_weights))
    num_rows = windows[-1][1]
    group_sizes: dict[int, int] = {}
    with atomic(stem.with_suffix(".npy")) as temporary:
        order = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=(num_rows,))
        for number, (begin, stop) in enumerate(windows):
            numbers = np.arange(begin, stop)
            costs = costs_of(rows, numbers)
            for size in schedule.sizes():
                if size not in group_sizes:
                    group_sizes[size] = choose_group_size(costs, size)
            window = balanced_order(
                costs,
                schedule.stretches(begin, stop),
                group_sizes=group_sizes,
                seed=[seed, number],
            )
            if hasattr(rows, "datasets"):
                dataset, epoch = epochs_of(rows, numbers)
                window = keep_epochs(window, costs, epoch, dataset)
            order[begin:stop] = begin + window
        order.flush()
    with atomic(stem.with_suffix(".json")) as temporary:
        description = {
            "first_window": windows[0][1],
            "group_sizes": group_sizes,
        }
        temporary.write_text(json.dumps(description))


def _windows(rows: Any, schedule: BatchSchedule, has_weights: bool) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of every window."""
    if not hasattr(rows, "datasets"):
        num_rows = rows.plan.stats.num_rows
        yield from ((begin, begin + num_rows) for begin in range(0, len(rows), num_rows))
    elif has_weights:
        begin = 0
        while (stop := schedule.end_of_batches(begin, _WINDOW_BATCHES)) <= len(rows):
            yield begin, stop
            begin = stop
    else:
        yield 0, len(rows)
