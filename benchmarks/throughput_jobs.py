"""Runs of `measured_training.py` one after the other, each ready to begin when its turn comes.

Importing Megatron takes longer than many a measurement. So the next run starts together with the
one whose turn it is, and waits for its own turn when it has imported everything; no step is
measured before it waits.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 0.05
_IMPORT_SECONDS = 180
_LINES_OF_LOG = 30


class JobError(Exception):
    """What a run that did not end well had to say."""


class _Child:
    """The process of a job. The paths go without endings."""

    def __init__(
        self, command: Sequence[str], *, warmup_steps: int, work_path: Path, log_path: Path
    ) -> None:
        self.result = Path(f"{work_path}.json")
        self._imported = Path(f"{work_path}.json.imported")  # the child makes it
        self._log = Path(f"{log_path}.log")
        program = str(Path(__file__).with_name("measured_training.py"))
        options = ["--in-turn", "--warmup-steps", str(warmup_steps)]
        path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, program, *options, str(self.result), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"},
            )

    def wait_until_imported(self) -> None:
        """Returns also when the process has ended, or takes too long."""
        deadline = time.monotonic() + _IMPORT_SECONDS
        while not self._imported.exists() and self.process.poll() is None:
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)

    def may_go_on(self) -> None:
        """Let it past the line that it waits for next, or will wait for."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit status will say that it has failed
            self.process.stdin.write("go on\n")
            self.process.stdin.flush()

    def wait(self, deadline: float) -> Path:
        """The path of its result; JobError with the end of its log if there is none."""
        try:
            status = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            raise JobError(f"took too long and was ended (--timeout); {self._tail()}") from None
        if status or not self.result.is_file():
            raise JobError(f"exit status {status}; {self._tail()}")
        return self.result

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the end of {self._log}:", *lines[-_LINES_OF_LOG:]])


def run_in_turn(
    commands: Mapping[str, Sequence[str]],
    *,
    work_folder: Path,
    log_folder: Path,
    warmup_steps: int,
    timeout: float,
) -> Iterator[tuple[str, Path | JobError]]:
    """Each job's name with the path of its result, or with its failure, as it ends.

    commands: by the name of the job, a file name, what `measured_training.py` is to train:
        [SCRIPT.py] and flags.
    timeout: seconds for one job from its turn on.
    """

    def start(name: str) -> _Child:
        return _Child(
            commands[name],
            warmup_steps=warmup_steps,
            work_path=work_folder / name,
            log_path=log_folder / name,
        )

    names = list(commands)
    children = [start(name) for name in names[:1]]
    try:
        for index, name in enumerate(names):
            deadline = time.monotonic() + timeout
            child = children[index]
            child.may_go_on()
            if index + 1 < len(names):
                children.append(start(names[index + 1]))
                children[-1].wait_until_imported()
            child.may_go_on()
            outcome: Path | JobError
            try:
                outcome = child.wait(deadline)
            except JobError as failure:
                outcome = failure
            child.end()
            yield name, outcome
    finally:
        for child in children:
            child.end()
