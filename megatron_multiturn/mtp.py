"""Multi-token prediction within the pieces of a row.

Megatron shifts tokens, labels and loss weights by one position for each further token that is
predicted. The shift must not reach into the next piece. Megatron's own version for packed rows
takes a micro-batch of one row and loops over its pieces, with a synchronization each.

The loss weights that are shifted are `loss.loss_weights`, so each turn counts as it does in the
objective, and the sum of the weights is the divisor, as Megatron's scaling of these losses wants.
"""

import torch
from torch import Tensor

from megatron_multiturn.attention import PackedRows


def roll_within_pieces(tensor: Tensor, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """`tensor` (b, s) with every position showing the next one's value, 0 at the end of a piece.

    Returns it and its sum, which for weights (floats) is 0 or at least 1. A mask of padding (bool)
    stays as it is: a position is padding or not whatever it predicts, and with sequence parallelism
    the rank holds a part of the mask only.
    """
    if tensor.dtype == torch.bool:
        return tensor, tensor.sum()
    rolled = tensor.roll(-1, dims=-1).flatten()
    # A piece without a position ends where the piece before it does.
    rolled[(rows.piece_boundaries[1:] - 1).long()] = 0
    if rolled.is_floating_point():
        # Weights: Megatron divides by their sum, or by 1 if that is less. A turn that lost its
        # first target here can leave less; the weights are then scaled to a sum of 1.
        total = rolled.sum()
        rolled = rolled / torch.where(total > 0, total.clamp(max=1), 1)
    rolled = rolled.view_as(tensor)
    return rolled, rolled.sum()
