"""PackedAttention against attention computed piece by piece in float64."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_multiturn import attention, megatron_compat
from megatron_multiturn.attention import PackedAttention, PackedRows, packed_rows
from megatron_multiturn.cpu import _CudaToCpu
from megatron_multiturn.errors import ConfigError

SEQUENCE_LENGTH, HEAD_SIZE = 13, 8
# Two rows: pieces of 1, 5, 4 and padding of 3; one piece as long as the row.
BOUNDARIES = torch.tensor([0, 1, 6, 10, 13, 26], dtype=torch.int32)


def packed_attention(
    num_heads: int, num_groups: int, kernels: str = "torch", **overrides: Any
) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * HEAD_SIZE,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        attention_dropout=0.0,
        **overrides,
    )
    return PackedAttention(config, 1, None, "self", kernels=kernels)


def rows() -> PackedRows:
    return packed_rows(BOUNDARIES, sequence_length=SEQUENCE_LENGTH, device="cpu")


def random_qkv(num_heads: int, num_groups: int) -> list[torch.Tensor]:
    """query, key, value: [s, b, heads or groups, d]."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(SEQUENCE_LENGTH, 2, n, HEAD_SIZE, generator=generator)
        for n in (num_heads, num_groups, num_groups)
    ]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Softmax attention in float64 under the mask "same piece and not later"; [s, b, h * d].

    window: how many earlier positions are seen; None: all.
    """
    s, b, h, d = q.shape
    k, v = (t.repeat_interleave(h // t.shape[2], dim=2) for t in (k, v))
    position = torch.arange(s)
    output = torch.empty(s, b, h * d, dtype=q.dtype)
    for row in range(b):
        piece = torch.searchsorted(BOUNDARIES.long(), position + row * s, right=True)
        distance = position[:, None] - position[None, :]
        seen = (piece[:, None] == piece[None, :]) & (distance >= 0)
        if window is not None:
            seen &= distance <= window
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
    expected = reference(exact[0], exact[1], exact[2])
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
        torch.tensor([0, SEQUENCE_LENGTH, 2 * SEQUENCE_LENGTH], dtype=torch.int32),
        sequence_length=SEQUENCE_LENGTH,
        device="cpu",
    )
    out = packed_attention(4, 4)(q, k, v, None, packed_seq_params=whole_rows)
    expected = reference(q.double(), k.double(), v.double())
    assert (out[:, 0].double() - expected[:, 0]).abs().max() > 0.1
    torch.testing.assert_close(out[:, 1].double(), expected[:, 1], rtol=1e-5, atol=1e-6)


def test_a_changed_key_reaches_its_own_piece_alone() -> None:
    q, k, v = random_qkv(4, 2)
    layer = packed_attention(4, 2)
    before = layer(q, k, v, None, packed_seq_params=rows())
    k[2, 0] += 1  # in the second piece of the first row, positions 1 to 5
    changed = (layer(q, k, v, None, packed_seq_params=rows()) != before).any(-1)
    expected = torch.zeros(SEQUENCE_LENGTH, 2, dtype=torch.bool)
    expected[2:6, 0] = True
    assert torch.equal(changed, expected)


def test_boundaries_are_planned_for_round_numbers() -> None:
    params = rows()
    assert params.host_boundaries == params.piece_boundaries.tolist() == [0, 1, 6, 10, 13, 26]
    assert params.piece_boundaries.dtype == torch.int32
    assert (params.longest_piece, params.squared_lengths) == (13, 1 + 25 + 16 + 9 + 169)
    assert params.max_seqlen_q == SEQUENCE_LENGTH
    assert params.planned is not None
    assert params.planned.cu_seqlens_q.tolist() == [0, 1, 6, 10, 13] + [26] * 28
    assert params.planned.max_seqlen_q == 16
    tiny = torch.arange(34, dtype=torch.int32)
    planned = packed_rows(tiny, sequence_length=33, device="cpu").planned
    assert planned is not None
    assert len(planned.cu_seqlens_q) == 65
    assert planned.max_seqlen_q == 1


def test_the_longest_piece_is_planned_within_the_rows() -> None:
    bounds = torch.tensor([0, 9, 12], dtype=torch.int32)
    planned = packed_rows(bounds, sequence_length=12, device="cpu").planned
    assert planned is not None
    assert planned.max_seqlen_q == 12


@pytest.mark.parametrize("window", [0, 1, 3, 12, 100])
def test_a_window_is_that_of_megatron(window: int) -> None:
    from megatron.core.transformer.utils import get_sliding_window_causal_mask

    with _CudaToCpu():  # it names the device
        hidden = get_sliding_window_causal_mask(SEQUENCE_LENGTH, SEQUENCE_LENGTH, (window, 0))
    distance = torch.arange(SEQUENCE_LENGTH)[:, None] - torch.arange(SEQUENCE_LENGTH)[None, :]
    assert torch.equal(~hidden, (distance >= 0) & (distance <= window))
    q, k, v = random_qkv(4, 2)
    layer = packed_attention(4, 2, window_size=(window, 0))
    out = layer(q, k, v, None, packed_seq_params=rows())
    expected = reference(q.double(), k.double(), v.double(), window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_layers_without_a_window_see_all() -> None:
    q, k, v = random_qkv(4, 4)
    layer = packed_attention(4, 4, window_size=(1, 0), window_attn_skip_freq=[0])
    out = layer(q, k, v, None, packed_seq_params=rows())
    expected = reference(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_without_boundaries_it_refuses() -> None:
    q, k, v = random_qkv(4, 4)
    with pytest.raises(ConfigError, match="without piece boundaries"):
        packed_attention(4, 4)(q, k, v, None)


class TeAttention:
    """Takes the place of Transformer Engine's: the same arguments, computed piece by piece."""

    num_calls = 0

    def __init__(self, config: TransformerConfig, *, softmax_scale: float, **given: Any) -> None:
        self.scale = softmax_scale

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: None,
        *,
        attn_mask_type: Any,
        packed_seq_params: PackedSeqParams,
    ) -> torch.Tensor:
        TeAttention.num_calls += 1
        assert packed_seq_params.qkv_format == "thd"
        out = torch.full_like(q, math.nan)
        for start, stop in pairwise(packed_seq_params.cu_seqlens_q.tolist()):
            assert stop - start <= packed_seq_params.max_seqlen_q
            query, key, value = (t[start:stop].transpose(0, 1) for t in (q, k, v))
            out[start:stop] = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
            ).transpose(0, 1)
        return out.flatten(1)


