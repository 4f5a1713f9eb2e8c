"""PackedAttention against attention computed piece by piece in float64."""

import math

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_multiturn.attention import PackedAttention, PackedRows, packed_rows
from megatron_multiturn.errors import ConfigError

SEQUENCE_LENGTH, HEAD_SIZE = 13, 8
# Two rows: pieces of 1, 5, 4 and padding of 3; one piece as long as the row.
CU_SEQLENS = torch.tensor([[0, 1, 6, 10, 13, 13], [0, 13, 13, 13, 13, 13]], dtype=torch.int32)


def packed_attention(num_heads: int, num_groups: int) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * HEAD_SIZE,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        attention_dropout=0.0,
    )
    return PackedAttention(config, 1, None, "self")


def rows() -> PackedRows:
    return packed_rows(CU_SEQLENS, sequence_length=SEQUENCE_LENGTH, dtype=torch.float32)


def random_qkv(num_heads: int, num_groups: int) -> list[torch.Tensor]:
    """query, key, value: [s, b, heads or groups, d]."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(SEQUENCE_LENGTH, 2, n, HEAD_SIZE, generator=generator)
        for n in (num_heads, num_groups, num_groups)
    ]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention in float64 under the mask "same piece and not later"; [s, b, h * d]."""
    s, b, h, d = q.shape
    k, v = (t.repeat_interleave(h // t.shape[2], dim=2) for t in (k, v))
    position = torch.arange(s)
    output = torch.empty(s, b, h * d, dtype=q.dtype)
    for row in range(b):
        piece = torch.searchsorted(CU_SEQLENS[row].long().contiguous(), position, right=True)
        seen = (piece[:, None] == piece[None, :]) & (position[:, None] >= position[None, :])
        scores = torch.einsum("qhd,khd->hqk", q[:, row], k[:, row]) / math.sqrt(d)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        output[:, row] = torch.einsum("hqk,khd->qhd", weights, v[:, row]).reshape(s, h * d)
    return output


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (4, 2), (6, 1)])
def test_forward_and_backward_equal_the_reference(num_heads: int, num_groups: int) -> None:
    q, k, v = random_qkv(num_heads, num_groups)
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out = packed_attention(num_heads, num_groups)(*ours, None, packed_seq_params=rows())
    expected = reference(*exact)
    assert out.shape == (SEQUENCE_LENGTH, 2, num_heads * HEAD_SIZE)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, wanted in zip(ours, exact, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


def test_plain_causal_attention_is_another_result() -> None:
    q, k, v = random_qkv(4, 4)
    whole_rows = packed_rows(
        torch.tensor([[0, SEQUENCE_LENGTH]] * 2, dtype=torch.int32),
        sequence_length=SEQUENCE_LENGTH,
        dtype=torch.float32,
    )
    out = packed_attention(4, 4)(q, k, v, None, packed_seq_params=whole_rows)
    expected = reference(q.double(), k.double(), v.double())
    assert (out[:, 0].double() - expected[:, 0]).abs().max() > 0.1
    torch.testing.assert_close(out[:, 1].double(), expected[:, 1], rtol=1e-5, atol=1e-6)


def test_a_changed_key_reaches_its_own_piece_alone() -> None:
    q, k, v = random_qkv(4, 2)
    attention = packed_attention(4, 2)
    before = attention(q, k, v, None, packed_seq_params=rows())
    k[2, 0] += 1  # in the second piece of the first row, positions 1 to 5
    changed = (attention(q, k, v, None, packed_seq_params=rows()) != before).any(-1)
    expected = torch.zeros(SEQUENCE_LENGTH, 2, dtype=torch.bool)
    expected[2:6, 0] = True
    assert torch.equal(changed, expected)


def test_boundaries_count_over_the_rows_laid_end_to_end() -> None:
    params = rows()
    assert params.host_boundaries == [0, 1, 6, 10, 13, 26]
    assert params.piece_boundaries.tolist() == [0, 1, 6, 10, 13, 13, 13, 26, 26, 26, 26, 26]
    assert params.piece_boundaries.dtype == torch.int32


def test_without_boundaries_it_refuses() -> None:
    q, k, v = random_qkv(4, 4)
    with pytest.raises(ConfigError, match="without piece boundaries"):
        packed_attention(4, 4)(q, k, v, None)
