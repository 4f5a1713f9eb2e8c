"""Which rows form a global batch, and in which order, so that no rank waits for another.

Best-fit-decreasing makes rows of very unlike attention cost (the sum of their pieces' lengths
squared): one long session against hundreds of short ones. So rows are taken in order of cost and
cut into groups of like cost. A batch gets one group of every stratum of the groups, and the
batches with the heavier groups of one stratum get the lighter ones of the next:

    cost      9 9 8 8 | 7 6 6 5 | 3 3 2 2 | 2 1 1 1        16 rows in groups of 2, 4 strata
    batch 0   9 9       6 5       3 3       1 1            both cost 37 - 38, and ranks that read
    batch 1   8 8       7 6       2 2       2 1            one row of a group each wait little

The larger the groups, the more ranks are even; and the more batches differ in cost. Groups are as
large as they can be while batches differ little more than those of shuffled rows.

Nothing here knows of ranks: the rows of a batch are the same on every layout.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.batches import Stretch

# How much more the cost of batches may vary than that of batches of shuffled rows.
_MAX_VARIATION = 1.4

# A variation of fewer batches than this says nothing; then a batch has so many groups.
_MIN_BATCHES, _NUM_GROUPS = 8, 8

# Groups that come next to each other in the order of cost change places at random, so that a batch
# is not put together alike in every epoch.
_SHUFFLED_NEIGHBOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Imbalance:
    """The cost of the rank that has most to do, by the mean over ranks; 1 is perfect."""

    mean: float  # of a batch, over batches
    worst: float  # of a batch
    micro_steps: float  # of the ranks that are slowest in a micro-step, added up over the batch
    variation: float  # standard deviation of the batches' costs by their mean

    def __str__(self) -> str:
        return f"{self.mean:.3f} (at worst {self.worst:.3f}; {self.micro_steps:.3f} in micro-steps)"


def row_costs(
    row_offsets: NDArray[np.int64],  # (num_rows + 1,): where each row begins in the next
    piece_positions: NDArray[np.integer],  # (num_row_pieces,): of the pieces of all rows
    *,
    sequence_length: int,
    piece_multiple: int = 1,
) -> NDArray[np.float64]:
    """Attention cost of each row, the sum of the squares of its pieces' lengths; (num_rows,).

    A piece is as long as what it is rounded up to, and the padding at the end of a row is a piece
    too. What else a row costs is the same for all, for all are padded to one length.
    """
    if len(row_offsets) < 2:
        return np.zeros(0)
    lengths = (-(-piece_positions // piece_multiple) * piece_multiple).astype(np.float64)
    begins = row_offsets[:-1] - row_offsets[0]
    padding = sequence_length - np.add.reduceat(lengths, begins)
    costs: NDArray[np.float64] = np.add.reduceat(lengths * lengths, begins) + padding * padding
    return costs


def choose_group_size(costs: NDArray[np.float64], batch_size: int) -> int:
    """Rows of like cost in a group: a divisor of `batch_size`, as large as variation allows."""
    divisors = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    num_batches = len(costs) // batch_size
    if num_batches < _MIN_BATCHES:
        return next(size for size in divisors if size * _NUM_GROUPS <= batch_size or size == 1)
    falling = np.sort(costs)[::-1][: num_batches * batch_size]
    shuffled = costs.std() * math.sqrt(batch_size)
    for size in divisors:
        group_costs = falling.reshape(batch_size // size, num_batches, size).sum(axis=2)
        batch_costs = np.zeros(num_batches)
        for groups in _match_strata(group_costs, np.random.default_rng(0)).T:
            batch_costs += group_costs.ravel()[groups]
        if batch_costs.std() <= _MAX_VARIATION * shuffled:
            return size
    return 1


def balanced_order(
    costs: NDArray[np.float64],  # (num_rows,)
    stretches: Sequence[Stretch],
    *,
    group_sizes: Mapping[int, int],  # by batch size
    seed: Sequence[int],
) -> NDArray[np.int64]:
    """Which row comes when, for the rows of the stretches; (num_rows,), a permutation.

    A batch of which the rows hold only a part gets like groups as the whole ones, at places in
    the order of cost that depend on the seed and the batch alone: who orders its other part takes
    the rest of the same groups.
    """
    by_cost = np.argsort(-costs, kind="stable")
    rng = np.random.default_rng([*seed, len(stretches)])
    quantiles, sizes = zip(
        *(_groups(stretch, group_sizes[stretch.batch_size], seed[0]) for stretch in stretches),
        strict=True,
    )
    in_order = np.argsort(np.concatenate(quantiles), kind="stable")
    size_of_group = np.concatenate(sizes)
    stops = np.cumsum(size_of_group[in_order])
    first_of_group = np.empty_like(size_of_group)
    first_of_group[in_order] = stops - size_of_group[in_order]
    order: list[NDArray[np.int64]] = []
    group = 0
    for stretch, group_lengths in zip(stretches, sizes, strict=True):
        begins = first_of_group[group : group + len(group_lengths)]
        group += len(group_lengths)
        if stretch.is_whole:
            rows = by_cost[begins[:, None] + np.arange(group_lengths[0])]
            order.append(_whole_batches(costs, rows, stretch.batch_size, rng).ravel())
        else:
            order += [
                by_cost[begin : begin + length]
                for begin, length in zip(begins.tolist(), group_lengths.tolist(), strict=True)
            ]
    return np.concatenate(order)


def keep_epochs(
    order: NDArray[np.int64],  # (num_rows,): which row comes when
    costs: NDArray[np.float64],  # (num_rows,)
    epochs: NDArray[np.int64],  # (num_rows,): rows of one dataset in one epoch have one number
    datasets: NDArray[np.int64],  # (num_rows,)
) -> NDArray[np.int64]:
    """`order`, with the rows of each dataset's earlier epochs before those of its later ones.

    A dataset keeps its places in the order, and each place its cost as nearly as can be.
    """
    order = order.copy()
    for dataset in np.unique(datasets):
        places = np.flatnonzero(datasets[order] == dataset)
        rows = order[places]
        numbers, counts = np.unique(epochs[rows], return_counts=True)
        if len(numbers) == 1:
            continue
        place_costs = costs[rows]
        stops = np.cumsum(counts)
        for number, begin, stop in zip(numbers, stops - counts, stops, strict=True):
            of_epoch = rows[epochs[rows] == number]
            falling = begin + np.argsort(-place_costs[begin:stop], kind="stable")
            order[places[falling]] = of_epoch[np.argsort(-costs[of_epoch], kind="stable")]
    return order


def row_in_batch(place: int, *, batch_size: int, group_size: int, micro_batch_size: int) -> int:
    """Which row of the batch's order lies at `place`, when ranks read several rows at once.

    Rank r of Megatron's sampler reads rows r * m to (r + 1) * m of a micro-step's, m being the
    micro-batch size. So m groups are interleaved, such that each rank's rows are one of each:
    groups aaaa bbbb become ab ab ab ab for m = 2. The rows of a batch stay the same.
    """
    num_groups = batch_size // group_size
    together = math.gcd(num_groups, micro_batch_size)
    run = micro_batch_size // together
    if group_size % run:
        return place  # a micro-batch size that does not divide the batch size; Megatron refuses it
    place, within_run = divmod(place, run)
    place, which = divmod(place, together)
    bundle, run_of_group = divmod(place, group_size // run)
    group = which * (num_groups // together) + bundle
    return group * group_size + run_of_group * run + within_run


def measure_imbalance(
    costs: NDArray[np.float64],  # (num_batches, batch_size), in the order that is read
    *,
    data_parallel_size: int,
    micro_batch_size: int = 1,
) -> Imbalance:
    """How unevenly ranks work that read the batches by Megatron's sampler."""
    num_batches, batch_size = costs.shape
    num_steps = batch_size // (data_parallel_size * micro_batch_size)
    # the cost of what each rank reads in each micro-step: (num_batches, num_steps, ranks)
    micro = costs.reshape(num_batches, num_steps, data_parallel_size, micro_batch_size).sum(axis=3)
    ranks = micro.sum(axis=1)
    means = np.maximum(ranks.mean(axis=1), np.finfo(np.float64).tiny)
    ratios = ranks.max(axis=1) / means
    waiting = micro.max(axis=2).sum(axis=1) / means
    totals = ranks.sum(axis=1)
    return Imbalance(
        mean=float(ratios.mean()),
        worst=float(ratios.max()),
        micro_steps=float(waiting.mean()),
        variation=float(totals.std() / max(totals.mean(), np.finfo(np.float64).tiny)),
    )


