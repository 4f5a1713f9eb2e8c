"""How the processes of a selfcheck find each other and end together, by files in one folder.

torchrun starts one small process a rank, which holds no GPU memory. Each starts the rank of the
job as a child of its own; then that of rank 0 starts the reference. Whatever fails is written
into the folder, and every process ends its child when it sees that.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiturn.errors import ConfigError, MultiTurnError

_MARK = ".megatron-multiturn-selfcheck"  # in a folder that this command has made
_POLL_SECONDS = 0.2
_FOLDER_POLL_SECONDS = 1.0  # it may be on a file server, and the ranks thousands
_MEETING_SECONDS = 300.0
_ROOT_CAUSE_SECONDS = 2.0  # for the failure that caused the others to be written
_SILENCE_SECONDS = 300.0  # of rank 0 at the reference, before it is given up
_FAREWELL_SECONDS = 15.0
_FIRST_TO_END_SECONDS = 1.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What the first rank that failed has left."""

    rank: int
    kind: str  # user, usage, memory, error or died
    message: str
    log: Path


class CouldNotRunError(MultiTurnError):
    """A rank of one of the jobs failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(kw_only=True)
class Rank:
    """This process among those of the check."""

    number: int
    world_size: int
    folder: Path

    def meet(self, check: Mapping[str, Any]) -> None:
        """Make the folder ready and wait until all ranks see it.

        check: what `check.json` is to hold; that of rank 0 counts. Raises ConfigError where the
        folder is somebody else's, or not the same on all nodes.
        """
        deadline = time.monotonic() + _MEETING_SECONDS
        if self.number == 0:
            _make_ready(self.folder)
            tokens = self._await_all(deadline)
            write_json(self.folder / "check.json", {**check, "tokens": tokens})
            return
        token = uuid.uuid4().hex
        while time.monotonic() < deadline:
            # A folder of an earlier check may lie there until rank 0 has cleared it.
            found = read_json(self.folder / "check.json") or {}
            if found.get("tokens", {}).get(str(self.number)) == token:
                return
            with suppress(FileNotFoundError):
                if (self.folder / _MARK).exists() and not self._hello(self.number).exists():
                    write_json(self._hello(self.number), token)
            time.sleep(_POLL_SECONDS)
        raise ConfigError(
            f"rank {self.number} does not meet rank 0 in {self.folder.absolute()}; pass "
            "--check-folder with a folder that all nodes share, such as one in your home"
        )

    def _await_all(self, deadline: float) -> dict[str, str]:
        missing = set(range(1, self.world_size))
        tokens: dict[str, str] = {}
        while missing:
            for rank in list(missing):
                token = read_json(self._hello(rank))
                if token is not None:
                    tokens[str(rank)] = token
                    missing.remove(rank)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank {min(missing)} ({len(missing)} in all) does not come to "
                    f"{self.folder.absolute()}; pass --check-folder with a folder that all nodes "
                    "share, such as one in your home"
                )
            time.sleep(_POLL_SECONDS if missing else 0)
        return tokens

    def run(self, role: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        """Run one rank of a job to its end; raises CouldNotRunError if any rank fails."""
        log = self.folder / f"{role}-{self.number}.log"
        command = [sys.executable, "-m", "megatron_multiturn.selfcheck_job", role]
        command += [str(self.folder), *arguments]
        seen_alive = looked_around = time.time()
        with log.open("w") as output, _child(command, env, output) as child:
            while child.poll() is None:
                seen_alive = time.time()
                if seen_alive - looked_around > _FOLDER_POLL_SECONDS:
                    looked_around = seen_alive
                    if role == "reference":
                        (self.folder / "heartbeat").touch()
                    if self._failures():
                        break
                time.sleep(_POLL_SECONDS)
            if child.poll() not in (None, 0) and self.number not in self._failures():
                self._write_death(role, child.returncode, seen_alive)
        self._raise_failure()

    def await_verdict(self) -> int:
        """Wait for the exit code that rank 0 comes to."""
        last_beat, heard = -1.0, time.monotonic()
        while time.monotonic() - heard < _SILENCE_SECONDS:
            verdict = read_json(self.folder / "verdict.json")
            if verdict is not None:
                return int(verdict)
            self._raise_failure()
            beat = _modified(self.folder / "heartbeat")
            if beat != last_beat:
                last_beat, heard = beat, time.monotonic()
            time.sleep(_FOLDER_POLL_SECONDS)
        raise ConfigError(f"rank 0 has been silent for {_SILENCE_SECONDS:.0f} seconds")

    def give_verdict(self, code: int) -> None:
        """Rank 0: let the others know."""
        write_json(self.folder / "verdict.json", code)

    def part(self, *, keep: bool, keep_logs: bool) -> None:
        """Leave the folder; rank 0 waits for the others, clears it, and is the first to end.

        A launcher kills what still runs when one rank fails, and tells of the first that did.
        """
        deadline = time.monotonic() + _FAREWELL_SECONDS
        cleared = self.folder / "cleared.json"
        if self.number:
            with suppress(FileNotFoundError):
                write_json(self.folder / f"left-{self.number}.json", True)
            while (self.folder / _MARK).exists() and not cleared.exists():
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_SECONDS)
            time.sleep(_FIRST_TO_END_SECONDS)
            return
        while len(list(self.folder.glob("left-*.json"))) < self.world_size - 1:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        if not keep:
            _clear(self.folder, keep_logs=keep_logs)
        if self.folder.exists():
            write_json(cleared, True)

    def _hello(self, rank: int) -> Path:
        return self.folder / f"hello-{rank}.json"

    def _failures(self) -> dict[int, dict[str, Any]]:
        found = (read_json(path) for path in self.folder.glob("failure-*.json"))
        return {failure["rank"]: failure for failure in found if failure is not None}

    def _write_death(self, role: str, returncode: int, time_of_death: float) -> None:
        how = f"exit code {returncode}"
        if returncode < 0:
            how = f"signal {signal.Signals(-returncode).name}"
        failure = {
            "role": role,
            "rank": self.number,
            "time": time_of_death,
            "kind": "died",
            "message": f"the process ended by {how}",
        }
        write_json(self.folder / f"failure-{self.number}.json", failure)

    def _raise_failure(self) -> None:
        """Raise CouldNotRunError if any rank has failed, with the earliest failure.

        When one rank fails its peers fail soon after, and may be the first to be seen.
        """
        if not self._failures():
            return
        time.sleep(_ROOT_CAUSE_SECONDS)
        first = min(self._failures().values(), key=lambda f: (f["time"], f["rank"]))
        raise CouldNotRunError(
            Failure(
                rank=first["rank"],
                kind=first["kind"],
                message=first["message"],
                log=self.folder / f"{first['role']}-{first['rank']}.log",
            )
        )


@contextmanager
def _child(
    command: Sequence[str], env: Mapping[str, str], output: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive this one."""
    prctl = ctypes.CDLL(None).prctl

    def die_with_parent() -> None:
        prctl(_DIE_WITH_PARENT, signal.SIGKILL)

    child = subprocess.Popen(
        command, env=dict(env), stdout=output, stderr=output, preexec_fn=die_with_parent
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _make_ready(folder: Path) -> None:
    if folder.exists():
        if any(folder.iterdir()) and not (folder / _MARK).exists():
            raise ConfigError(
                f"--check-folder {folder}: it holds other things; name one that does not exist"
            )
        _clear(folder, keep_logs=False)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def _clear(folder: Path, *, keep_logs: bool) -> None:
    if not keep_logs:
        # By another name first: no rank may find a folder that is half gone.
        doomed = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        folder.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix != ".log" and path.name != _MARK:
            path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value in a file that `write_json` wrote; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that whoever sees the file sees all of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return -1.0
