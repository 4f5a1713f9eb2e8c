"""The shift of multi-token prediction, against Megatron's own and against its definition."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import roll_tensor

from megatron_multiturn.attention import PackedRows, packed_rows
from megatron_multiturn.mtp import roll_within_pieces

# Two rows of 7 positions; the boundaries of the second are repeated to one length.
CU_SEQLENS = torch.tensor([[0, 3, 4, 7], [0, 5, 7, 7]], dtype=torch.int32)


def rows(cu_seqlens: torch.Tensor = CU_SEQLENS) -> PackedRows:
    """The boundaries of rows of 7 positions."""
    row_starts = 7 * torch.arange(len(cu_seqlens), dtype=torch.int32).unsqueeze(1)
    boundaries = (cu_seqlens + row_starts).flatten().unique_consecutive()
    return packed_rows(boundaries, sequence_length=7, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_each_position_shows_the_next_of_its_piece(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 15, dtype=dtype).view(2, 7)
    rolled, total = roll_within_pieces(tensor, rows())
    assert rolled.tolist() == [[2, 3, 0, 0, 6, 7, 0], [9, 10, 11, 12, 0, 14, 0]]
    assert rolled.dtype == dtype
    assert float(total) == 2 + 3 + 6 + 7 + 9 + 10 + 11 + 12 + 14
    assert tensor.tolist() == torch.arange(1, 15, dtype=dtype).view(2, 7).tolist()


@pytest.mark.parametrize("row", [0, 1])
def test_one_row_as_megatron_shifts_it(row: int) -> None:
    tensor = torch.arange(1, 8).view(1, 7)
    stock_rows = PackedSeqParams(qkv_format="thd", cu_seqlens_q=CU_SEQLENS[row])
    theirs, their_sum = roll_tensor(tensor, packed_seq_params=stock_rows)
    ours, our_sum = roll_within_pieces(tensor, rows(CU_SEQLENS[row : row + 1]))
    assert torch.equal(ours, theirs)
    assert torch.equal(our_sum, their_sum)


@pytest.mark.parametrize("weights", [[1 / 4] * 4, [1.0, 0, 0, 0], [3.0, 1, 0, 0]])
def test_the_weights_that_are_left_are_never_scaled_down(weights: list[float]) -> None:
    """Megatron divides the loss by their sum or by 1: either way it must be a mean."""
    rolled, total = roll_within_pieces(
        torch.tensor([[*weights, 0.0, 0.0, 0.0]]),
        rows(torch.tensor([[0, 4, 7]], dtype=torch.int32)),
    )
    left = sum(weights[1:])
    assert float(total) == pytest.approx(max(left, 1.0) if left else 0.0)
    shares = (rolled / total.clamp(min=1)).tolist()[0]
    assert shares == pytest.approx([w / left if left else 0.0 for w in [*weights[1:], 0, 0, 0, 0]])


def test_a_mask_of_padding_stays() -> None:
    mask = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
    assert torch.equal(roll_within_pieces(mask, rows())[0], mask)
