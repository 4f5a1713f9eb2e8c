"""Where the time of Megatron's training steps goes, on the host and on the device.

A step is cut into phases by marks, each the host's clock and an event on the device's stream:

    data    in `next` of the data iterator
    batch   the rest of the forward step before the model: broadcast, copy, boundaries
    loss    the loss of the model's output, forward
    rest    the model, backward, the optimizer, Megatron itself

No mark waits for the device; the events are read when training has ended. A phase's time on the
device is from the first event to the second, so a device that waits for the host counts as busy.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PHASES = ("data", "batch", "loss", "rest")


@dataclass(frozen=True, slots=True)
class _Mark:
    phase: str  # that begins here
    host: float  # seconds
    event: Any  # torch.cuda.Event


@dataclass(slots=True)
class _Step:
    marks: list[_Mark] = field(default_factory=list)
    positions: int = 0
    targets: int = 0
    piece_squares: int = 0


class StepRecorder:
    """Wraps Megatron's `train_step`, and records every step of this rank.

    after_first_step: called when the first step has ended, on the device too.
    """

    def __init__(self, warmup_steps: int, after_first_step: Callable[[], None]) -> None:
        self._warmup_steps = warmup_steps
        self._after_first_step = after_first_step
        self._steps: list[_Step] = []
        self._models: set[int] = set()
        self.num_parameters = 0

    def wrap(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """`train_step`, recorded."""

        @functools.wraps(train_step)
        def recorded_step(forward_step: Any, *args: Any, **kwargs: Any) -> Any:
            if len(self._steps) == self._warmup_steps:
                torch.cuda.reset_peak_memory_stats()
            self._steps.append(_Step())
            self.mark("rest")
            result = train_step(self._wrap_forward_step(forward_step), *args, **kwargs)
            self.mark("rest")
            if len(self._steps) == 1:
                torch.cuda.synchronize()
                self._after_first_step()
            return result

        return recorded_step

    def mark(self, phase: str) -> None:
        """Here `phase` begins."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._steps[-1].marks.append(_Mark(phase, time.perf_counter(), event))

    def count_rows(self, rows: dict[str, Tensor]) -> None:
        """Add a micro-batch, as it came from the data loader, to the step's counts."""
        step = self._steps[-1]
        num_rows, length = rows["tokens"].shape
        step.positions += num_rows * length
        step.targets += int(torch.count_nonzero(rows["loss_mask"]))
        boundaries = rows.get("cu_seqlens")
        if boundaries is None:
            step.piece_squares += num_rows * length**2
        else:
            step.piece_squares += int(boundaries.long().diff(dim=1).square().sum())

    def measured_steps(self) -> list[dict[str, Any]]:
        """A record of each step after the warm-up; times in seconds.

        seconds      from the end of the step before to the end of this one, on the device
        positions    tokens of the rows
        targets      labels under loss
        piece_squares  the sum of the squared lengths of what attends to itself
        device, host   seconds by phase
        """
        torch.cuda.synchronize()
        records = []
        for before, step in zip(
            self._steps[self._warmup_steps - 1 :], self._steps[self._warmup_steps :], strict=False
        ):
            records.append(
                {
                    "seconds": _device_seconds(before.marks[-1], step.marks[-1]),
                    "positions": step.positions,
                    "targets": step.targets,
                    "piece_squares": step.piece_squares,
                    "device": _by_phase(step.marks, _device_seconds),
                    "host": _by_phase(step.marks, _host_seconds),
                }
            )
        return records

    def _wrap_forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward_step)
        def recorded_forward(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            self._watch(model)
            self.mark("batch")
            recorded = None if data_iterator is None else _RecordedRows(data_iterator, self)
            output, loss_func = forward_step(recorded, model, *args, **kwargs)
            self.mark("rest")

            @functools.wraps(loss_func)
            def recorded_loss(*args: Any, **kwargs: Any) -> Any:
                self.mark("loss")
                result = loss_func(*args, **kwargs)
                self.mark("rest")
                return result

            return output, recorded_loss

        return recorded_forward

    def _watch(self, model: Any) -> None:
        """Mark where the model begins and ends, from the first time that it is seen on."""
        if id(model) in self._models:
            return
        self._models.add(id(model))
        self.num_parameters += sum(parameter.numel() for parameter in model.parameters())
        model.register_forward_pre_hook(lambda *_: self.mark("rest"))
        # What a forward step does between the model and its return belongs to the loss.
        model.register_forward_hook(lambda *_: self.mark("loss"))


class _RecordedRows:
    """The data iterator of one forward step."""

    def __init__(self, rows: Iterator[dict[str, Tensor]], recorder: StepRecorder) -> None:
        self._rows = rows
        self._recorder = recorder

    def __iter__(self) -> "_RecordedRows":
        return self

    def __next__(self) -> dict[str, Tensor]:
        self._recorder.mark("data")
        rows = next(self._rows)
        # Counting is the benchmark's own work, alike in every variant.
        self._recorder.mark("rest")
        self._recorder.count_rows(rows)
        self._recorder.mark("batch")
        return rows


def _device_seconds(begin: _Mark, end: _Mark) -> float:
    return float(begin.event.elapsed_time(end.event)) / 1e3


def _host_seconds(begin: _Mark, end: _Mark) -> float:
    return end.host - begin.host


def _by_phase(marks: list[_Mark], seconds: Callable[[_Mark, _Mark], float]) -> dict[str, float]:
    spent = dict.fromkeys(PHASES, 0.0)
    for begin, end in itertools.pairwise(marks):
        spent[begin.phase] += seconds(begin, end)
    return spent
