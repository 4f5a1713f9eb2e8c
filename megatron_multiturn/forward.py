"""The forward step that Megatron's schedules call: a batch, the model, and the loss."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.attention import packed_rows
from megatron_multiturn.batch import next_batch
from megatron_multiturn.loss import loss_func, loss_weights
from megatron_multiturn.provider import row_shape


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """One micro-batch through this rank's part of the model.

    Takes the place of `pretrain_gpt.forward_step`. Returns the model's output ((b, s) losses on
    the last pipeline stage) and the function that makes the loss of it.
    """
    args = megatron.get_args()
    timers = megatron.get_timers()
    timers("batch-generator", log_level=2).start()
    shape = row_shape()
    batch = next_batch(
        data_iterator,
        shape,
        args.micro_batch_size if model.training else args.eval_micro_batch_size,
        tp_group=megatron.tensor_parallel_group(),
        tp_source_rank=megatron.tensor_parallel_source_rank(),
        device=torch.cuda.current_device(),
    )
    boundaries = packed_rows(
        batch.cu_seqlens,
        sequence_length=shape.sequence_length,
        dtype=args.params_dtype,
    )
    timers("batch-generator").stop()
    output = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        loss_mask=loss_weights(batch.loss_mask, batch.loss_token_num),
        packed_seq_params=boundaries,
    )
    return output, functools.partial(
        checked_loss_func, batch.loss_mask, batch.loss_token_num, batch.turn_num
    )


def checked_loss_func(
    loss_mask: Tensor, loss_token_num: Tensor, turn_num: Tensor, output_tensor: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`loss_func`, with the checks for NaN and spikes that Megatron's flags ask for."""
    loss, divisor, report = loss_func(loss_mask, loss_token_num, turn_num, output_tensor)
    args = megatron.get_args()
    megatron.validate_loss(
        loss,
        check_finite=args.check_for_nan_in_loss_and_grad,
        check_spiky=args.check_for_spiky_loss,
    )
    return loss, divisor, report
