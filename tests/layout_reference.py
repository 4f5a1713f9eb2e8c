"""What a model must compute on the layout tests' data, and how far a job is from it.

Oracle runs and data are made once a test process and kept until it ends.
"""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from layout_sessions import NUM_ROWS, write_layout_sessions
from layouts import ADAM, LOGGED_TURNS, MODELS, STEPS, Layout, random_parameters
from megatron_jobs import SCRIPT, JobResult, relative_difference, train_and_record
from oracle import AdamSettings, OracleResult, Parameters, Session, read_sessions, train

from megatron_multiturn.recording import Part, Recording, save_parts

# The largest relative error allowed: of a tensor in the Euclidean norm, of a number in the log.
GRADIENT_TOLERANCE = 5e-6  # float32 reaches 2.6e-6 in the third step, 1.1e-6 in the first
PARAMETER_TOLERANCE = 1e-6  # 3.1e-7
MOVE_TOLERANCE = 1e-5  # 5.6e-6: a norm's weight near 1 that moves by 1e-2 is rounded to 6e-8
REPORT_TOLERANCE = 5e-7  # 2.0e-7
REPORTED = ["lm loss", "token loss", "turns", "target tokens"]
REPORTED += [f"turn {index} loss" for index in range(1, LOGGED_TURNS + 1)]


@functools.cache
def data_flags() -> list[str]:
    """The flags with which a job trains on the data; `--data-path` is last."""
    return write_layout_sessions(_kept_folder())


@functools.cache
def all_sessions() -> list[Session]:
    """The data, which every global batch of 16 rows holds."""
    return read_sessions(data_flags()[-1])


@functools.cache
def initial_parameters(model: str) -> tuple[Parameters, Path]:
    """What all jobs of a model begin with, and the recording of it that they load."""
    parameters, folder = random_parameters(MODELS[model].shape), _kept_folder()
    save_parts(folder, [_whole(name, tensor) for name, tensor in parameters.items()], rank=0)
    return parameters, folder


def oracle_of(
    model: str,
    batches: Sequence[Sequence[Session]],
    *,
    average: str = "turn",
    adam: AdamSettings = ADAM,
) -> OracleResult:
    """What the oracle makes of these batches."""
    result = train(initial_parameters(model)[0], MODELS[model].shape, batches, adam, average)
    # Where two experts are nearly alike to a token, float32 may take the other one.
    assert result.routing_margin > 3e-5
    return result


@functools.cache
def reference(model: str) -> OracleResult:
    """What the oracle makes of all data in every step."""
    return oracle_of(model, [all_sessions()] * STEPS)


def run_layout(
    folder: Path,
    layout: Layout,
    *,
    flags: Sequence[str] = (),
    batch_flags: Sequence[str] = ("--global-batch-size", str(NUM_ROWS)),
    num_rows: int | None = None,
    balance: bool = False,
    script: Path = SCRIPT,
    env: Mapping[str, str] | None = None,
) -> JobResult:
    """A job of `STEPS` steps, or until `num_rows` are trained, that records into `folder`.

    balance: put the rows in balanced order, not in the one that test_layout_sessions.py knows.
    Its ranks must end with the same parameters and gradients, where they hold the same.
    """
    if 0 < torch.cuda.device_count() < layout.num_ranks:
        pytest.skip(f"needs {layout.num_ranks} GPUs")
    order = [] if balance else ["--no-balance-data-parallel"]
    result = train_and_record(
        folder,
        [*layout.flags, *batch_flags, *data_flags(), *order, *flags],
        train_iters=STEPS,
        train_samples=num_rows,
        num_ranks=layout.num_ranks,
        env={"INITIAL_PARAMETERS": str(initial_parameters(layout.model)[1]), **(env or {})},
        model_flags=(),
        script=script,
    )
    for name in [*(f"gradients-{step}" for step in range(STEPS)), "parameters"]:
        assert Recording(folder / name).replica_difference()[0] < GRADIENT_TOLERANCE
    return result


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a job is from the oracle: the largest relative error of any tensor or number."""

    gradients: list[float]  # one a step, before its update
    parameters: float  # after the last step
    moves: float  # of where the parameters went, from the first step to the last
    reports: dict[str, list[float]]  # by the name in the log, one a step


def errors(result: JobResult, expected: OracleResult, model: str) -> Errors:
    initial = initial_parameters(model)[0]
    moves = [
        {name: after[name] - before for name, before in initial.items()}
        for after in (result.parameters, expected.parameters)
    ]
    return Errors(
        gradients=[
            relative_difference(ours, theirs)
            for ours, theirs in zip(result.gradients, expected.gradients, strict=True)
        ],
        parameters=relative_difference(result.parameters, expected.parameters),
        moves=relative_difference(*moves),
        reports={
            name: [
                abs(ours[name] / theirs[name] - 1)
                for ours, theirs in zip(result.losses, expected.reports, strict=True)
            ]
            for name in REPORTED
        },
    )


def assert_agrees(found: Errors) -> None:
    """All of it within tolerance; else a failure that shows all numbers."""
    agrees = all(error < GRADIENT_TOLERANCE for error in found.gradients)
    agrees &= found.parameters < PARAMETER_TOLERANCE
    agrees &= found.moves < MOVE_TOLERANCE
    agrees &= all(error < REPORT_TOLERANCE for of in found.reports.values() for error in of)
    assert agrees, found


def _whole(name: str, tensor: torch.Tensor) -> Part:
    """A whole tensor as the one part of itself."""
    shape = tuple(tensor.shape)
    begin = (0,) * len(shape)
    return Part(name=name, whole_shape=shape, begin=begin, end=shape, data=tensor, is_main=True)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _kept_folder() -> Path:
    """A folder that lasts as long as the process."""
    _folders.append(tempfile.TemporaryDirectory())
    return Path(_folders[-1].name)
