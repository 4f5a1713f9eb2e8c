"""The auxiliary losses of mixtures of experts, at the size that Megatron gives them.

A router adds the gradient of its load balancing and z losses during the backward pass. Megatron
means them to be averaged over the micro-batches of all ranks. With `calculate_per_token_loss`
every gradient is divided by the sum of the divisors, so Megatron multiplies each router's loss by
its number of tokens beforehand, which is right if the divisor counts all tokens. Here it counts
turns, or target tokens. The routers are told not to multiply, and the scale that Megatron asks
for before each backward pass is the divisor of the whole step over its number of micro-batches:

    gradient = sum over micro-batches of aux * (divisor / micro-batches) / divisor

The divisor must be known before the first backward pass, so the rows of a step are read ahead.

Padding is routed like any token, and left out of these losses.
"""

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_multiturn import megatron_compat as megatron

Rows = dict[str, Tensor]

_TINY = 1e-30  # for zero, by which the router would divide what it logs


class StepReader:
    """Reads the rows of a whole step before the first of them is used."""

    def __init__(self) -> None:
        self._rows: deque[Rows] = deque()
        self._remaining = 0

    @property
    def begins_step(self) -> bool:
        """Whether the next rows are the first of a step."""
        return self._remaining == 0

    def read_step(self, data_iterator: Iterator[Rows] | None, num_micro_batches: int) -> int:
        """Read a step's rows, where there is an iterator; returns the sum of their `turn_num`."""
        self._remaining = num_micro_batches
        if data_iterator is None:
            return 0
        self._rows.extend(next(data_iterator) for _ in range(num_micro_batches))
        return sum(int(rows["turn_num"].sum()) for rows in self._rows)

    def next_rows(self) -> Rows | None:
        """The next micro-batch of the step; None on a rank without an iterator."""
        self._remaining -= 1
        return self._rows.popleft() if self._rows else None


class AuxiliaryLossScale:
    """Keeps the scale of the routers' losses for this rank's part of the model."""

    def __init__(self) -> None:
        self._reader = StepReader()
        self._prepared: set[int] = set()
        self._scale: Tensor | None = None

    def prepare(self, model: Any) -> None:
        """Take over the scaling of the routers of `model`, a chunk of it on this rank."""
        if id(model) in self._prepared:
            return
        self._prepared.add(id(model))
        for router in megatron.routers(model):
            router.calculate_per_token_loss = False
            leave_out_padding(router)
        config = megatron.model_config(model)

        # In place of it Megatron would take `grad_scale_func`, the scale of fp16 losses, alone.
        def scale() -> Tensor:
            ones = torch.ones(1, device="cuda")
            scaled = config.grad_scale_func(ones) if config.grad_scale_func else ones
            return scaled if self._scale is None else scaled * self._scale

        megatron.scale_auxiliary_losses(config, scale)

    def next_rows(self, data_iterator: Iterator[Rows] | None) -> Rows | None:
        """The next micro-batch of this rank, None on a rank that reads no rows.

        At the first of a step it also sets the scale; collective over the ranks of a stage.
        """
        if self._reader.begins_step:
            num_micro_batches = megatron.num_micro_batches()
            local = self._reader.read_step(data_iterator, num_micro_batches)
            divisor = megatron.sum_over_readers(torch.tensor([local], device="cuda"))
            self._scale = divisor.float() / (num_micro_batches * megatron.data_parallel_size())
        return self._reader.next_rows()


def leave_out_padding(router: Any) -> None:
    """Put right, in place, what a router of Megatron's makes of a mask of padding.

    Its z-loss is a mean over the positions of this rank that are no padding, of which the ranks
    of a row, cut by sequence or context parallelism, have unlike numbers. The weight here makes
    the sum over them a mean over the whole row. Its count of tokens for the bias of experts takes
    the mask in a shape that fails.
    """
    stock_z_loss, stock_bias = router.apply_z_loss, router._apply_expert_bias

    def apply_z_loss(logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        config, ranks = router.config, router.tp_cp_group
        if padding_mask is None or config.moe_z_loss_coeff is None or ranks.size() == 1:
            return stock_z_loss(logits, padding_mask=padding_mask)
        own = (~padding_mask).sum().float()
        total = own.clone()
        torch.distributed.all_reduce(total, group=ranks)
        weight = (own * ranks.size() / total.clamp(min=1)).clamp(min=_TINY)
        router.config = copy.copy(config)
        router.config.moe_z_loss_coeff = config.moe_z_loss_coeff * weight
        try:
            return stock_z_loss(logits, padding_mask=padding_mask)
        finally:
            router.config = config

    def apply_expert_bias(routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        stock_bias(routing_map)

    router.apply_z_loss, router._apply_expert_bias = apply_z_loss, apply_expert_bias
