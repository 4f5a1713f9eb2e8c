"""Keeps attention's output for the backward pass in one order of its rows, not in two.

A kernel for packed pieces gives rows end to end, [b * s, h, d], and keeps that for its backward
pass. The layer goes on with [s, b, h, d], which the projection after attention keeps. With one row
the two are views of each other. With several, the second is a copy; from it the first can be made
anew when the backward pass asks for it, so that it need not be kept too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Saved:
    """What autograd keeps in the place of a tensor."""

    tensor: Tensor | None  # None: to be made of the layer's order
    shape: torch.Size


def attend_and_reorder(attend: Callable[[], Tensor], num_rows: int, head_size: int) -> Tensor:
    """[s, b, h, d], contiguous, of what `attend()` gives: [b * s, h, d] or [b * s, h * d]."""
    if num_rows == 1:
        # [s, h, d] -> [s, 1, h, d]
        out = attend()
        return out.view(len(out), 1, -1, head_size)
    saved: list[_Saved] = []
    in_order: Tensor | None = None

    def keep(tensor: Tensor) -> _Saved:
        saved.append(_Saved(tensor, tensor.shape))
        return saved[-1]

    def give_back(kept: _Saved) -> Tensor:
        if kept.tensor is not None:
            return kept.tensor
        assert in_order is not None
        # [s, b, h, d] -> [b * s, h, d]
        return in_order.transpose(0, 1).reshape(kept.shape)

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        out = attend()
    # [b * s, h, d] -> [s, b, h, d]
    result = out.view(num_rows, len(out) // num_rows, -1, head_size).transpose(0, 1).contiguous()
    in_order = result.detach()
    for kept in saved:
        assert kept.tensor is not None
        if kept.tensor.data_ptr() == out.data_ptr() and kept.tensor.numel() == out.numel():
            kept.tensor = None
    saved.clear()
    return result
