"""One micro-batch of rows on every rank of a tensor parallel group: one copy, one broadcast.

The rows exist on tensor parallel rank 0 only. All of their tensors travel as one flat int32
buffer whose layout every rank knows beforehand, so no shape needs to be sent. The boundaries of
pieces travel from host to host: they decide the size of attention's launches, and nobody must wait
for the device to know them. With context parallelism every rank reads whole rows and keeps its
own positions of them.
"""

import math
from collections.abc import Mapping, Sequence
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
    boundaries: Tensor  # (n + 1,) int32 on the CPU: of n pieces, in whole rows laid end to end


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """What every rank must know of the rows before the first one arrives."""

    sequence_length: int
    num_boundaries: int  # n of `cu_seqlens` in a row


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
}
_BATCH_DTYPES = dict.fromkeys(("tokens", "labels", "position_ids", "turn_num"), torch.int64)
_BATCH_DTYPES["padding_mask"] = torch.bool
_MAX_TURN_NUM = 2**31 - 1


def batch_shapes(row_shape: RowShape, micro_batch_size: int) -> dict[str, tuple[int, int]]:
    """The shape of each tensor of a `Batch`, in the order in which they lie in the buffer."""
    widths = dict.fromkeys(_WIRE_DTYPES, row_shape.sequence_length)
    widths["turn_num"] = 1
    return {name: (micro_batch_size, width) for name, width in widths.items()}


