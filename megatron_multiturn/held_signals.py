"""Signals that end a command, held back until it is in a state that can be left."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """SIGINT and SIGTERM do nothing in the block, but for `release`, which lets them act.

    An exception that comes from one in the midst of multiprocessing's own code can leave a worker
    behind that nobody ends, and for which Python waits when it exits. Only in the main thread of a
    process can signals be held; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._held: list[int] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hold) for number in _ENDING_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self.release()

    def release(self) -> None:
        """Let the first signal that was held act as it would have."""
        if not self._held:
            return
        number = self._held[0]
        self._held.clear()
        handler = self._before[number]
        if callable(handler):
            handler(number, None)
        elif handler == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _hold(self, number: int, _frame: FrameType | None) -> None:
        self._held.append(number)
