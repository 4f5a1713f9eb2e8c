"""The loss of one micro-batch: a sum and an integer divisor, averaged by nobody in between.

With `calculate_per_token_loss` Megatron applies no data parallel and no micro-batch average.
It sums the divisors over micro-batches and data parallel ranks and divides the gradients once
by that sum, so the result is the exact mean over the global batch, however it is cut.
"""

import torch
from torch import Tensor


def loss_weights(loss_mask: Tensor, loss_token_num: Tensor) -> Tensor:
    """The weight of each token's loss in the objective, before the division.

    Both (b, s) float32; the result likewise: `loss_mask / loss_token_num` where the label is a
    target, 0 elsewhere.
    """
    return torch.where(loss_mask > 0, loss_mask / loss_token_num, 0.0)


def loss_func(
    loss_mask: Tensor, loss_token_num: Tensor, turn_num: Tensor, output_tensor: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum over the micro-batch of what the chosen average counts, and what it is divided by.

    loss_mask, loss_token_num: float32 (b, s); turn_num: int64 (b, 1), as the rows emit them.
    output_tensor: (b, s), the cross-entropy of each token.

    Returns the loss (scalar, sum of `losses * loss_mask / loss_token_num`), the divisor (int32
    scalar) and, for the log, a (sum, count) pair of float32 per quantity: `lm loss`, the
    objective, and `token loss`, the plain mean over target tokens. Megatron divides the global
    sum by the global count.
    """
    losses = output_tensor.float()
    loss = (losses * loss_weights(loss_mask, loss_token_num)).sum()
    divisor = turn_num.sum().to(torch.int32)
    masked = (losses.detach() * loss_mask).sum()
    report = {
        "lm loss": torch.stack([loss.detach(), divisor.float()]),
        "token loss": torch.stack([masked, loss_mask.sum()]),
    }
    return loss, divisor, report


# What `turn_report` counts: no losses, so that a perplexity of them means nothing.
COUNTS = ("turns", "target tokens")


def turn_report(
    losses: Tensor,
    turn_index: Tensor,
    turn_token_num: Tensor,
    *,
    batch_share: Tensor,
    num_turn_indices: int = 0,
) -> dict[str, Tensor]:
    """What the log shows of the turns, whatever the average: (sum, count) pairs as above.

    losses, turn_token_num: float32 (b, s); turn_index: int (b, s), as the rows emit them.
    batch_share: float64 scalar, this micro-batch's share of the global batch; adds up to 1.

    `turns` and `target tokens` are numbers in a global batch, in float64, so that thirds of a turn
    add up to whole ones; a turn that is cut over rows is one in each. `turn K loss`, K from 1 to
    `num_turn_indices`, is the mean over the K-th turns of all sessions of each turn's mean; NaN
    where a global batch has no such turn.
    """
    is_target = turn_index > 0
    share = torch.where(is_target, 1 / turn_token_num, 0.0)  # adds up to 1 over a turn
    turns = torch.where(is_target, 1 / turn_token_num.double(), 0.0).sum()
    numbers = (turns, is_target.sum(dtype=torch.float64))
    report = {
        name: torch.stack([number, batch_share])
        for name, number in zip(COUNTS, numbers, strict=True)
    }
    losses = losses.detach().float()
    for index in range(1, num_turn_indices + 1):
        weights = share * (turn_index == index)
        report[f"turn {index} loss"] = torch.stack([(losses * weights).sum(), weights.sum()])
    return report
