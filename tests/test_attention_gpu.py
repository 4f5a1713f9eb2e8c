"""PackedAttention's kernel on a GPU: its error against float64, beside plain SDPA's."""

import math

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_multiturn.attention import PackedAttention, packed_rows, uses_varlen_kernel

pytestmark = pytest.mark.gpu

SEQUENCE_LENGTH = 512
LAYOUTS = {
    "one piece as long as the row": [512],
    "pieces of one token": [1, 1, 500, 1, 9],
    "tiny pieces": [4] * 128,
    "a session and padding": [300, 212],
}


def tensors(num_heads: int, num_groups: int, head_size: int) -> list[torch.Tensor]:
    """query, key, value, upstream gradient: float64 [s, 2, heads or groups, d]."""
    generator = torch.Generator(device="cuda").manual_seed(3)
    heads = (num_heads, num_groups, num_groups, num_heads)
    return [
        torch.randn(SEQUENCE_LENGTH, 2, n, head_size, generator=generator, device="cuda").double()
        for n in heads
    ]


def by_sdpa(inputs: list[torch.Tensor], cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of PyTorch's plain attention under an explicit mask."""
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs[:3])
    position = torch.arange(SEQUENCE_LENGTH, device="cuda")
    outputs = []
    for row in range(2):
        piece = torch.searchsorted(cu_seqlens[row].contiguous(), position, right=True)
        seen = (piece[:, None] == piece[None, :]) & (position[:, None] >= position[None, :])
        heads_first = [t[:, row].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        out = scaled_dot_product_attention(
            heads_first[0],
            heads_first[1],
            heads_first[2],
            attn_mask=seen,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        outputs.append(out.squeeze(0).transpose(0, 1).flatten(1))
    output = torch.stack(outputs, dim=1)
    output.backward(inputs[3].flatten(2))
    return [output, *gradients(q, k, v)]


def gradients(*inputs: torch.Tensor) -> list[torch.Tensor]:
    assert all(t.grad is not None for t in inputs)
    return [t.grad for t in inputs if t.grad is not None]


def by_packed_attention(inputs: list[torch.Tensor], cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs[:3])
    config = TransformerConfig(
        num_layers=1,
        hidden_size=q.shape[2] * q.shape[3],
        num_attention_heads=q.shape[2],
        num_query_groups=k.shape[2],
        attention_dropout=0.0,
    )
    rows = packed_rows(cu_seqlens, sequence_length=SEQUENCE_LENGTH, dtype=q.dtype)
    attention = PackedAttention(config, 1, None, "self")
    output = attention(q, k, v, None, packed_seq_params=rows)
    output.backward(inputs[3].flatten(2))
    return [output, *gradients(q, k, v)]


def boundaries(name: str) -> torch.Tensor:
    """(2, 200) int32: the layout in the first row, one piece in the second."""
    cu_seqlens = torch.full((2, 200), SEQUENCE_LENGTH, dtype=torch.int32)
    cu_seqlens[:, 0] = 0
    stops = torch.tensor(LAYOUTS[name]).cumsum(0)
    cu_seqlens[0, 1 : len(stops) + 1] = stops
    return cu_seqlens.cuda()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_heads", "num_groups", "head_size"), [(4, 4, 64), (8, 2, 128)])
def test_error_is_at_most_twice_that_of_sdpa(
    layout: str, dtype: torch.dtype, num_heads: int, num_groups: int, head_size: int
) -> None:
    cu_seqlens = boundaries(layout)
    exact_inputs = [t.to(dtype).double() for t in tensors(num_heads, num_groups, head_size)]
    inputs = [t.to(dtype) for t in exact_inputs]
    assert uses_varlen_kernel(inputs[0].device, dtype) == (dtype != torch.float32)
    exact = by_sdpa(exact_inputs, cu_seqlens)
    ours = by_packed_attention(inputs, cu_seqlens)
    plain = by_sdpa(inputs, cu_seqlens)
    for mine, sdpa, wanted in zip(ours, plain, exact, strict=True):
        our_error = float((mine.double() - wanted).norm() / wanted.norm())
        sdpa_error = float((sdpa.double() - wanted).norm() / wanted.norm())
        assert math.isfinite(our_error)
        # A gradient that is exactly 0 in float64 has no relative error; none is here.
        assert our_error <= 2 * sdpa_error + 1e-7
