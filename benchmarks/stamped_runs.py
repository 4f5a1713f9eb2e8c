"""Commands as their user sees them: when each line came, how long it took, how much memory."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import psutil

_SAMPLE_SECONDS = 0.2
_LINES_OF_LOG = 20


class CommandError(Exception):
    """A command that failed, with the end of what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of output; seconds since the start of the command."""

    seconds: float
    is_error: bool  # it came on stderr
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StampedRun:
    """What a command did."""

    seconds: float
    lines: tuple[Line, ...]  # in the order in which they came
    peak_bytes: int  # of all its processes together, each shared page counted once; 0: not asked
    peak_rss: int  # the same with shared pages counted in every process that has them

    def first(self, beginning: str) -> Line | None:
        """The first line that begins like this, white space aside."""
        found = (line for line in self.lines if line.text.strip().startswith(beginning))
        return next(found, None)

    def first_of_stderr(self) -> float:
        """Seconds to the first line on stderr; as long as the run if there is none."""
        return next((line.seconds for line in self.lines if line.is_error), self.seconds)


def run_stamped(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, memory: bool = False
) -> StampedRun:
    """Run to the end; CommandError if the exit status is not 0.

    environment: beside this process's own; memory: sample it, which takes some time itself.
    """
    lines: list[Line] = []
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )

    def read(stream: IO[str], is_error: bool) -> None:
        for text in stream:
            seconds = time.perf_counter() - started
            lines.append(Line(seconds=seconds, is_error=is_error, text=text.rstrip("\n")))

    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=read, args=(process.stdout, False)),
        threading.Thread(target=read, args=(process.stderr, True)),
    ]
    for reader in readers:
        reader.start()
    try:
        peak_bytes, peak_rss = _watch_memory(process) if memory else (0, 0)
        process.wait()
        seconds = time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()
    if process.returncode:
        said = "\n".join(line.text for line in lines[-_LINES_OF_LOG:])
        raise CommandError(f"{' '.join(command)}: exit status {process.returncode}\n{said}")
    lines.sort(key=lambda line: line.seconds)
    return StampedRun(seconds=seconds, lines=tuple(lines), peak_bytes=peak_bytes, peak_rss=peak_rss)


def _watch_memory(process: subprocess.Popen[str]) -> tuple[int, int]:
    """The most bytes that it and its children held together, until it ends: (PSS, RSS)."""
    parent = psutil.Process(process.pid)
    peak_bytes = peak_rss = 0
    while process.poll() is None:
        pss = rss = 0
        with contextlib.suppress(psutil.Error):
            for one in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    memory = one.memory_full_info()
                    pss += memory.pss
                    rss += memory.rss
        peak_bytes, peak_rss = max(peak_bytes, pss), max(peak_rss, rss)
        time.sleep(_SAMPLE_SECONDS)
    return peak_bytes, peak_rss
