"""Bounds on the processor time and the memory of what strangers' templates do.

Three bounds, from the mildest: code that runs for too long is stopped by an exception, and so is
code that wants too much memory. Only a single call of Python's own that never comes back, such as
a comparison of lists that hold each other a thousandfold, cannot be stopped from within: then the
process ends, after its stack is written to stderr.

Setting bounds costs system calls, so `bounded` is for a batch and `bounded_session` for each
session in it.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

MAX_SECONDS = 5.0  # of processor time, for all renderings of a session
MAX_MEMORY_BYTES = 1 << 30  # beyond what the process has
_MAX_STUCK_SECONDS = 10.0  # without a step of Python
_TICK_SECONDS = 0.25


class TemplateLimitError(BaseException):
    """A template took too much. No Exception, which code under way might catch."""


@dataclass(slots=True)
class _Clock:
    """Counts ticks of processor time; the process has one, as it has one such timer."""

    ticks: int = 0
    deadline: int | None = None  # in ticks, of the session at hand
    is_running: bool = False

    def tick(self, _number: int, _frame: FrameType | None) -> None:
        self.ticks += 1
        signal.setitimer(signal.ITIMER_PROF, _MAX_STUCK_SECONDS)
        if self.deadline is not None and self.ticks > self.deadline:
            self.deadline = self.ticks + 1  # once more, if what runs there lets nothing through
            raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:g} s")


_clock = _Clock()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound the memory, and the time between two steps of Python; may be nested.

    Time is only bound in a process's main thread.
    """
    if _clock.is_running:
        yield
        return
    _clock.is_running = True
    try:
        with _bound_memory(), _running_clock():
            yield
    finally:
        _clock.is_running = False


@contextlib.contextmanager
def bounded_session() -> Iterator[None]:
    """Bound what is done for one session too; TemplateLimitError."""
    with bounded():
        _clock.deadline = _clock.ticks + round(MAX_SECONDS / _TICK_SECONDS)
        try:
            yield
        except MemoryError:
            raise TemplateLimitError(f"it takes {MAX_MEMORY_BYTES:,} bytes of memory") from None
        finally:
            _clock.deadline = None


@contextlib.contextmanager
def _bound_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as stream:
        held = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    bounds = [held + MAX_MEMORY_BYTES]
    bounds += [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _running_clock() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _clock.tick)
    last_before = signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Writes the stack without running Python, then does as SIG_DFL says.
    faulthandler.register(signal.SIGPROF, file=sys.__stderr__ or 2, all_threads=False, chain=True)
    signal.setitimer(signal.ITIMER_PROF, _MAX_STUCK_SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, _TICK_SECONDS, _TICK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.unregister(signal.SIGPROF)
        signal.signal(signal.SIGPROF, last_before)
        signal.signal(signal.SIGVTALRM, before)