def _groups(
    stretch: Stretch, group_size: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Where in the order of cost the groups of a stretch are taken, from 0 to 1, and their sizes.

    Those of whole batches are spread evenly; those of a part of a batch are in the batch's order.
    """
    if stretch.is_whole:
        num_groups = stretch.num_rows // group_size
        return (np.arange(num_groups) + 0.5) / num_groups, np.full(num_groups, group_size)
    num_groups = stretch.batch_size // group_size
    rng = np.random.default_rng([seed, stretch.begin - stretch.offset])
    strata = _order_of_groups(np.arange(num_groups, 0.0, -1)[None])[0]
    quantiles = (strata + rng.random(num_groups)) / num_groups
    begins = np.arange(num_groups) * group_size
    first, stop = stretch.offset, stretch.offset + stretch.num_rows
    sizes = np.clip(begins + group_size, first, stop) - np.clip(begins, first, stop)
    return quantiles[sizes > 0], sizes[sizes > 0]


def _whole_batches(
    costs: NDArray[np.float64],
    rows: NDArray[np.int64],  # (num_batches * groups of a batch, group_size), of falling cost
    batch_size: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """The rows of each batch in order; (num_batches, batch_size)."""
    group_size = rows.shape[1]
    num_groups = batch_size // group_size
    num_batches = len(rows) // num_groups
    group_costs = costs[rows].sum(axis=1).reshape(num_groups, num_batches)
    groups = _match_strata(group_costs, rng)
    in_order = _order_of_groups(group_costs.ravel()[groups])
    groups = np.take_along_axis(groups, in_order, axis=1)
    seated = np.empty((num_batches, num_groups, group_size), dtype=np.int64)
    rank_costs = np.zeros((num_batches, group_size))
    for place in range(num_groups):
        # The heaviest row to the rank that has least to do so far.
        heaviest_first = rows[groups[:, place]]
        lightest_first = np.argsort(rank_costs, axis=1, kind="stable")
        np.put_along_axis(seated[:, place], lightest_first, heaviest_first, axis=1)
        rank_costs += costs[seated[:, place]]
    return seated.reshape(num_batches, batch_size)


def _match_strata(
    group_costs: NDArray[np.float64],  # (strata, num_batches)
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Which group of every stratum each batch gets; (num_batches, strata), flat indices.

    Drawn for the heaviest stratum; then the heavier a batch is, the lighter its next group.
    """
    num_strata, num_batches = group_costs.shape
    drawn = np.empty((num_batches, num_strata), dtype=np.int64)
    batch_costs = np.zeros(num_batches)
    for stratum, costs in enumerate(group_costs):
        groups = rng.permutation(num_batches)
        if stratum:
            jitter = rng.random(num_batches) * _SHUFFLED_NEIGHBOURS
            lightest_first = np.argsort(costs, kind="stable")
            lightest_first = lightest_first[np.argsort(np.arange(num_batches) + jitter)]
            groups[np.argsort(-batch_costs, kind="stable")] = lightest_first
        drawn[:, stratum] = stratum * num_batches + groups
        batch_costs += costs[groups]
    return drawn


def _order_of_groups(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """In which order the groups of a batch come; (num_batches, num_groups) as `costs`.

    Neighbours are of like cost, for ranks that read rows of both at once. Every second group
    costs as much as the others between them, and where possible every fourth, for as many more
    ranks as there are rows in a group.
    """
    num_batches, num_groups = costs.shape
    columns = math.gcd(num_groups, 4)
    falling = np.argsort(-costs, axis=1, kind="stable")
    order = np.empty((num_batches, num_groups // columns, columns), dtype=np.int64)
    column_costs = np.zeros((num_batches, columns))
    for turn in range(num_groups // columns):
        heaviest_first = falling[:, turn * columns : (turn + 1) * columns]
        lightest_first = np.argsort(column_costs, axis=1, kind="stable")
        np.put_along_axis(order[:, turn], lightest_first, heaviest_first, axis=1)
        column_costs += np.take_along_axis(costs, order[:, turn], axis=1)
    by_cost = np.argsort(-column_costs, axis=1, kind="stable")
    if columns == 4:
        by_cost = by_cost[:, [0, 1, 3, 2]]  # first and third, second and fourth: alike
    taken = np.take_along_axis(order, by_cost[:, None, :].repeat(order.shape[1], axis=1), axis=2)
    return taken.reshape(num_batches, num_groups)
