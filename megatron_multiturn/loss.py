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
