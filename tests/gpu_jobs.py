"""Whole training runs for the GPU tests: one small model, on one GPU or two, all at once.

A run takes long to start and seconds to train, so all of them start together and share the GPUs.
With the environment variable GPU_JOBS_ON_CPU=1 they run one after the other on a machine without
a GPU: that shows that they work, and nothing of a GPU.

Every global batch is the whole data set (`layout_sessions`), for any multiple of up to 8 that
pieces are rounded up to. So all runs train on the same turns in every step, also those whose rows
are packed otherwise because Transformer Engine's ranks share every piece.
"""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from layout_reference import all_sessions, data_flags
from layout_sessions import NUM_ROWS, SEED, SEQUENCE_LENGTH
from megatron_jobs import SCRIPT, TRAINING_FLAGS, JobResult, read_record, run_ranks
from torch import Tensor

from megatron_multiturn.recording import Part, save_parts

ON_CPU = os.environ.get("GPU_JOBS_ON_CPU") == "1"
TRAINING_STEPS = 3

_ROOT = Path(__file__).resolve().parent.parent
_LINES_OF_LOG = 30
_LINES_OF_CHECK = 70  # torchrun adds some 35 of its own
_TIMEOUT_SECONDS = 240.0

_LAYERS, _HIDDEN, _HEADS, _GROUPS, _HEAD_SIZE, _INNER = 2, 128, 4, 2, 64, 192
_PADDED_VOCABULARY = 128
_MODEL_FLAGS = (
    f"--num-layers {_LAYERS} --hidden-size {_HIDDEN} --ffn-hidden-size {_INNER} "
    f"--num-attention-heads {_HEADS} --kv-channels {_HEAD_SIZE} --group-query-attention "
    f"--num-query-groups {_GROUPS} --position-embedding-type rope --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    f"--attention-dropout 0 --hidden-dropout 0 --seq-length {SEQUENCE_LENGTH} "
    f"--max-position-embeddings {SEQUENCE_LENGTH} --make-vocab-size-divisible-by 32 "
    f"--global-batch-size {NUM_ROWS} --seed {SEED}"
)
_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asks for it on this hardware
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else every rank starts one a core
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training run; `flags` are those beside the model's and the data's."""

    flags: str
    num_ranks: int = 1
    num_steps: int = TRAINING_STEPS
    script: Path = SCRIPT
    env: Mapping[str, str] = field(default_factory=dict)


class RunningJobs:
    """Runs that have been started; each is waited for when its result is asked for."""

    def __init__(self, folder: Path, jobs: Mapping[str, Job], checks: Mapping[str, Job]) -> None:
        """jobs: training runs. checks: their flags go to the selfcheck in place of a training."""
        self._folder = folder
        # Made by this thread, before others ask for them.
        initial_parameters()
        data_flags()
        # The server of processes that starts ranks on the CPU is not made for several threads.
        self._pool = ThreadPoolExecutor(1 if ON_CPU else len(jobs) + len(checks))
        self._training: dict[str, Future[JobResult]] = {
            name: self._pool.submit(self._train, name, job) for name, job in jobs.items()
        }
        self._checks: dict[str, Future[str]] = {
            name: self._pool.submit(self._check, name, job) for name, job in checks.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def result(self, name: str) -> JobResult:
        """What the run recorded; AssertionError with the end of a rank's log if it failed."""
        return self._training[name].result()

    def log(self, name: str) -> str:
        """What rank 0 of a run that has ended wrote."""
        return (self._folder / name / "rank-0.log").read_text(encoding="utf-8")

    def check_output(self, name: str) -> str:
        """What a selfcheck that passed wrote; AssertionError with the end of it if it did not."""
        return self._checks[name].result()

    def _train(self, name: str, job: Job) -> JobResult:
        folder = self._folder / name
        arguments = [str(job.script), *_flags(job), "--data-cache-path", str(folder / "cache")]
        env = {
            **_ENVIRONMENT,
            "RECORD_DIR": str(folder),
            "INITIAL_PARAMETERS": str(initial_parameters()),
            **job.env,
        }
        try:
            run_ranks(arguments, job.num_ranks, env, folder, timeout=_TIMEOUT_SECONDS)
        except AssertionError as error:
            raise AssertionError(_end(f"{name} {error}", _LINES_OF_LOG)) from None
        return read_record(folder, job.num_steps)

    def _check(self, name: str, job: Job) -> str:
        folder = self._folder / name
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(job.num_ranks), "-m", "megatron_multiturn.selfcheck"]
        command += [*_flags(job), "--data-cache-path", str(folder / "cache")]
        command += ["--check-folder", str(folder / "check"), "--check-micro-batches", "0"]
        with subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **_ENVIRONMENT, **job.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun then ends its ranks, which it could not if killed
                output, _ = process.communicate()
        if process.returncode:
            message = f"{name} ended with {process.returncode}:\n{output}"
            raise AssertionError(_end(message, _LINES_OF_CHECK))
        return output