def flatten_rows(rows: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> Tensor:
    """The collated rows as one int32 buffer on the CPU; floats by their bits."""
    parts = []
    for name, shape in shapes.items():
        tensor = _checked(rows, name, shape)
        if name == "turn_num" and int(tensor.sum()) > _MAX_TURN_NUM:
            raise DatasetError(
                f"the dataset's 'turn_num' adds up to {int(tensor.sum()):,} in a micro-batch, and "
                f"Megatron's divisor holds {_MAX_TURN_NUM:,} in a global batch; count in a "
                "coarser unit"
            )
        parts.append(tensor.to(_WIRE_DTYPES[name]).view(torch.int32).flatten())
    return torch.cat(parts)


def join_boundaries(rows: Mapping[str, Tensor], row_shape: RowShape) -> Tensor:
    """The collated rows' `cu_seqlens` (b, n) as those of the rows laid end to end.

    int32 (b * (n - 1) + 1,), from 0 to b * s; the end of a row is repeated as its padding was.
    Raises DatasetError where a row's do not rise from 0 to s.
    """
    num_rows, length = len(rows["tokens"]), row_shape.sequence_length
    bounds = _checked(rows, "cu_seqlens", (num_rows, row_shape.num_boundaries))
    wrong = (bounds[:, 0] != 0) | (bounds[:, -1] != length) | (bounds.diff() < 0).any(dim=1)
    if wrong.any():
        row = bounds[wrong][0].tolist()
        raise DatasetError(
            f"a row's 'cu_seqlens' is {row}; it must rise from 0 to --seq-length {length}, which "
            "is repeated to the end"
        )
    row_starts = torch.arange(num_rows, dtype=torch.int32).unsqueeze(1) * length
    return torch.cat([bounds.new_zeros(1), (bounds[:, 1:] + row_starts).flatten()]).int()


def _checked(rows: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    tensor = rows.get(name)
    found = None if tensor is None else tuple(tensor.shape)
    if tensor is None or found != shape:
        raise DatasetError(
            f"the dataset's {name!r} has shape {found} where this job expects {shape} "
            "(micro-batch size, width); its rows do not keep the sample contract"
        )
    return tensor


def unflatten_rows(
    buffer: Tensor, shapes: Mapping[str, tuple[int, int]], boundaries: Tensor
) -> Batch:
    """The inverse of `flatten_rows`, on the buffer's device; `boundaries` as in `Batch`."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    tensors = {}
    for (name, shape), part in zip(shapes.items(), buffer.split(sizes), strict=True):
        wire = part.view(_WIRE_DTYPES[name]).view(shape)
        tensors[name] = wire.to(_BATCH_DTYPES.get(name, wire.dtype))
    return Batch(**tensors, boundaries=boundaries)


def to_device(tensor: Tensor, device: Any) -> Tensor:
    """A copy on `device`, which the host does not wait for."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def broadcast_rows(
    rows: Mapping[str, Tensor] | None,
    row_shape: RowShape,
    micro_batch_size: int,
    *,
    tp_group: Any,
    host_group: Any,
    tp_source_rank: int,
    device: Any,
) -> Batch:
    """A micro-batch as it came from the data loader, now on all ranks of `tp_group`.

    rows: on the source rank only; None elsewhere.
    host_group: of the same ranks, for tensors on the CPU; unused if there is but one.
    tp_source_rank: the global rank of the group's rank 0.
    """
    shapes = batch_shapes(row_shape, micro_batch_size)
    if torch.distributed.get_rank() == tp_source_rank:
        assert rows is not None
        buffer = to_device(flatten_rows(rows, shapes), device)
        boundaries = join_boundaries(rows, row_shape)
    else:
        size = sum(math.prod(shape) for shape in shapes.values())
        buffer = torch.empty(size, dtype=torch.int32, device=device)
        size = micro_batch_size * (row_shape.num_boundaries - 1) + 1
        boundaries = torch.empty(size, dtype=torch.int32)
    if tp_group.size() > 1:
        torch.distributed.broadcast(buffer, tp_source_rank, group=tp_group)
        torch.distributed.broadcast(boundaries, tp_source_rank, group=host_group)
    return unflatten_rows(buffer, shapes, boundaries.unique_consecutive())


def keep_positions_of_rank(
    batch: Batch, *, cp_rank: int, cp_size: int, cuts_pieces: bool = False
) -> Batch:
    """What one context parallel rank computes of whole rows.

    A row is cut into 2 * cp_size chunks, of which rank r keeps chunks r and 2 * cp_size - 1 - r
    one after the other; Megatron cuts its rotary embedding alike. (b, s) becomes
    (b, s / cp_size). Rank 0 alone counts the rows' turns: what `turn_num` counts belongs to
    whole rows, while the losses of a turn add up over the ranks.

    cuts_pieces: cut every piece in this way, as Transformer Engine does, in place of every row; for
        a batch of one row.
    """
    if cp_size == 1:
        return batch
    bounds = [0, batch.tokens.shape[1]]
    if cuts_pieces:
        assert len(batch.tokens) == 1
        bounds = batch.boundaries.tolist()
    positions = to_device(
        positions_of_rank(bounds, cp_rank=cp_rank, cp_size=cp_size), batch.tokens.device
    )
    sliced: dict[str, Tensor] = {
        name: getattr(batch, name).index_select(1, positions)
        for name in _WIRE_DTYPES.keys() - {"turn_num"}
    }
    return replace(batch, turn_num=batch.turn_num * (cp_rank == 0), **sliced)


def positions_of_rank(bounds: Sequence[int], *, cp_rank: int, cp_size: int) -> Tensor:
    """int64, on the CPU: the positions that a rank keeps if what lies between bounds is cut.

    Every stretch must be a multiple of 2 * cp_size long. With bounds 0, 4, 12 and two ranks, rank 0
    keeps 0 3 4 5 10 11 and rank 1 keeps 1 2 6 7 8 9.
    """
    starts, lengths = torch.tensor(bounds[:-1]), torch.tensor(bounds).diff()
    uneven = lengths[lengths % (2 * cp_size) > 0]
    if len(uneven):
        raise DatasetError(
            f"a piece of {int(uneven[0])} positions cannot be shared by {cp_size} context parallel "
            f"ranks; pieces must be rounded up to multiples of {2 * cp_size}"
        )
    chunks = (lengths // (2 * cp_size)).repeat_interleave(2)
    first = torch.stack([starts, starts], dim=1).flatten()
    first += chunks * torch.tensor([cp_rank, 2 * cp_size - 1 - cp_rank]).repeat(len(lengths))
    before = chunks.cumsum(0) - chunks  # positions kept of earlier chunks
    return torch.arange(int(chunks.sum())) + (first - before).repeat_interleave(chunks)
