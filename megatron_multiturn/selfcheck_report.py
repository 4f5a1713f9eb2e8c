"""The selfcheck's verdict and how it is shown, from the report that the reference has written."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Counts are whole numbers that both runs add up in floating point.
_COUNTS = ("turns", "target tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The largest relative differences that rounding explains."""

    loss: float
    norm: float  # of the whole gradient
    gradient: float  # of any one parameter
    count: float = 1e-6
    weights: float = 1e-9  # of ranks that hold the same ones


# Where the objective is wrong, the differences are of the size 0.01 to 1. Rounding makes those of
# float32 1e-8 to 1e-5, and of bfloat16 1e-4 to 1e-2 with the gradients of single parameters last.
# The two runs may send a token to other experts if the router's scores are equal within rounding,
# which is seen in the gradients of these experts.
_DENSE = {
    "float32": Tolerance(loss=1e-5, norm=1e-4, gradient=1e-4),
    "bfloat16": Tolerance(loss=5e-3, norm=2e-2, gradient=1e-1),
    "float16": Tolerance(loss=1e-3, norm=5e-3, gradient=3e-2),
}
_EXPERTS = {
    "float32": Tolerance(loss=1e-4, norm=1e-3, gradient=1e-2),
    "bfloat16": Tolerance(loss=1e-2, norm=5e-2, gradient=5e-1),
    "float16": Tolerance(loss=2e-3, norm=1e-2, gradient=1e-1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One comparison; `layout` and `reference` are None where only a difference is known."""

    name: str
    layout: float | None = None
    reference: float | None = None
    difference: float
    allowed: float
    remark: str = ""

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed  # never so if it is no number


def tolerance(layout: Mapping[str, Any]) -> Tolerance:
    """What is allowed for a job of this layout."""
    return (_EXPERTS if layout["num_experts"] else _DENSE)[layout["dtype"]]


def compared_lines(report: Mapping[str, Any]) -> list[list[Line]]:
    """The comparisons of each global batch, those of the weights with the first."""
    allowed = tolerance(report["layout"])
    batches = [list(_batch_lines(batch, allowed)) for batch in report["batches"]]
    difference, name = report["weights"]
    if difference > allowed.weights:
        batches[0].insert(0, _replica_line("weights", difference, name, allowed.weights))
    return batches


def _batch_lines(batch: Mapping[str, Any], allowed: Tolerance) -> Iterator[Line]:
    for name, (layout, reference) in batch["quantities"].items():
        limit = allowed.count if name in _COUNTS else allowed.loss
        limit = allowed.norm if name == "grad norm" else limit
        yield Line(
            name=name,
            layout=layout,
            reference=reference,
            difference=_relative(layout, reference),
            allowed=limit,
        )
    gradients = batch["gradients"]
    name, difference = gradients["worst"][0]
    yield Line(
        name="gradients",
        difference=difference,
        allowed=allowed.gradient,
        remark=f"largest of {gradients['num_parameters']:,}: {name}",
    )
    difference, name = gradients["replicas"]
    if difference > allowed.gradient:
        yield _replica_line("gradients", difference, name, allowed.gradient)


def _replica_line(what: str, difference: float, name: str, allowed: float) -> Line:
    return Line(
        name="replicas",
        difference=difference,
        allowed=allowed,
        remark=f"ranks that hold the same {what} disagree: {name}",
    )


def _relative(value: float, reference: float) -> float:
    difference = abs(value - reference)
    if math.isnan(difference):
        return 0.0 if math.isnan(value) and math.isnan(reference) else math.nan
    return difference / abs(reference) if difference and reference else difference


def passed(report: Mapping[str, Any]) -> bool:
    """Whether every comparison is within its tolerance."""
    return all(line.passed for lines in compared_lines(report) for line in lines)


def describe_layout(layout: Mapping[str, Any]) -> str:
    """`8 ranks: DP 2 x TP 2 (sequence parallel) x PP 2, ...`."""
    sizes = [
        f"{short} {layout[f'{name}_parallel_size']}"
        for short, name in (("DP", "data"), ("TP", "tensor_model"), ("PP", "pipeline_model"))
        if name == "data" or layout[f"{name}_parallel_size"] > 1
    ]
    if layout["sequence_parallel"]:
        sizes[1] += " (sequence parallel)"
    if layout["virtual_stages"] > 1:
        sizes[-1] += f" ({layout['virtual_stages']} virtual stages)"
    if layout["context_parallel_size"] > 1:
        sizes.append(f"CP {layout['context_parallel_size']}")
    parts = [" x ".join(sizes)]
    if layout["num_experts"]:
        parts.append(f"{layout['num_experts']} experts, EP {layout['expert_model_parallel_size']}")
    if layout["distributed_optimizer"]:
        parts.append("distributed optimizer")
    parts.append(f"micro-batches of {layout['micro_batch_size']}")
    ranks = "rank" if layout["world_size"] == 1 else "ranks"
    return f"{layout['world_size']} {ranks}: {', '.join(parts)}; {layout['device']}"


def render(report: Mapping[str, Any]) -> str:
    """The whole report as text, the verdict last."""
    layout = report["layout"]
    lines = [f"layout     {describe_layout(layout)}", "reference  1 rank, float32"]
    lines += [f"note       {notice}" for notice in layout["notices"]]
    all_compared = compared_lines(report)
    for number, (batch, compared) in enumerate(
        zip(report["batches"], all_compared, strict=True), start=1
    ):
        lines += ["", _batch_heading(number, batch)]
        lines.append(f"  {'':14}{'layout':>16}{'reference':>16}{'difference':>13}")
        lines += [_render_line(line) for line in compared]
        if not all(line.passed for line in compared):
            lines += _render_worst(batch)
    return "\n".join([*lines, "", _verdict(all_compared, tolerance(layout))])


def _batch_heading(number: int, batch: Mapping[str, Any]) -> str:
    return (
        f"batch {number}: {batch['num_rows']:,} rows, {batch['num_turns']:,.0f} turns, "
        f"{batch['num_targets']:,.0f} target tokens"
    )


def _render_line(line: Line) -> str:
    columns = ["" if v is None else f"{v:#,.7g}" for v in (line.layout, line.reference)]
    if line.name in _COUNTS:
        columns = [
            "" if v is None else f"{v:,.6f}".rstrip("0").rstrip(".")
            for v in (line.layout, line.reference)
        ]
    difference = f"{line.difference:.1e}" if line.difference > 1e-12 else "0"
    mark = "" if line.passed else f"  more than {_power(line.allowed)}"
    remark = f"  {line.remark}" if line.remark else ""
    return f"  {line.name:14}{columns[0]:>16}{columns[1]:>16}{difference:>13}{mark}{remark}"


def _power(value: float) -> str:
    """`1e-5` for 0.00001."""
    return f"{value:.0e}".replace("e-0", "e-")


def _render_worst(batch: Mapping[str, Any]) -> list[str]:
    return [
        "  the gradients that differ most:",
        *(f"    {difference:.1e}  {name}" for name, difference in batch["gradients"]["worst"]),
    ]


def _verdict(all_compared: list[list[Line]], allowed: Tolerance) -> str:
    failed = sorted({line.name for lines in all_compared for line in lines if not line.passed})
    limits = (
        f"losses within {_power(allowed.loss)}, gradient norm within {_power(allowed.norm)}, each "
        f"gradient within {_power(allowed.gradient)}"
    )
    if not failed:
        return f"PASS: the layout computes what one rank does ({limits})"
    return f"FAIL: the layout does not compute what one rank does: {', '.join(failed)} ({limits})"
