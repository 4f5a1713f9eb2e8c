"""One run of Megatron's training, with its steps measured; the child of `train_throughput.py`.

    python benchmarks/measured_training.py RESULT.json [SCRIPT.py] MEGATRON'S FLAGS...

Trains as `python -m megatron_multiturn [SCRIPT.py] FLAGS...` does, in this one process, and writes
RESULT.json (see `measure`). With --in-turn it waits for others: it imports all that it needs,
makes the file RESULT.json.imported and reads a line before it takes the device; and it reads
another one after the first step, so that nobody imports while steps are measured.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import socket
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from step_recorder import StepRecorder

from megatron_multiturn import cpu
from megatron_multiturn.__main__ import run, split_script

# All the modules that take long to import, with or without Transformer Engine.
_IMPORTED_EARLY = ("megatron.training", "megatron.training.training", "megatron_multiturn.forward")
_MATMUL_SIZE = 8192
_MATMUL_SIZE_ON_CPU = 256
_MATMUL_REPEATS = 9
_MATMUL_PRODUCTS = 20  # a repeat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--warmup-steps", type=int, default=3, help="steps that are not measured")
    parser.add_argument("--in-turn", action="store_true", help="wait for lines on stdin, see above")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="[SCRIPT.py] FLAGS...")
    args = parser.parse_args()
    on_cpu = cpu.is_needed()
    _import_early(args.command, on_cpu=on_cpu)
    if args.in_turn:
        args.result.with_name(args.result.name + ".imported").touch()
        _wait_for_line()
    _be_the_only_rank()
    record = measure(
        args.command,
        warmup_steps=args.warmup_steps,
        after_first_step=_wait_for_line if args.in_turn else lambda: None,
        on_cpu=on_cpu,
    )
    unfinished = args.result.with_name(args.result.name + ".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(args.result)


def measure(
    command: list[str], *, warmup_steps: int, after_first_step: Any, on_cpu: bool
) -> dict[str, Any]:
    """Train by `command`, [SCRIPT.py] and flags; the record of the run.

    steps                     see `StepRecorder.measured_steps`
    flops_per_step            Megatron's count for a step of whole rows
    flops_per_step_in_pieces  the same for the pieces that attend to themselves, in the mean
    num_parameters, peak_memory_bytes (since the warm-up), matmul_flops_per_second (None: no room)
    device, versions          in words
    """
    recorder = StepRecorder(warmup_steps, after_first_step)

    def hook(_: bool) -> None:
        from megatron.training import training

        training.train_step = recorder.wrap(training.train_step)

    run(command, after_hooks=hook)

    from megatron.training import get_args, training

    args = get_args()
    steps = recorder.measured_steps()
    if len(steps) != args.train_iters - warmup_steps:
        raise RuntimeError(f"{len(steps)} steps were measured of {args.train_iters} trained")
    squares = [step["piece_squares"] for step in steps]
    peak_memory = torch.cuda.max_memory_allocated()
    batch_size = args.global_batch_size
    return {
        "steps": steps,
        "flops_per_step": training.num_floating_point_operations(args, batch_size),
        "flops_per_step_in_pieces": training.num_floating_point_operations(
            args, batch_size, seqlen_squared_sum_in_batch=statistics.fmean(squares)
        ),
        "num_parameters": recorder.num_parameters,
        "peak_memory_bytes": peak_memory,
        "matmul_flops_per_second": matmul_flops_per_second(on_cpu=on_cpu),
        "device": torch.cuda.get_device_name(),
        "versions": _versions(),
    }


def matmul_flops_per_second(*, on_cpu: bool) -> float | None:
    """The rate of square matrix products of random numbers, bfloat16 on a GPU; the median.

    None where the device has no memory left for them.
    """
    size, dtype = (_MATMUL_SIZE_ON_CPU, torch.float32) if on_cpu else (_MATMUL_SIZE, torch.bfloat16)
    torch.cuda.empty_cache()
    try:
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
    except torch.OutOfMemoryError:
        return None
    seconds = []
    for _ in range(_MATMUL_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_MATMUL_PRODUCTS):
            torch.matmul(a, b, out=out)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * size**3 * _MATMUL_PRODUCTS / statistics.median(seconds)


def _import_early(command: list[str], *, on_cpu: bool) -> None:
    if on_cpu:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as the stand-in sets it, but before the imports
    script, _ = split_script(command)
    if script is not None:
        sys.path.insert(0, str(script.resolve().parent))  # its own Megatron, as in the run
    for name in _IMPORTED_EARLY:
        importlib.import_module(name)


def _wait_for_line() -> None:
    if not sys.stdin.readline():
        raise SystemExit("the benchmark ended before this run's turn")


def _be_the_only_rank() -> None:
    """What torchrun would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name need not resolve


def _versions() -> dict[str, str]:
    from megatron.core import __version__ as megatron_version

    versions = {
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "megatron-core": megatron_version,
    }
    for package in ("transformer-engine", "transformer-engine-torch"):
        try:
            versions["Transformer Engine"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        break
    return versions


if __name__ == "__main__":
    main()
