"""How far a run has come: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

_SECONDS_PER_LINE = 30.0


class Progress:
    """Says how many bytes of the input are done, and how long the rest will take."""

    def __init__(self, total_bytes: int, done_bytes: int = 0) -> None:
        """done_bytes: by an earlier run."""
        self._total = total_bytes
        self._first = self._done = done_bytes
        self._sessions = 0
        self._started = time.monotonic()
        self._said = self._started
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, desc="preprocess"
            )

    def update(self, done_bytes: int, num_sessions: int) -> None:
        """done_bytes: so far; num_sessions: since the last call."""
        self._sessions += num_sessions
        step, self._done = done_bytes - self._done, done_bytes
        now = time.monotonic()
        if self._bar is not None:
            rate = self._sessions / max(now - self._started, 1e-9)
            self._bar.set_postfix_str(
                f"{self._sessions:,} sessions, {rate:,.0f} sessions/s", refresh=False
            )
            self._bar.update(step)
        elif now - self._said >= _SECONDS_PER_LINE:
            self._said = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, seconds: float) -> str:
        done = self._done - self._first
        left = (self._total - self._done) * seconds / max(done, 1)
        return (
            f"preprocess: {self._done / max(self._total, 1):.1%} of {format_bytes(self._total)}, "
            f"{self._sessions:,} sessions, {self._sessions / seconds:,.0f} sessions/s, "
            f"{done / seconds / 1e6:.1f} MB/s, {format_seconds(left)} left"
        )


def format_bytes(count: int) -> str:
    """1234567 -> 1.2 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def format_seconds(seconds: float) -> str:
    """3723.4 -> 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
