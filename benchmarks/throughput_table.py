"""The numbers of a comparison of variants, from the records of their runs, and how they print."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from throughput_data import EpochCounts

_TITLES = {
    "stock": "stock rows of one document, stock forward step",
    "packed": "packed rows",
    "padded": "one session a row, padded",
    "split": "one sample a turn, padded",
}
VARIANTS = tuple(_TITLES)

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """One variant at one sequence length; times are those of the median step."""

    step_seconds: float
    step_spread: float  # from the 10th to the 90th percentile of the steps, over the median
    tokens_per_second: float  # positions of the rows, padding too
    target_tokens_per_second: float | None  # of the rows that were trained; None: stock rows
    epoch_target_tokens_per_second: float | None  # the same if all rows of an epoch had been
    flops_per_second: float  # by Megatron's count of whole rows
    flops_per_second_in_pieces: float  # the same without attention between pieces
    data_share: float  # of the host's time
    batch_and_loss_share: float  # of the device's time
    batch_and_loss_host_share: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What ratios of target tokens a second could come to if every token cost the same."""

    padded: float  # sequence length / mean session length
    split: float  # positions a target that split samples compute / those of packed rows


def measures_of(record: Mapping[str, Any], epoch: EpochCounts | None) -> Measures:
    """record: what `measured_training.py` wrote; epoch: None for stock rows."""
    steps = record["steps"]
    seconds = [step["seconds"] for step in steps]
    median = statistics.median(seconds)
    tokens_per_second = statistics.fmean(step["positions"] for step in steps) / median
    targets = None if epoch is None else statistics.fmean(step["targets"] for step in steps)
    return Measures(
        step_seconds=median,
        step_spread=(_percentile(seconds, 0.9) - _percentile(seconds, 0.1)) / median,
        tokens_per_second=tokens_per_second,
        target_tokens_per_second=None if targets is None else targets / median,
        epoch_target_tokens_per_second=(
            None if epoch is None else tokens_per_second * epoch.targets / epoch.positions
        ),
        flops_per_second=record["flops_per_step"] / median,
        flops_per_second_in_pieces=record["flops_per_step_in_pieces"] / median,
        data_share=_share(steps, "host", ("data",)),
        batch_and_loss_share=_share(steps, "device", ("batch", "loss")),
        batch_and_loss_host_share=_share(steps, "host", ("batch", "loss")),
        peak_memory_bytes=record["peak_memory_bytes"],
    )


def bounds_of(
    *, sequence_length: int, mean_session_positions: float, packed: EpochCounts, split: EpochCounts
) -> Bounds:
    """What `ratios` holds the ratios of target tokens against."""
    return Bounds(
        padded=sequence_length / mean_session_positions,
        split=(split.positions / split.targets) / (packed.positions / packed.targets),
    )


def ratios(measures: Mapping[str, Measures], bounds: Bounds) -> dict[str, float]:
    """By name, those ratios of packed rows whose two variants were measured.

    `... of bound` is the ratio of target tokens a second over an epoch, divided by its bound.
    """
    packed = measures.get("packed")
    found: dict[str, float] = {}
    if packed is None:
        return found
    if "stock" in measures:
        stock = measures["stock"]
        found["packed / stock, tokens/s"] = packed.tokens_per_second / stock.tokens_per_second
        if stock.peak_memory_bytes:
            memory = packed.peak_memory_bytes / stock.peak_memory_bytes
            found["packed / stock, peak memory"] = memory
    for name, bound in (("padded", bounds.padded), ("split", bounds.split)):
        if name not in measures:
            continue
        other = measures[name]
        counted = _ratio(packed.target_tokens_per_second, other.target_tokens_per_second)
        epoch = _ratio(packed.epoch_target_tokens_per_second, other.epoch_target_tokens_per_second)
        found[f"packed / {name}, target tokens/s, rows trained"] = counted
        found[f"packed / {name}, target tokens/s, whole epoch"] = epoch
        found[f"packed / {name}, target tokens/s, of bound"] = epoch / bound
    return found


def ratio_lines(sequence_length: int, found: Mapping[str, float], bounds: Bounds) -> list[str]:
    """The ratios of one sequence length, for people."""
    notes = {
        "packed / padded, target tokens/s, of bound": (
            f"bound: seq_length / mean session length = {bounds.padded:.2f}"
        ),
        "packed / split, target tokens/s, of bound": (
            f"bound: ratio of tokens computed = {bounds.split:.2f}"
        ),
    }
    lines = [f"seq_length {sequence_length:,}"]
    for name, ratio in found.items():
        note = notes.get(name)
        lines.append(f"  {name:<50}{ratio:>9.3f}" + (f"   {note}" if note else ""))
    return lines if found else [*lines, "  no two variants to compare"]


def table_lines(
    rows: Sequence[tuple[int, str, Measures]], matmul_flops_per_second: float | None
) -> list[str]:
    """A line for each (sequence length, variant, measures)."""
    heads = "seq_length variant step_s spread tokens/s targets/s TFLOP/s of_mm in_pieces of_mm"
    heads += " data batch+loss (host) peak_GiB"
    lines = ["".join(f"{head.replace('_', ' '):>11}" for head in heads.split())]
    for sequence_length, variant, m in rows:
        targets = m.target_tokens_per_second
        cells = [
            f"{sequence_length:,}",
            variant,
            f"{m.step_seconds:.4f}",
            f"{m.step_spread:.1%}",
            f"{m.tokens_per_second:,.0f}",
            "-" if targets is None else f"{targets:,.0f}",
            f"{m.flops_per_second / 1e12:.4g}",
            _share_of(m.flops_per_second, matmul_flops_per_second),
            f"{m.flops_per_second_in_pieces / 1e12:.4g}",
            _share_of(m.flops_per_second_in_pieces, matmul_flops_per_second),
            f"{m.data_share:.2%}",
            f"{m.batch_and_loss_share:.2%}",
            f"{m.batch_and_loss_host_share:.2%}",
            f"{m.peak_memory_bytes / _GIB:.2f}" if m.peak_memory_bytes else "-",
        ]
        lines.append("".join(f"{cell:>11}" for cell in cells))
    return lines


def legend_lines() -> list[str]:
    """What the table's words mean."""
    return [
        *(f"{name:<10} {title}" for name, title in _TITLES.items()),
        "tokens/s   positions of the rows, padding too; targets/s: labels under loss",
        "TFLOP/s    by Megatron's count of whole rows; in pieces: without attention between pieces",
        "of mm      of the measured rate of matrix products",
        "data       waiting for the data loader, of the host's time",
        "batch+loss broadcast, copy, boundaries and the loss, forward: of the device's time, waits",
        "           for the host included, and of the host's; spread: 10th to 90th percentile step",
    ]


def _share(steps: Sequence[Mapping[str, Any]], clock: str, phases: Sequence[str]) -> float:
    """The median over the steps of what the phases take of the step's own forward to update."""
    return statistics.median(
        sum(step[clock][phase] for phase in phases) / sum(step[clock].values()) for step in steps
    )


def _percentile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[round(fraction * (len(ordered) - 1))]


def _ratio(ours: float | None, other: float | None) -> float:
    assert ours is not None
    assert other is not None
    return ours / other


def _share_of(rate: float, whole: float | None) -> str:
    return f"{rate / whole:.1%}" if whole else "-"
