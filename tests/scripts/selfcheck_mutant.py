"""A training script that breaks one thing first: the selfcheck must see it.

Run as SCRIPT.py of the selfcheck, in both of its jobs; the environment variable MUTANT says what.

    token-mean          every target token counts alike
    mean-of-means       each micro-batch is averaged by itself
    divisor-on-all-cp   each context parallel rank counts the turns of its rows
    leak                the pieces of a row see each other
    shifted-mask        the loss is taken one position too late
    auxiliary-unscaled  load balancing divided by turns, in place of micro-batches
    none                nothing is broken
    dies                rank 1 of the job is killed in its first forward pass
    out-of-memory       an allocation fails on rank 0
"""

import dataclasses
import os
import signal

import torch

from megatron_multiturn import forward, megatron_compat

packed_rows, keep_positions = forward.packed_rows, forward.keep_positions_of_rank


def token_mean(loss_mask, loss_token_num, turn_num, output_tensor):
    loss = (output_tensor.float() * loss_mask).sum()
    divisor = loss_mask.sum().int()
    return loss, divisor, {"lm loss": torch.stack([loss.detach(), divisor.float()])}


def mean_of_means(loss_mask, loss_token_num, turn_num, output_tensor):
    weights = torch.where(loss_mask > 0, loss_mask / loss_token_num, 0.0)
    loss = (output_tensor.float() * weights).sum() / turn_num.sum().clamp(min=1)
    one = torch.ones((), dtype=torch.int32)
    return loss, one, {"lm loss": torch.stack([loss.detach(), one.float()])}


def counted_everywhere(batch, **place):
    return dataclasses.replace(keep_positions(batch, **place), turn_num=batch.turn_num)


def whole_rows(boundaries, *, sequence_length, **kwargs):
    whole = torch.arange(0, int(boundaries[-1]) + 1, sequence_length).int()
    return packed_rows(whole, sequence_length=sequence_length, **kwargs)


def shifted(batch, **place):
    batch = keep_positions(batch, **place)
    moved = {name: getattr(batch, name).roll(1, dims=1) for name in ("loss_mask", "loss_token_num")}
    return dataclasses.replace(batch, **moved)


def dies(batch, **place):
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return keep_positions(batch, **place)


def out_of_memory(batch, **place):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")


if __name__ == "__main__":
    mutant = os.environ["MUTANT"]
    if mutant == "token-mean":
        forward.loss_func = token_mean
    elif mutant == "mean-of-means":
        forward.loss_func = mean_of_means
    elif mutant == "leak":
        forward.packed_rows = whole_rows
    elif mutant == "auxiliary-unscaled":
        forward._auxiliary_losses.prepare = lambda model: None
    elif mutant != "none":
        forward.keep_positions_of_rank = {
            "divisor-on-all-cp": counted_everywhere,
            "shifted-mask": shifted,
            "dies": dies,
            "out-of-memory": out_of_memory,
        }[mutant]
    megatron_compat.run_gpt()