def _flags(job: Job) -> list[str]:
    length = ["--train-iters", str(job.num_steps)]
    return [*TRAINING_FLAGS, *_MODEL_FLAGS.split(), *length, *data_flags(), *job.flags.split()]


def _end(text: str, num_lines: int) -> str:
    """The first line, which says what failed, and the last ones."""
    first, *lines = text.splitlines()
    return "\n".join([first, *lines[-num_lines:]])


@functools.cache
def counts() -> dict[str, int]:
    """What there is in a global batch, by the name in the log."""
    turns = [turn for session in all_sessions() for turn in session.turns]
    return {"turns": len(turns), "target tokens": sum(map(len, turns))}


@functools.cache
def initial_parameters() -> Path:
    """A recording of what every run begins with; no norm is 1.

    The names and shapes are those of a checkpoint of Megatron's, with Transformer Engine and
    without.
    """
    layer = "decoder.layers."
    qkv = (_HEADS + 2 * _GROUPS) * _HEAD_SIZE
    matrices = {
        "embedding.word_embeddings.weight": (_PADDED_VOCABULARY, _HIDDEN),
        layer + "self_attention.linear_qkv.weight": (_LAYERS, qkv, _HIDDEN),
        layer + "self_attention.linear_proj.weight": (_LAYERS, _HIDDEN, _HEADS * _HEAD_SIZE),
        layer + "mlp.linear_fc1.weight": (_LAYERS, 2 * _INNER, _HIDDEN),
        layer + "mlp.linear_fc2.weight": (_LAYERS, _HIDDEN, _INNER),
        "output_layer.weight": (_PADDED_VOCABULARY, _HIDDEN),
    }
    norms = {
        layer + "self_attention.linear_qkv.layer_norm_weight": (_LAYERS, _HIDDEN),
        layer + "mlp.linear_fc1.layer_norm_weight": (_LAYERS, _HIDDEN),
        "decoder.final_layernorm.weight": (_HIDDEN,),
    }
    generator = torch.Generator().manual_seed(1)
    parts = []
    for name, shape in (matrices | norms).items():
        tensor = 0.1 * torch.randn(shape, generator=generator) + (name in norms)
        begin = (0,) * len(shape)
        parts.append(
            Part(name=name, whole_shape=shape, begin=begin, end=shape, data=tensor, is_main=True)
        )
    folder = tempfile.TemporaryDirectory()
    _folders.append(folder)
    save_parts(Path(folder.name), parts, rank=0)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []  # they last as long as the process


def deviations(ours: JobResult, theirs: JobResult) -> dict[str, float]:
    """How far apart two runs are, relative to the second; the largest over all steps.

    Of every loss that both report; `grad norm`, of the gradient of all parameters together; and
    `gradient`, the distance between the two gradients of the first step, where the parameters are
    still the same. NaN if anything is.
    """
    names = [n for n in ("lm loss", "token loss") if n in ours.losses[0] and n in theirs.losses[0]]
    assert names
    found: dict[str, float] = {
        name: _largest(
            [(a[name] - b[name]) / b[name] for a, b in zip(ours.losses, theirs.losses, strict=True)]
        )
        for name in names
    }
    ours_by_step, theirs_by_step = map(_flat_gradients, (ours, theirs))
    found["grad norm"] = _largest(
        [float(a.norm() / b.norm() - 1) for a, b in zip(ours_by_step, theirs_by_step, strict=True)]
    )
    found["gradient"] = float((ours_by_step[0] - theirs_by_step[0]).norm())
    found["gradient"] /= float(theirs_by_step[0].norm())
    return found


def _flat_gradients(result: JobResult) -> list[Tensor]:
    """Of each step: the gradients of all parameters, float64, one after the other by name."""
    return [
        torch.cat([gradients[name].flatten() for name in sorted(gradients)])
        for gradients in result.gradients
    ]


def _largest(differences: Sequence[float]) -> float:
    assert differences
    return float(torch.tensor(differences, dtype=torch.float64).abs().max())  # NaN if one is
