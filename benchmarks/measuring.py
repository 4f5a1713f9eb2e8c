"""Time and memory of a piece of work, in a process of its own."""

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    value: int
    seconds: float
    gib: float  # most that the work held at a time, beyond what was there before


def in_child(work: Callable[[], int]) -> Measured:
    """Fork, run `work` and measure it there, so that each begins with the same memory."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            before = memory("VmRSS")
            started = time.perf_counter()
            value = work()
            seconds = time.perf_counter() - started
            gib = (memory("VmHWM") - before) / 2**30
            os.write(write_end, pickle.dumps(Measured(value=value, seconds=seconds, gib=gib)))
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"the measured process ended with status {status}")
    measured: Measured = pickle.loads(answer)
    return measured


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, VmHWM (its peak), RssAnon (not mapped)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "unknown processor"
