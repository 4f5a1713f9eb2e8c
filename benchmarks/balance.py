"""How evenly data parallel ranks work, beside other orders of the same rows.

    python benchmarks/balance.py
    python benchmarks/balance.py --sessions 10000000 --seq-length 4096 --global-batch-size 512

Rows are packed by best fit, for as many epochs as make 100 batches at least. The orders:

    shuffled    the rows as they come
    reordered   the same batches, the heaviest row of each to the rank that has least to do
    like cost   groups of rows of like cost, one row for each of 8 ranks, shuffled
    ours        `balance`

All figures are of the attention cost, the sum of the squares of pieces' lengths: the rank that has
most to do in a batch, by the mean over ranks, on average and at worst; the same for the ranks that
are slowest in each micro-step; and how much batches differ, by how much shuffled ones do.
"""

import argparse
import platform
import time

import numpy as np
from measuring import processor
from numpy.typing import NDArray

from megatron_multiturn.balance import (
    balanced_order,
    choose_group_size,
    measure_imbalance,
    row_costs,
    row_in_batch,
)
from megatron_multiturn.batches import BatchSchedule
from megatron_multiturn.packing import PackPlan, PieceTable, pack

_MIN_BATCHES = 100
_RANKS = 8

type Costs = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--seq-length", type=int, default=32_768)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--median", type=float, default=700.0, help="tokens a session")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{processor()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print(
        f"{args.sessions:,} sessions in rows of {args.seq_length:,}, batches of "
        f"{args.global_batch_size:,}"
    )
    for sigma, near_row in ((1.0, 0.0), (1.5, 0.0), (1.0, 0.05)):
        mix = f", {near_row:.0%} of sessions nearly as long as a row" if near_row else ""
        print(f"\nlog-normal around {args.median:.0f} tokens, sigma {sigma}{mix}")
        plan = _plan(args, sigma, near_row)
        _report(plan, args.seq_length, args.global_batch_size, args.seed)


def _plan(args: argparse.Namespace, sigma: float, near_row: float) -> PackPlan:
    rng = np.random.default_rng(args.seed + 1)
    longest = args.seq_length
    lengths = rng.lognormal(np.log(args.median), sigma, args.sessions).clip(2, longest)
    is_near = rng.random(args.sessions) < near_row
    lengths[is_near] = rng.integers(int(0.9 * longest), longest + 1, int(is_near.sum()))
    pieces = PieceTable(
        session=np.arange(args.sessions, dtype=np.int32),
        num_tokens=lengths.astype(np.int32) + 1,
        cut_spans=np.zeros((0, 4), dtype=np.int32),
    )
    at_least = (_MIN_BATCHES + 1) * args.global_batch_size
    return pack(pieces, sequence_length=longest, seed=args.seed, at_least_rows=at_least)


def _report(plan: PackPlan, longest: int, size: int, seed: int) -> None:
    num_rows = plan.stats.num_rows
    positions = plan.pieces.num_positions()[plan.row_pieces]
    costs = row_costs(plan.row_offsets, positions, sequence_length=longest)
    whole = len(costs) // size * size
    shuffled = costs[:whole].reshape(-1, size)
    started = time.perf_counter()
    group_sizes = {size: choose_group_size(costs[:num_rows], size)}
    schedule = BatchSchedule(((0, size),))
    orders = []
    for epoch, begin in enumerate(range(0, len(costs), num_rows)):
        window = schedule.stretches(begin, begin + num_rows)
        epoch_costs = costs[begin : begin + num_rows]
        orders.append(
            begin + balanced_order(epoch_costs, window, group_sizes=group_sizes, seed=[seed, epoch])
        )
    seconds = time.perf_counter() - started
    order = np.concatenate(orders)
    ours = costs[order[:whole]].reshape(-1, size)
    print(
        f"{len(ours):,} batches over {len(orders)} epochs of {num_rows:,} rows "
        f"({plan.stats.fill:.2%} full); ours: groups of {group_sizes[size]}, put in order in "
        f"{1e3 * seconds / len(ours):.4f} ms a batch"
    )
    print(f"{f'{_RANKS} ranks':<12}{'mean':>9}{'worst':>9}{'micro-steps':>13}{'variation':>11}")
    plain = measure_imbalance(shuffled, data_parallel_size=_RANKS).variation
    for name, batches in (
        ("shuffled", shuffled),
        ("reordered", _reordered(shuffled)),
        ("like cost", _like_cost(costs, size, seed)),
        ("ours", ours),
    ):
        found = measure_imbalance(batches, data_parallel_size=_RANKS)
        print(
            f"{name:<12}{found.mean:>9.4f}{found.worst:>9.4f}{found.micro_steps:>13.4f}"
            f"{found.variation / plain:>10.2f}x"
        )
    _report_layouts(ours, shuffled, group_sizes[size])


def _report_layouts(ours: Costs, shuffled: Costs, group_size: int) -> None:
    """Other layouts, from the very same batches."""
    size = ours.shape[1]
    heaviest = ours.max(axis=1) / ours.sum(axis=1)
    print(
        f"{'ours on':<12}{'mean':>9}{'worst':>9}{'micro-steps':>13}{'shuffled':>11}"
        f"{'no order of these batches is below':>37}"
    )
    for micro_batch_size in (1, 2, 4):
        places = [
            row_in_batch(
                place, batch_size=size, group_size=group_size, micro_batch_size=micro_batch_size
            )
            for place in range(size)
        ]
        for ranks in (2, 4, 8, 16, 32):
            if size % (ranks * micro_batch_size):
                continue
            found, before = (
                measure_imbalance(
                    batches, data_parallel_size=ranks, micro_batch_size=micro_batch_size
                )
                for batches in (ours[:, places], shuffled)
            )
            bound = np.maximum(1, heaviest * ranks).mean()
            print(
                f"{f'DP {ranks} mb {micro_batch_size}':<12}{found.mean:>9.4f}{found.worst:>9.4f}"
                f"{found.micro_steps:>13.4f}{before.mean:>11.4f}{bound:>37.4f}"
            )


def _reordered(batches: Costs) -> Costs:
    """Each batch's rows, dealt from the heaviest on to the rank that has least to do."""
    dealt = np.empty_like(batches)
    sums = np.zeros((len(batches), _RANKS))
    falling = -np.sort(-batches, axis=1)
    for begin in range(0, batches.shape[1], _RANKS):
        lightest_first = np.argsort(sums, axis=1, kind="stable")
        step = np.empty_like(sums)
        np.put_along_axis(step, lightest_first, falling[:, begin : begin + _RANKS], axis=1)
        sums += step
        dealt[:, begin : begin + _RANKS] = step
    return dealt


def _like_cost(costs: Costs, size: int, seed: int) -> Costs:
    """Neighbours in the order of cost, `_RANKS` in a group, the groups shuffled."""
    groups = np.sort(costs)[: len(costs) // size * size].reshape(-1, _RANKS)
    shuffled: Costs = np.random.default_rng(seed).permutation(groups).reshape(-1, size)
    return shuffled


if __name__ == "__main__":
    main()
