"""What the rows of a run are made of: one packed dataset, or a blend of them by Megatron.

Both are known here by what they hold: a packed dataset has a `plan`; a blend has `datasets` and,
for every row, which of them it is from (`dataset_index`) and which of its rows it is
(`dataset_sample_index`).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.balance import row_costs
from megatron_multiturn.packing import PackPlan


def leaves_of(rows: Any) -> list[Any]:
    """The packed datasets of a blend, or in what is put in order; one alone is the only one."""
    if not hasattr(rows, "datasets"):
        return [rows]
    return [leaf for part in rows.datasets for leaf in leaves_of(part)]


def plan_digest(plan: PackPlan) -> str:
    """Names which sessions lie in which row of a plan's first epoch; of many rows, in samples.

    A longer plan has the same.
    """
    num_rows = plan.stats.num_rows
    digest = hashlib.sha256(json.dumps(asdict(plan.stats), sort_keys=True).encode())
    for row in np.linspace(0, num_rows - 1, num=min(num_rows, 4096)).astype(np.int64).tolist():
        sessions = plan.pieces.session[plan.pieces_of_row(row)]
        digest.update(np.asarray(sessions, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def costs_of(
    rows: Any,
    numbers: NDArray[np.int64],
    of_plan: Callable[[PackPlan, NDArray[np.int64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Attention cost of some rows, `of_plan` saying that of a packed dataset's; (len(numbers),)."""
    if not hasattr(rows, "datasets"):
        return of_plan(rows.plan, numbers)
    costs = np.empty(len(numbers))
    of_dataset, row_of_dataset = rows.dataset_index[numbers], rows.dataset_sample_index[numbers]
    for index, leaf in enumerate(rows.datasets):
        here = np.flatnonzero(of_dataset == index)
        if len(here):
            costs[here] = of_plan(leaf.plan, row_of_dataset[here])
    return costs


def costs_of_range(plan: PackPlan, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of rows that lie close together."""
    begin, stop = int(numbers.min()), int(numbers.max()) + 1
    positions = plan.pieces.num_positions()
    costs = row_costs(plan.row_offsets[begin : stop + 1], plan.row_pieces, positions)
    return costs[numbers - begin]


def costs_of_some(plan: PackPlan, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of a few rows anywhere, without looking at the others."""
    pieces = [plan.pieces_of_row(row) for row in numbers.tolist()]
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in pieces], out=offsets[1:])
    positions = plan.pieces.num_tokens[np.concatenate(pieces)] - 1
    return row_costs(offsets, np.arange(len(positions)), positions)


def epochs_of(
    blend: Any, numbers: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of which dataset each row of a blend is, and in which of its epochs."""
    dataset = blend.dataset_index[numbers].astype(np.int64)
    rows_per_epoch = np.array([max(1, leaf.plan.stats.num_rows) for leaf in blend.datasets])
    return dataset, blend.dataset_sample_index[numbers] // rows_per_epoch[dataset]