@pytest.fixture
def te_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_compat, "te_attention_class", lambda: TeAttention)
    monkeypatch.setattr(attention, "has_varlen_kernels", lambda query: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        PackedAttention,
        "_by_varlen_attn",
        lambda self, q, k, v, rows: self._by_piece(q, k, v, rows),
    )
    TeAttention.num_calls = 0


@pytest.mark.usefixtures("te_on_cpu")
@pytest.mark.parametrize(
    ("kernels", "break_even", "num_calls"),
    [("te", math.inf, 1), ("auto", 220 * 4 * 8, 1), ("auto", 220 * 4 * 8 + 1, 0), ("torch", 0, 0)],
)
def test_the_kernel_is_chosen_by_the_work(
    kernels: str, break_even: float, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BREAK_EVEN_WORK", break_even)
    q, k, v = random_qkv(4, 2)
    out = packed_attention(4, 2, kernels)(q, k, v, None, packed_seq_params=rows())
    torch.testing.assert_close(
        out.double(), reference(q.double(), k.double(), v.double()), rtol=1e-5, atol=1e-6
    )
    assert TeAttention.num_calls == num_calls


@pytest.mark.usefixtures("te_on_cpu")
def test_on_older_gpus_it_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BREAK_EVEN_WORK", 0)
    q, k, v = random_qkv(4, 2)
    for capability, num_calls in (((8, 0), 0), ((9, 0), 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        packed_attention(4, 2, "auto")(q, k, v, None, packed_seq_params=rows())
        assert TeAttention.num_calls == num_calls


@pytest.mark.usefixtures("te_on_cpu")
def test_within_a_window_it_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BREAK_EVEN_WORK", 0)
    q, k, v = random_qkv(4, 2)
    layer = packed_attention(4, 2, "auto", window_size=(3, 0))
    out = layer(q, k, v, None, packed_seq_params=rows())
    assert TeAttention.num_calls == 0
    expected = reference(q.double(), k.double(), v.double(), 3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_pieces_that_ranks_share_are_planned_as_they_are() -> None:
    """Transformer Engine's exchange of heads waits for the device for every one of them."""
    shared = packed_rows(BOUNDARIES, sequence_length=26, device="cpu", cuts_pieces=True)
    assert shared.qkv_format == "thd"
    assert shared.planned is not None
    assert shared.planned.cu_seqlens_q.tolist() == BOUNDARIES.tolist()
    assert shared.planned.cu_seqlens_q_padded is shared.planned.cu_seqlens_q


@pytest.mark.usefixtures("te_on_cpu")
def test_the_backward_pass_keeps_no_view_of_queries_keys_and_values_together() -> None:
    """Megatron splits them out of one tensor, which a view would keep whole."""
    mixed = torch.randn(SEQUENCE_LENGTH, 1, 3 * 4, HEAD_SIZE, requires_grad=True) + 0
    q, k, v = mixed.split(4, dim=2)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    one_row = packed_rows(BOUNDARIES[:5], sequence_length=SEQUENCE_LENGTH, device="cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_attention(4, 4, "te")(q + 0, k + 0, v, None, packed_seq_params=one_row)
    assert mixed.untyped_storage().data_ptr() not in kept


@pytest.mark.usefixtures("te_on_cpu")
def test_transformer_engine_leaves_no_trace_in_a_checkpoint() -> None:
    assert list(packed_attention(4, 2, "te").state_dict()) == []
