"""How long packed attention takes by each kernel, forward and backward, by the length of pieces.

    python benchmarks/attention_kernels.py --tokens 8192 32768 --heads 16 16 128 --heads 32 8 128

A row of --tokens positions is cut into pieces of one length, or into pieces whose lengths are
log-normal (`~700`: with a median of 700). `torch`, `te` and `fa4` are the kernels of
`--packed-attention` that are installed; `loose` is `torch` launched as if a row could hold three
times as many pieces and each were as long as the row, as it must be where neither is known. The
work is what `auto` decides by: heads * head size * the sum of the squared lengths.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import numpy as np
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray

from megatron_multiturn.arguments import has_module
from megatron_multiturn.attention import PackedAttention, PackedRows, packed_rows

_SIGMA = 0.9  # of the logarithm of a length
_SHORTEST = 8
_WARMUP_CALLS, _MEASURED_CALLS = 4, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=["128", "512", "1024", "2048", "4096", "row", "~300", "~700", "~1500"],
    )
    parser.add_argument(
        "--heads",
        type=int,
        nargs=3,
        action="append",
        metavar=("HEADS", "GROUPS", "SIZE"),
        help="heads, query groups and head size; may be repeated (default: 16 16 128)",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kernels = ["torch", "loose"]
    if torch.cuda.is_available():
        kernels += ["te"] * has_module("transformer_engine") + ["fa4"] * has_module(
            "flash_attn.cute"
        )
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, milliseconds")
    else:
        print("no GPU: this times the loop over pieces, in float32, and shows nothing of a kernel")
    head = "".join(f"{name:>10}" for name in kernels)
    print(f"{'heads':>12}{'tokens':>8}{'pieces of':>11}{'pieces':>8}{'work':>10}{head}")
    for heads in args.heads or [[16, 16, 128]]:
        for tokens in args.tokens:
            for length in args.lengths:
                if length.isdigit() and int(length) > tokens:
                    continue
                lengths = piece_lengths(length, tokens, np.random.default_rng(args.seed))
                _report(heads, tokens, length, lengths, kernels)


def piece_lengths(length: str, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Lengths that add up to `tokens`: all alike, or log-normal; the last is what is left."""
    if length == "row":
        return np.array([tokens])
    if length.startswith("~"):
        drawn = rng.lognormal(np.log(float(length[1:])), _SIGMA, tokens // _SHORTEST)
        stops = drawn.clip(_SHORTEST, tokens).astype(np.int64).cumsum()
    else:
        stops = np.arange(int(length), tokens + int(length), int(length))
    return np.diff([0, *stops[stops < tokens], tokens])


def _report(
    heads: list[int], tokens: int, length: str, lengths: NDArray[np.int64], kernels: list[str]
) -> None:
    num_heads, num_groups, head_size = heads
    cells = "".join(f"{_milliseconds(kernel, heads, tokens, lengths):10.3f}" for kernel in kernels)
    work = num_heads * head_size * float((lengths**2).sum())
    print(
        f"{f'{num_heads}/{num_groups}x{head_size}':>12}{tokens:8,}{length:>11}{len(lengths):8,}"
        f"{work:10.1e}{cells}",
        flush=True,
    )


def _milliseconds(kernel: str, heads: list[int], tokens: int, lengths: NDArray[np.int64]) -> float:
    num_heads, num_groups, head_size = heads
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * head_size,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        attention_dropout=0.0,
        bf16=on_gpu,
    )
    attention = PackedAttention(
        config, 1, AttnMaskType.causal, "self", kernels="torch" if kernel == "loose" else kernel
    )
    bounds = torch.from_numpy(np.concatenate([[0], lengths.cumsum()])).int()
    rows = packed_rows(bounds, sequence_length=tokens, device=device)
    if kernel == "loose":
        rows = _launched_loosely(rows, tokens)
    q, k, v = (
        torch.randn(tokens, 1, n, head_size, device=device, dtype=dtype, requires_grad=True)
        for n in (num_heads, num_groups, num_groups)
    )
    upstream = torch.randn(tokens, 1, num_heads * head_size, device=device, dtype=dtype)

    def step() -> None:
        out = attention(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=rows)
        torch.autograd.grad(out, (q, k, v), upstream)

    return _median_milliseconds(step) if on_gpu else _median_on_cpu(step)


def _launched_loosely(rows: PackedRows, tokens: int) -> PackedRows:
    bounds = rows.piece_boundaries
    return dataclasses.replace(
        rows,
        piece_boundaries=torch.cat([bounds, bounds[-1:].expand(2 * (len(bounds) - 1))]),
        longest_piece=tokens,
    )


def _median_milliseconds(step: Callable[[], None]) -> float:
    for _ in range(_WARMUP_CALLS):
        step()
    times = []
    for _ in range(_MEASURED_CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _median_on_cpu(step: Callable[[], None]) -> float:
    import timeit

    return 1e3 * statistics.median(timeit.repeat(step, number=1, repeat=3))


if __name__ == "__main__":
    main()
