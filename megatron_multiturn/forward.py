"""The forward step that Megatron's schedules call: a batch, the model, and the loss."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.attention import packed_rows
from megatron_multiturn.batch import Batch, broadcast_rows, keep_positions_of_rank
from megatron_multiturn.loss import loss_func, loss_weights, turn_report
from megatron_multiturn.moe import AuxiliaryLossScale
from megatron_multiturn.provider import row_shape, training_epoch

Rows = dict[str, Tensor]

_auxiliary_losses = AuxiliaryLossScale()


def forward_step(
    data_iterator: Iterator[Rows] | None, model: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """One micro-batch through this rank's part of the model.

    Takes the place of `pretrain_gpt.forward_step`. Returns the model's output ((b, s) losses on
    the last pipeline stage) and the function that makes the loss of it.
    """
    args = megatron.get_args()
    timers = megatron.get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _next_batch(data_iterator, model, args)
    boundaries = packed_rows(
        batch.boundaries,
        sequence_length=row_shape().sequence_length,
        device=batch.tokens.device,
        cuts_pieces=args.piece_multiple > 1,
    )
    timers("batch-generator").stop()
    output = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        loss_mask=loss_weights(batch.loss_mask, batch.loss_token_num),
        packed_seq_params=boundaries,
        padding_mask=_routing_padding(batch, model, args),
    )
    share = _share_of_global_batch(model, args, device=batch.loss_mask.device)
    epoch = training_epoch(megatron.rows_after_this_step(args)) if model.training else None
    return output, functools.partial(checked_loss_func, batch, share, epoch)


def checked_loss_func(
    batch: Batch, batch_share: Tensor, epoch: float | None, output_tensor: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`loss_func` and `turn_report`, with the checks that Megatron's flags ask for.

    epoch: how many epochs are trained after this step, to be shown in the log.
    """
    args = megatron.get_args()
    loss, divisor, report = loss_func(
        batch.loss_mask, batch.loss_token_num, batch.turn_num, output_tensor
    )
    report |= turn_report(
        output_tensor,
        batch.turn_index,
        batch.turn_token_num,
        batch_share=batch_share,
        num_turn_indices=args.log_turn_index,
    )
    if epoch is not None:
        report["epoch"] = torch.stack([epoch * batch_share, batch_share])
    megatron.validate_loss(
        loss,
        check_finite=args.check_for_nan_in_loss_and_grad,
        check_spiky=args.check_for_spiky_loss,
    )
    return loss, divisor, report


def _next_batch(
    data_iterator: Iterator[Rows] | None, model: Any, args: argparse.Namespace
) -> Batch:
    batch = broadcast_rows(
        _next_rows(data_iterator, model, args),
        row_shape(),
        args.micro_batch_size if model.training else megatron.evaluation_batch_sizes(args)[1],
        tp_group=megatron.tensor_parallel_group(),
        host_group=megatron.tensor_parallel_host_group(),
        tp_source_rank=megatron.tensor_parallel_source_rank(),
        device=torch.cuda.current_device(),
    )
    cp_group = megatron.context_parallel_group()
    return keep_positions_of_rank(
        batch,
        cp_rank=cp_group.rank(),
        cp_size=cp_group.size(),
        cuts_pieces=args.piece_multiple > 1,
    )


def _next_rows(
    data_iterator: Iterator[Rows] | None, model: Any, args: argparse.Namespace
) -> Rows | None:
    if args.num_experts is not None and model.training:
        _auxiliary_losses.prepare(model)
        if megatron.is_first_model_chunk(model):
            return _auxiliary_losses.next_rows(data_iterator)
    return None if data_iterator is None else next(data_iterator)


def _routing_padding(batch: Batch, model: Any, args: argparse.Namespace) -> Tensor | None:
    """Which positions the routers' losses leave out, where there are routers."""
    if args.num_experts is None:
        return None
    mask = batch.padding_mask
    if args.sequence_parallel and not megatron.has_embedding(model):
        # Megatron cuts the mask together with the embedding; later stages have none.
        tp_group = megatron.tensor_parallel_group()
        mask = mask.chunk(tp_group.size(), dim=1)[tp_group.rank()]
    return mask


def _share_of_global_batch(model: Any, args: argparse.Namespace, *, device: Any) -> Tensor:
    """What this micro-batch is of a global batch; float64 scalar. One rank of CP counts it."""
    if model.training:
        num_micro_batches = megatron.num_micro_batches() * megatron.data_parallel_size()
    else:
        batch_size, micro_batch_size = megatron.evaluation_batch_sizes(args)
        num_micro_batches = batch_size // micro_batch_size
    share = 0.0 if megatron.context_parallel_group().rank() else 1 / num_micro_batches
    return torch.full((), share, dtype=torch.float64, device=device)
