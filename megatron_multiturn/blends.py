"""What the rows of a run are made of: one packed dataset, or a blend of them by Megatron.

Both are known here by what they hold: a packed dataset has a `plan`; a blend has `datasets` and,
for every row, which of them it is from (`dataset_index`) and which of its rows it is
(`dataset_sample_index`).
"""

import hashlib
import json
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


def costs_of(rows: Any, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Attention cost of some rows; (len(numbers),)."""
    if not hasattr(rows, "datasets"):
        return _costs_of_packed(rows, numbers)
    costs = np.empty(len(numbers))
    of_dataset, row_of_dataset = rows.dataset_index[numbers], rows.dataset_sample_index[numbers]
    for index, leaf in enumerate(rows.datasets):
        here = np.flatnonzero(of_dataset == index)
        if len(here):
            costs[here] = _costs_of_packed(leaf, row_of_dataset[here])
    return costs


def _costs_of_packed(leaf: Any, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same for a packed dataset; reads what it needs of these rows alone."""
    plan = leaf.plan
    begins, stops = plan.row_offsets[numbers], plan.row_offsets[numbers + 1]
    offsets = np.zeros(len(numbers) + 1, dtype=np.int64)
    np.cumsum(stops - begins, out=offsets[1:])
    # where each piece of these rows lies in the plan's list of pieces
    places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], stops - begins)
    positions = plan.pieces.num_tokens[plan.row_pieces[places]] - 1
    return row_costs(
        offsets,
        positions,
        sequence_length=leaf.config.sequence_length,
        piece_multiple=leaf.config.piece_multiple,
    )


def epochs_of(
    blend: Any, numbers: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of which dataset each row of a blend is, and in which of its epochs."""
    dataset = blend.dataset_index[numbers].astype(np.int64)
    rows_per_epoch = np.array([max(1, leaf.plan.stats.num_rows) for leaf in blend.datasets])
    return dataset, blend.dataset_sample_index[numbers] // rows_per_epoch[dataset]
