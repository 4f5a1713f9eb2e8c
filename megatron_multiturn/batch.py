"""One micro-batch of rows on every rank of a tensor parallel group: one copy, one broadcast.

The rows exist on tensor parallel rank 0 only. All of their tensors travel as one flat int32
buffer whose layout every rank knows beforehand, so no shape needs to be sent. With context
parallelism every rank reads whole rows and keeps its own positions of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_multiturn.errors import DatasetError


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one micro-batch, on the device (b rows of s tokens, see `samples`)."""

    tokens: Tensor  # (b, s) int64
    labels: Tensor  # (b, s) int64
    position_ids: Tensor  # (b, s) int64
    loss_mask: Tensor  # (b, s) float32
    loss_token_num: Tensor  # (b, s) float32
    turn_num: Tensor  # (b, 1) int64
    turn_index: Tensor  # (b, s) int32
    turn_token_num: Tensor  # (b, s) float32
    padding_mask: Tensor  # (b, s) bool
    cu_seqlens: Tensor  # (b, n) int32, of whole rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """What every rank must know of the rows before the first one arrives."""

    sequence_length: int
    num_boundaries: int  # n of `cu_seqlens`


# Everything fits 32 bits: token ids, positions, and a row's turns (or their fixed point).
_WIRE_DTYPES = {
    "tokens": torch.int32,
    "labels": torch.int32,
    "position_ids": torch.int32,
    "loss_mask": torch.float32,
    "loss_token_num": torch.float32,
    "turn_num": torch.int32,
    "turn_index": torch.int32,
    "turn_token_num": torch.float32,
    "padding_mask": torch.int32,
    "cu_seqlens": torch.int32,
}
_BATCH_DTYPES = dict.fromkeys(("tokens", "labels", "position_ids", "turn_num"), torch.int64)
_BATCH_DTYPES["padding_mask"] = torch.bool
_MAX_TURN_NUM = 2**31 - 1


def batch_shapes(row_shape: RowShape, micro_batch_size: int) -> dict[str, tuple[int, int]]:
    """The shape of each tensor of a `Batch`, in the order in which they lie in the buffer."""
    widths = dict.fromkeys(_WIRE_DTYPES, row_shape.sequence_length)
    widths["turn_num"] = 1
    widths["cu_seqlens"] = row_shape.num_boundaries
    return {name: (micro_batch_size, width) for name, width in widths.items()}


def flatten_rows(rows: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> Tensor:
    """The collated rows as one int32 buffer on the CPU; floats by their bits."""
    parts = []
    for name, shape in shapes.items():
        tensor = rows.get(name)
        found = None if tensor is None else tuple(tensor.shape)
        if tensor is None or found != shape:
            raise DatasetError(
                f"the dataset's {name!r} has shape {found} where this job expects {shape} "
                "(micro-batch size, width); its rows do not keep the sample contract"
            )
        if name == "turn_num" and int(tensor.sum()) > _MAX_TURN_NUM:
            raise DatasetError(
                f"the dataset's 'turn_num' adds up to {int(tensor.sum()):,} in a micro-batch, and "
                f"Megatron's divisor holds {_MAX_TURN_NUM:,} in a global batch; count in a "
                "coarser unit"
            )
        parts.append(tensor.to(_WIRE_DTYPES[name]).view(torch.int32).flatten())
    return torch.cat(parts)


def unflatten_rows(buffer: Tensor, shapes: Mapping[str, tuple[int, int]]) -> Batch:
    """The inverse of `flatten_rows`, on the buffer's device."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    tensors = {}
    for (name, shape), part in zip(shapes.items(), buffer.split(sizes), strict=True):
        wire = part.view(_WIRE_DTYPES[name]).view(shape)
        tensors[name] = wire.to(_BATCH_DTYPES.get(name, wire.dtype))
    return Batch(**tensors)


def broadcast_rows(
    rows: Mapping[str, Tensor] | None,
    row_shape: RowShape,
    micro_batch_size: int,
    *,
    tp_group: Any,
    tp_source_rank: int,
    device: Any,
) -> Batch:
    """A micro-batch as it came from the data loader, now on all ranks of `tp_group`.

    rows: on the source rank only; None elsewhere.
    tp_source_rank: the global rank of the group's rank 0.
    """
    shapes = batch_shapes(row_shape, micro_batch_size)
    if torch.distributed.get_rank() == tp_source_rank:
        assert rows is not None
        buffer = flatten_rows(rows, shapes).pin_memory().to(device, non_blocking=True)
    else:
        size = sum(math.prod(shape) for shape in shapes.values())
        buffer = torch.empty(size, dtype=torch.int32, device=device)
    if tp_group.size() > 1:
        torch.distributed.broadcast(buffer, tp_source_rank, group=tp_group)
    return unflatten_rows(buffer, shapes)


def keep_positions_of_rank(batch: Batch, *, cp_rank: int, cp_size: int) -> Batch:
    """What one context parallel rank computes of whole rows.

    A row is cut into 2 * cp_size chunks, of which rank r keeps chunks r and 2 * cp_size - 1 - r
    one after the other; Megatron cuts its rotary embedding alike. (b, s) becomes
    (b, s / cp_size). Rank 0 alone counts the rows' turns: what `turn_num` counts belongs to
    whole rows, while the losses of a turn add up over the ranks.
    """
    if cp_size == 1:
        return batch
    sliced: dict[str, Tensor] = {}
    for name in _WIRE_DTYPES.keys() - {"turn_num", "cu_seqlens"}:
        # (b, s) -> (b, 2 * cp_size, chunk)
        chunks = getattr(batch, name).unflatten(1, (2 * cp_size, -1))
        sliced[name] = torch.cat([chunks[:, cp_rank], chunks[:, 2 * cp_size - 1 - cp_rank]], dim=1)
    return replace(batch, turn_num=batch.turn_num * (cp_rank == 0), **sliced)
