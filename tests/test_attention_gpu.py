"""PackedAttention's kernels on a GPU: their error against float64, beside plain SDPA's."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_multiturn.arguments import has_module
from megatron_multiturn.attention import PackedAttention, has_varlen_kernels, packed_rows
from megatron_multiturn.loss import loss_func, turn_report
from megatron_multiturn.megatron_hooks import add_weight_gradient

pytestmark = pytest.mark.gpu

SEQUENCE_LENGTH = 512
LAYOUTS = {
    "one piece as long as the row": [512],
    "pieces of one token": [1, 1, 500, 1, 9],
    "tiny pieces": [4] * 128,
    "pieces of one token alone": [1] * 512,
    "a session and padding": [300, 212],
}


KERNELS = [
    "torch",
    pytest.param(
        "te",
        marks=pytest.mark.skipif(
            not has_module("transformer_engine"), reason="Transformer Engine is not installed"
        ),
    ),
    pytest.param(
        "fa4",
        marks=pytest.mark.skipif(
            not has_module("flash_attn.cute"), reason="FlashAttention 4 is not installed"
        ),
    ),
]


def tensors(num_heads: int, num_groups: int, head_size: int) -> list[torch.Tensor]:
    """query, key, value, upstream gradient: float64 [s, 2, heads or groups, d]."""
    generator = torch.Generator(device="cuda").manual_seed(3)
    heads = (num_heads, num_groups, num_groups, num_heads)
    return [
        torch.randn(SEQUENCE_LENGTH, 2, n, head_size, generator=generator, device="cuda").double()
        for n in heads
    ]


def boundaries(layout: str) -> torch.Tensor:
    """int32 (n + 1,): the layout in the first row, one piece in the second."""
    lengths = torch.tensor([0, *LAYOUTS[layout], SEQUENCE_LENGTH])
    return lengths.cumsum(0).int()


def by_sdpa(
    inputs: list[torch.Tensor], layout: str, window: int | None = None
) -> list[torch.Tensor]:
    """Output and gradients of PyTorch's plain attention under an explicit mask.

    In the manner of those who write it down plainly: keys and values once for each head, by a fused
    kernel, and not by the one that computes in 32 bits what it is given in 16.
    """
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs[:3])
    repeats = q.shape[2] // k.shape[2]
    bounds = boundaries(layout).tolist()
    is_exact = q.dtype == torch.float64
    backend = SDPBackend.MATH if is_exact else SDPBackend.EFFICIENT_ATTENTION
    outputs = []
    for row in range(2):
        seen = torch.zeros(SEQUENCE_LENGTH, SEQUENCE_LENGTH, dtype=torch.bool, device="cuda")
        for start, stop in pairwise(bound - row * SEQUENCE_LENGTH for bound in bounds):
            if start >= 0 and stop <= SEQUENCE_LENGTH:
                seen[start:stop, start:stop] = True
        seen = seen.tril() if window is None else seen.tril().triu(-window)
        key, value = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
        heads_first = [t[:, row].transpose(0, 1).unsqueeze(0) for t in (q, key, value)]
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                heads_first[0], heads_first[1], heads_first[2], attn_mask=seen
            )
        outputs.append(out.squeeze(0).transpose(0, 1).flatten(1))
    output = torch.stack(outputs, dim=1)
    output.backward(inputs[3].flatten(2))
    return [output, *gradients(q, k, v)]


def gradients(*inputs: torch.Tensor) -> list[torch.Tensor]:
    assert all(t.grad is not None for t in inputs)
    return [t.grad for t in inputs if t.grad is not None]


def attention_of(
    inputs: list[torch.Tensor], kernels: str, window: int | None = None
) -> PackedAttention:
    num_heads, head_size = inputs[0].shape[2:]
    overrides: dict[str, Any] = {} if window is None else {"window_size": (window, 0)}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * head_size,
        num_attention_heads=num_heads,
        num_query_groups=inputs[1].shape[2],
        attention_dropout=0.0,
        bf16=inputs[0].dtype == torch.bfloat16,
        **overrides,
    )
    return PackedAttention(config, 1, AttnMaskType.causal, "self", kernels=kernels)


def by_packed_attention(
    inputs: list[torch.Tensor], layout: str, kernels: str, window: int | None = None
) -> list[torch.Tensor]:
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs[:3])
    rows = packed_rows(boundaries(layout), sequence_length=SEQUENCE_LENGTH, device="cuda")
    attention = attention_of(inputs, kernels, window)
    output = attention(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=rows)
    output.backward(inputs[3].flatten(2))
    return [output, *gradients(q, k, v)]


def compare(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """The error of each of ours is at most twice that of plain SDPA in the same precision."""
    for mine, sdpa, wanted in zip(ours, plain, exact, strict=True):
        our_error = float((mine.double() - wanted).norm() / wanted.norm())
        sdpa_error = float((sdpa.double() - wanted).norm() / wanted.norm())
        assert math.isfinite(our_error)
        # A gradient that is exactly 0 in float64 has no relative error; none is here.
        assert our_error <= 2 * sdpa_error + 1e-7


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_heads", "num_groups", "head_size"), [(4, 4, 64), (8, 2, 128)])
def test_error_is_at_most_twice_that_of_sdpa(
    layout: str, dtype: torch.dtype, num_heads: int, num_groups: int, head_size: int, kernels: str
) -> None:
    exact_inputs = [t.to(dtype).double() for t in tensors(num_heads, num_groups, head_size)]
    inputs = [t.to(dtype) for t in exact_inputs]
    assert has_varlen_kernels(inputs[0]) == (dtype != torch.float32)
    ours = by_packed_attention(inputs, layout, kernels)
    compare(ours, by_sdpa(inputs, layout), by_sdpa(exact_inputs, layout))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("window", [1, 100, 511])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sliding_window(window: int, dtype: torch.dtype, kernels: str) -> None:
    layout = "a session and padding"
    exact_inputs = [t.to(dtype).double() for t in tensors(8, 2, 128)]
    inputs = [t.to(dtype) for t in exact_inputs]
    ours = by_packed_attention(inputs, layout, kernels, window)
    exact = by_sdpa(exact_inputs, layout, window)
    compare(ours, by_sdpa(inputs, layout, window), exact)
    everything = by_sdpa(exact_inputs, layout)
    assert bool((everything[0] - exact[0]).norm() > 0.01 * exact[0].norm()) == (window < 299)


@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_waits_for_the_device(kernels: str) -> None:
    """Boundaries, attention and loss: forward and backward without a synchronization."""
    inputs = [t.bfloat16() for t in tensors(8, 2, 128)]
    by_packed_attention(inputs, "tiny pieces", kernels)  # loads the kernels
    mask = (torch.rand(2, SEQUENCE_LENGTH, device="cuda") < 0.5).float()
    turn_num = torch.tensor([[3], [4]], device="cuda")
    share = torch.full((), 0.5, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, *_ = by_packed_attention(inputs, "tiny pieces", kernels)
        losses = output.float().mean(dim=2).transpose(0, 1)
        loss_func(mask, mask * 7, turn_num, losses)
        turn_report(losses, mask.int(), mask * 7, batch_share=share, num_turn_indices=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_the_fused_weight_gradient_is_added_in_the_precision_of_the_sum(
    main_dtype: torch.dtype,
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(5)
    inputs, output_gradient, before = (
        torch.randn(shape, generator=generator, device="cuda")
        for shape in ((512, 192), (512, 320), (320, 192))
    )
    inputs, output_gradient = inputs.bfloat16(), output_gradient.bfloat16()
    main_grad = before.to(main_dtype)
    wanted = main_grad.double() + output_gradient.double().t() @ inputs.double()
    add_weight_gradient(inputs, output_gradient, main_grad)
    error = float((main_grad.double() - wanted).norm() / wanted.norm())
    assert error < (1e-5 if main_dtype == torch.float32 else 4e-3)
