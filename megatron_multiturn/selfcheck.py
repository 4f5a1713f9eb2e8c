"""`torchrun ... -m megatron_multiturn.selfcheck [SCRIPT.py] <all the flags of the job>`.

Takes a few global batches of the job's own data through forward, backward and the reduction of
gradients, in the job's own layout; then the same rows from the same weights on one rank, by a
path that shares as little as possible with the first; and compares. Nothing is trained.

The processes that torchrun starts import no torch. The ranks of the job are their children, so
that the memory of the GPU is free again for the reference (`selfcheck_ranks`, `selfcheck_job`).
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_multiturn.errors import MultiTurnError
from megatron_multiturn.selfcheck_ranks import CouldNotRunError, Failure, Rank, read_json
from megatron_multiturn.selfcheck_report import passed, render

PASSED, FAILED, COULD_NOT_RUN = 0, 1, 2

_NAME = "megatron-multiturn-selfcheck"
_LOG_TAIL_LINES = 25


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit code: 0 passed, 1 failed, 2 could not run."""
    options, arguments = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _end)
    rank = Rank(
        number=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        folder=options.check_folder or Path(default_folder()),
    )
    try:
        rank.meet(
            {
                "num_batches": options.check_batches,
                "micro_batches": options.check_micro_batches,
                "dtype": options.check_dtype,
            }
        )
    except (MultiTurnError, OSError) as error:
        return _could_not_run(str(error))
    keep_logs = False
    try:
        code = _check(rank, arguments)
    except CouldNotRunError as error:
        code = COULD_NOT_RUN
        keep_logs = error.failure.kind not in ("user", "usage")
        if rank.number == 0:
            _could_not_run(explain(error.failure), error.failure if keep_logs else None)
    except (MultiTurnError, OSError) as error:
        code = _could_not_run(str(error))
    if rank.number and code:
        # Rank 0 ends first, and torchrun then kills the others; these have not failed.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    rank.part(keep=options.check_keep, keep_logs=keep_logs)
    return code


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this command's own flags, everything else in its order)."""
    parser = argparse.ArgumentParser(
        prog=f"torchrun ... -m {__package__}.selfcheck",
        usage="%(prog)s [SCRIPT.py] [the flags of the training job] [--check-...]",
        description="Compare a job in its own layout with the same rows on one rank: losses, "
        "gradient norm and the gradient of every parameter. Exit code 0 for PASS, 1 for FAIL, "
        "2 if the check could not run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--check-batches", type=_positive, default=2, metavar="N", help="global batches (2)"
    )
    parser.add_argument(
        "--check-micro-batches",
        type=_not_negative,
        default=4,
        metavar="N",
        help="at most so many micro-batches of each data parallel rank a global batch, rounded up "
        "to the pipeline stages; 0: as many as the job has (4)",
    )
    parser.add_argument(
        "--check-dtype",
        choices=("float32", "given"),
        default="float32",
        help="given: the job's own --bf16 or --fp16 and its kernels, with wider tolerances; the "
        "reference is in float32 in any case (float32)",
    )
    parser.add_argument(
        "--check-folder",
        type=Path,
        metavar="FOLDER",
        help="for weights, gradients and logs on the way: 4 bytes a parameter for the weights and "
        "for each batch; all nodes must share it (selfcheck-ID in the current folder)",
    )
    parser.add_argument(
        "--check-keep", action="store_true", help="keep the folder; by default it is removed"
    )
    return parser.parse_known_args(argv)


def default_folder() -> str:
    """A name in the current folder that all ranks of a job agree on, and other jobs do not."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id == "none":
        run_id = os.environ.get("MASTER_PORT") or str(os.getpid())
    return "selfcheck-" + run_id.replace(os.sep, "-")


def explain(failure: Failure) -> str:
    """What failed and what to do, in words."""
    job, rank = failure.log.stem.split("-")
    where = f"rank {rank} of the job" if job == "layout" else "the reference on one rank"
    if failure.kind == "user":
        return failure.message
    if failure.kind == "usage":
        # Megatron's parser has said what is wrong, last of all.
        last = (_tail(failure.log, 1) or [failure.message])[0]
        return last.rpartition("error: ")[2]
    if failure.kind == "memory":
        remedy = (
            "make the model smaller by appending, say, --num-layers 2 (later flags win; a "
            "multiple of the pipeline stages): the layout is what is checked"
        )
        if job == "layout":
            remedy += "; or keep the job's own precision with --check-dtype given"
        return f"{where} is out of GPU memory: {remedy}"
    message = f"{where} failed: {failure.message}"
    if "SIGKILL" in message:
        message += " (often that is the machine out of memory)"
    return message


def _check(rank: Rank, arguments: Sequence[str]) -> int:
    """Run the job, and on rank 0 the reference; returns the exit code."""
    say = print if rank.number == 0 else _say_nothing
    say(f"{_NAME}: logs in {rank.folder}", flush=True)
    start = time.monotonic()
    ranks = "1 rank" if rank.world_size == 1 else f"{rank.world_size} ranks"
    say(f"{_NAME}: the job in its own layout, {ranks} ...", flush=True)
    rank.run("layout", arguments, _layout_env(rank.folder))
    if rank.number:
        return rank.await_verdict()
    say(f"{_NAME}: ... {time.monotonic() - start:.0f} s; the reference, 1 rank ...", flush=True)
    start = time.monotonic()
    rank.run("reference", arguments, _reference_env())
    say(f"{_NAME}: ... {time.monotonic() - start:.0f} s\n", flush=True)
    report = read_json(rank.folder / "report.json")
    text = render(report)
    print(text, flush=True)
    code = PASSED if passed(report) else FAILED
    if code == FAILED:
        _tell_torchrun(text.splitlines()[-1])
    rank.give_verdict(code)
    return code


def _layout_env(folder: Path) -> dict[str, str]:
    env = dict(os.environ)
    if "WORLD_SIZE" not in env:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **_own_rendezvous()}
    if (read_json(folder / "check.json") or {}).get("dtype") == "float32":
        env |= _FULL_FLOAT32
    return env


def _reference_env() -> dict[str, str]:
    kept = {name: v for name, v in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {"LOCAL_RANK": "0", **kept, **single, **_own_rendezvous(), **_FULL_FLOAT32}


# Containers may round the factors of float32 products to 10 bits by default.
_FULL_FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0"}


def _own_rendezvous() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _could_not_run(message: str, failure: Failure | None = None) -> int:
    lines = [f"{_NAME}: could not run: {message}"]
    if failure is not None:
        lines.append(f"the end of {failure.log}:")
        lines += [f"    {line}" for line in _tail(failure.log, _LOG_TAIL_LINES)]
    print("\n".join(lines), file=sys.stderr, flush=True)
    _tell_torchrun(lines[0])
    return COULD_NOT_RUN


def _tail(log: Path, num_lines: int) -> list[str]:
    """The last lines of a log, without Megatron's own chatter."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("INFO:", "DEBUG:"))][-num_lines:]


def _tell_torchrun(message: str) -> None:
    """What torchrun shows of a failed rank, in place of its advice to enable tracebacks."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _say_nothing(*_: object, **__: object) -> None:
    """For the ranks that leave it to rank 0."""


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
