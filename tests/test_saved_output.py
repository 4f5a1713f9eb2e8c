"""attend_and_reorder: the gradients of plain autograd, with one copy of the output kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_multiturn.saved_output import attend_and_reorder

LENGTH, HEADS, HEAD_SIZE = 5, 2, 3


class Kernel(torch.autograd.Function):
    """Keeps its inputs and its output, as kernels of attention do; softmax(q * k) * v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, flat: bool) -> Tensor:
        weights = (q * k).softmax(-1)
        out = weights * v
        # The copy is like the output in all but its values.
        ctx.save_for_backward(q, k, v.clone(), out)
        return out.flatten(1) if flat else out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        assert out.is_contiguous()
        assert torch.equal(out, (q * k).softmax(-1) * v)
        gradient = upstream[0].view_as(out)
        weights = out / v
        inner = weights * (gradient * v - (gradient * out).sum(-1, keepdim=True))
        return inner * k, inner * q, gradient * weights, None


def flat_inputs(num_rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows * LENGTH, HEADS, HEAD_SIZE)
    return [(torch.rand(shape, generator=generator) + 0.5).requires_grad_() for _ in range(3)]


def plainly(attend: Callable[[], Tensor], num_rows: int) -> Tensor:
    return attend().view(num_rows, LENGTH, HEADS, HEAD_SIZE).transpose(0, 1).contiguous()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_output_and_gradients_are_those_of_autograd(num_rows: int, flat: bool) -> None:
    ours, theirs = flat_inputs(num_rows), flat_inputs(num_rows)
    out = attend_and_reorder(lambda: Kernel.apply(*ours, flat), num_rows, HEAD_SIZE)
    wanted = plainly(lambda: Kernel.apply(*theirs, flat), num_rows)
    assert out.shape == (LENGTH, num_rows, HEADS, HEAD_SIZE)
    assert out.is_contiguous()
    assert torch.equal(out, wanted)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    wanted.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)


def storages_kept(output: Tensor) -> set[int]:
    """The storages that the graph of an output keeps, by address; read from its nodes."""
    found, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        for tensor in getattr(node, "saved_tensors", ()):
            found.add(tensor.untyped_storage().data_ptr())
        nodes += [parent for parent, _ in node.next_functions]
    return found


def test_the_output_of_several_rows_is_kept_in_the_order_of_the_layer_alone() -> None:
    made: list[Tensor] = []

    def attend() -> Tensor:
        made.append(Kernel.apply(*inputs, False))
        return made[-1]

    inputs = flat_inputs(2)
    kept = storages_kept(plainly(attend, 2))
    assert made[-1].untyped_storage().data_ptr() in kept
    out = attend_and_reorder(attend, 2, HEAD_SIZE)
    assert made[-1].untyped_storage().data_ptr() not in storages_kept(out)


def test_it_works_under_recomputation() -> None:
    inputs, plain = flat_inputs(2), flat_inputs(2)

    def layer(*given: Tensor) -> Tensor:
        return attend_and_reorder(lambda: Kernel.apply(*given, False), 2, HEAD_SIZE)

    for reentrant in (True, False):
        out = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=reentrant)
        out.square().sum().backward()
        wanted = plainly(lambda: Kernel.apply(*plain, False), 2)
        wanted.square().sum().backward()
        for mine, other in zip(inputs, plain, strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert torch.equal(mine.grad, other.grad)
            mine.grad = other.grad = None
