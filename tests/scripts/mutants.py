"""pretrain_and_record.py with one thing broken, named by the environment variable MUTANT.

Each mutant is a mistake that the layout tests must see.
"""

import os
import runpy
from dataclasses import replace
from pathlib import Path

import torch

from megatron_multiturn import forward, moe


def nothing():
    """No mutant: shows that it is not the way of running them that the tests see."""


def divisor_of_every_cp_rank():
    keep = forward.keep_positions_of_rank

    def keep_and_count(batch, **place):
        return replace(keep(batch, **place), turn_num=batch.turn_num)

    forward.keep_positions_of_rank = keep_and_count


def mean_of_micro_batch_means():
    turn_loss = forward.loss_func

    def mean_of_micro_batch(*args):
        loss, divisor, report = turn_loss(*args)
        return loss / divisor.clamp(min=1), torch.ones_like(divisor), report

    forward.loss_func = mean_of_micro_batch


def token_mean():
    turn_loss = forward.loss_func

    def mean_over_tokens(loss_mask, loss_token_num, turn_num, output):
        return turn_loss(loss_mask, loss_mask, loss_mask.sum(dim=1, keepdim=True), output)

    forward.loss_func = mean_over_tokens


def shifted_mask():
    broadcast = forward.broadcast_rows

    def broadcast_and_shift(*args, **kwargs):
        batch = broadcast(*args, **kwargs)
        return replace(
            batch,
            loss_mask=batch.loss_mask.roll(1, dims=1),
            loss_token_num=batch.loss_token_num.roll(1, dims=1),
        )

    forward.broadcast_rows = broadcast_and_shift


def leaking_attention():
    packed_rows = forward.packed_rows

    def whole_rows(boundaries, *, sequence_length, **kwargs):
        one_piece_a_row = torch.arange(0, int(boundaries[-1]) + 1, sequence_length).int()
        return packed_rows(one_piece_a_row, sequence_length=sequence_length, **kwargs)

    forward.packed_rows = whole_rows


def auxiliary_losses_as_for_tokens():
    moe.AuxiliaryLossScale.prepare = lambda self, model: None


def auxiliary_losses_by_the_micro_batch():
    def read_step(self, data_iterator, num_micro_batches):
        rows = read_whole_step(self, data_iterator, num_micro_batches)
        return rows // num_micro_batches

    read_whole_step = moe.StepReader.read_step
    moe.StepReader.read_step = read_step


def mtp_with_a_mask():
    forward.loss_weights = lambda loss_mask, loss_token_num: loss_mask


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        nothing,
        divisor_of_every_cp_rank,
        mean_of_micro_batch_means,
        token_mean,
        shifted_mask,
        leaking_attention,
        auxiliary_losses_as_for_tokens,
        auxiliary_losses_by_the_micro_batch,
        mtp_with_a_mask,
    )
}

if __name__ == "__main__":
    MUTANTS[os.environ["MUTANT"]]()
    script = Path(__file__).with_name("pretrain_and_record.py")
    runpy.run_path(str(script), run_name="__main__")
