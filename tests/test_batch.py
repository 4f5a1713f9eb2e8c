"""The wire format of a micro-batch: what goes in comes out, in shape, type and value."""

import pytest
import torch

from megatron_multiturn.batch import (
    RowShape,
    batch_shapes,
    flatten_rows,
    unflatten_rows,
)

SHAPE = RowShape(sequence_length=7, num_boundaries=4)


def rows(micro_batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    collated: dict[str, torch.Tensor] = {}
    for name, shape in batch_shapes(SHAPE, micro_batch_size).items():
        if name in ("loss_mask", "loss_token_num"):
            collated[name] = torch.rand(shape, generator=generator)
        else:
            collated[name] = torch.randint(0, 2**31 - 1, shape, generator=generator)
    collated["cu_seqlens"] = collated["cu_seqlens"].int()
    return collated


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_round_trip(micro_batch_size: int) -> None:
    sent = rows(micro_batch_size)
    shapes = batch_shapes(SHAPE, micro_batch_size)
    buffer = flatten_rows(sent, shapes)
    assert buffer.dtype == torch.int32
    batch = unflatten_rows(buffer, shapes)
    for name, tensor in sent.items():
        received = getattr(batch, name)
        assert received.dtype == tensor.dtype
        assert torch.equal(received, tensor)


def test_other_keys_of_a_row_are_left_behind() -> None:
    shapes = batch_shapes(SHAPE, 2)
    extended = {**rows(), "dataset_id": torch.tensor([0, 1])}
    assert torch.equal(flatten_rows(extended, shapes), flatten_rows(rows(), shapes))


def test_rows_of_another_shape_are_refused() -> None:
    wrong = {**rows(), "cu_seqlens": torch.zeros(2, 5, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"'cu_seqlens' has shape \(2, 5\).*expects \(2, 4\)"):
        flatten_rows(wrong, batch_shapes(SHAPE, 2))
