"""The wire format of a micro-batch: what goes in comes out, in shape, type and value."""

import math
import re
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from megatron_multiturn.batch import (
    Batch,
    RowShape,
    batch_shapes,
    flatten_rows,
    join_boundaries,
    keep_positions_of_rank,
    positions_of_rank,
    unflatten_rows,
)
from megatron_multiturn.errors import DatasetError

SHAPE = RowShape(sequence_length=7, num_boundaries=4)


def rows(micro_batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    collated: dict[str, torch.Tensor] = {}
    for name, shape in batch_shapes(SHAPE, micro_batch_size).items():
        if name in ("loss_mask", "loss_token_num", "turn_token_num"):
            collated[name] = torch.rand(shape, generator=generator)
        elif name == "padding_mask":
            collated[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            largest = 2**24 if name == "turn_num" else 2**31 - 1
            collated[name] = torch.randint(0, largest, shape, generator=generator)
    collated["turn_index"] = collated["turn_index"].int()
    bounds = torch.tensor([[0, 3, 7, 7], [0, 7, 7, 7], [0, 1, 2, 7]], dtype=torch.int32)
    collated["cu_seqlens"] = bounds.repeat(2, 1)[:micro_batch_size]
    return collated


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_round_trip(micro_batch_size: int) -> None:
    sent = rows(micro_batch_size)
    shapes = batch_shapes(SHAPE, micro_batch_size)
    buffer = flatten_rows(sent, shapes)
    assert buffer.dtype == torch.int32
    boundaries = join_boundaries(sent, SHAPE)
    batch = unflatten_rows(buffer, shapes, boundaries)
    assert batch.boundaries is boundaries
    for name in shapes:
        received = getattr(batch, name)
        assert received.dtype == sent[name].dtype
        assert torch.equal(received, sent[name])


def test_boundaries_count_over_the_rows_laid_end_to_end() -> None:
    joined = join_boundaries(rows(3), SHAPE)
    assert joined.dtype == torch.int32
    assert joined.tolist() == [0, 3, 7, 7, 14, 14, 14, 15, 16, 21]


def test_other_keys_of_a_row_are_left_behind() -> None:
    shapes = batch_shapes(SHAPE, 2)
    extended = {**rows(), "dataset_id": torch.tensor([0, 1])}
    assert torch.equal(flatten_rows(extended, shapes), flatten_rows(rows(), shapes))


def test_rows_of_another_shape_are_refused() -> None:
    wrong = {**rows(), "tokens": torch.zeros(2, 5, dtype=torch.int64)}
    with pytest.raises(DatasetError, match=r"'tokens' has shape \(2, 5\).*expects \(2, 7\)"):
        flatten_rows(wrong, batch_shapes(SHAPE, 2))
    wrong = {**rows(), "cu_seqlens": torch.zeros(2, 5, dtype=torch.int32)}
    with pytest.raises(DatasetError, match=r"'cu_seqlens' has shape \(2, 5\).*expects \(2, 4\)"):
        join_boundaries(wrong, SHAPE)
    del wrong["cu_seqlens"]
    with pytest.raises(DatasetError, match=r"'cu_seqlens' has shape None.*sample contract"):
        join_boundaries(wrong, SHAPE)


@pytest.mark.parametrize(
    "wrong",
    [
        [2, 4, 7, 7],  # does not begin at 0
        [0, 3, 5, 5],  # the padding at the end left out
        [0, 3, 7, 0],  # padded with something else
        [0, 3, 7, -1],
        [0, 5, 3, 7],  # falls
        [0, 3, 9, 9],  # ends in the next row
    ],
)
def test_boundaries_that_are_not_those_of_a_row_are_refused(wrong: list[int]) -> None:
    """They would merge pieces, or make one of two rows, without a word."""
    sent = rows(2)
    sent["cu_seqlens"] = torch.tensor([[0, 3, 3, 7], wrong], dtype=torch.int32)
    with pytest.raises(
        DatasetError, match=rf"{re.escape(str(wrong))}; it must rise from 0 to .* 7"
    ):
        join_boundaries(sent, SHAPE)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_ranks_share_the_positions_and_one_counts_the_turns(cp_size: int) -> None:
    length = 8 * cp_size
    batch = batch_of(length)
    parts = [keep_positions_of_rank(batch, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
    chunk = length // (2 * cp_size)
    for rank, part in enumerate(parts):
        first, last = rank * chunk, (2 * cp_size - 1 - rank) * chunk
        positions = [*range(first, first + chunk), *range(last, last + chunk)]
        for field in fields(batch):
            whole, mine = getattr(batch, field.name), getattr(part, field.name)
            if field.name == "turn_num":
                assert torch.equal(mine, whole if rank == 0 else torch.zeros_like(whole))
            elif field.name == "boundaries":
                assert torch.equal(mine, whole)
            else:
                assert torch.equal(mine, whole[:, positions])
    assert keep_positions_of_rank(batch, cp_rank=0, cp_size=1) is batch


@pytest.mark.parametrize("cp_size", [2, 3])
def test_context_parallel_ranks_can_share_every_piece(cp_size: int) -> None:
    multiple = 2 * cp_size
    bounds = [0, multiple, 4 * multiple, 6 * multiple]
    batch = replace(batch_of(bounds[-1], num_rows=1), boundaries=torch.tensor(bounds).int())
    kept = []
    for rank in range(cp_size):
        part = keep_positions_of_rank(batch, cp_rank=rank, cp_size=cp_size, cuts_pieces=True)
        positions: list[int] = []
        for start, stop in pairwise(bounds):
            chunk = (stop - start) // multiple
            for first in (start + rank * chunk, stop - (rank + 1) * chunk):
                positions += range(first, first + chunk)
        assert torch.equal(part.tokens, batch.tokens[:, positions])
        assert torch.equal(part.loss_token_num, batch.loss_token_num[:, positions])
        kept += positions
    assert sorted(kept) == list(range(bounds[-1]))


def test_the_cut_of_pieces_as_the_docstring_shows_it() -> None:
    cut = [positions_of_rank([0, 4, 12], cp_rank=r, cp_size=2).tolist() for r in range(2)]
    assert cut == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]
    with pytest.raises(
        DatasetError, match=r"a piece of 6 positions .* 2 context .* multiples of 4"
    ):
        positions_of_rank([0, 4, 10], cp_rank=0, cp_size=2)


def batch_of(length: int, num_rows: int = 2) -> Batch:
    shapes = batch_shapes(RowShape(sequence_length=length, num_boundaries=4), num_rows)
    sent: dict[str, torch.Tensor] = {
        name: torch.arange(1, 1 + math.prod(shape)).view(shape) for name, shape in shapes.items()
    }
    return unflatten_rows(flatten_rows(sent, shapes), shapes, torch.tensor([0, length]).int())


def test_counts_beyond_megatrons_divisor_are_refused() -> None:
    sent = rows()
    sent["turn_num"] = torch.tensor([[2**30], [2**30]])
    with pytest.raises(DatasetError, match=r"'turn_num' adds up to 2,147,483,648.*coarser unit"):
        flatten_rows(sent, batch_shapes(SHAPE, 2))
