"""Work done in a child process that is forked anew once it has grown.

What a library keeps of all that it has seen goes with the process that it was seen in, in no time,
and what was there before the first fork is shared by all.
"""

import multiprocessing
import os
import pickle
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

_PARENT_CHECK_SECONDS = 1.0
# What an answer begins with.
_DONE, _FAILED = b"d", b"f"


class RenewedProcess:
    """Calls a function in a child of this process."""

    def __init__(self, function: Callable[[Any], Any], has_grown: Callable[[], bool]) -> None:
        """has_grown: asked in the child after each call, whether another shall take its place."""
        self._function = function
        self._has_grown = has_grown
        self._child: Connection | None = None
        self._pid = 0

    def call(self, argument: Any) -> bytes:
        """What the function returns, pickled; raises what it raises.

        If the child is killed, this process ends too.
        """
        if self._child is None:
            self._fork()
        assert self._child is not None
        try:
            self._child.send(argument)
            answer = self._child.recv_bytes()
            is_last = self._child.recv_bytes() == b"last"
        except (EOFError, OSError):
            os._exit(1)
        if is_last:
            self._child.close()
            self._child = None
            os.waitpid(self._pid, 0)
        if answer.startswith(_FAILED):
            raise pickle.loads(answer[1:])
        return answer[1:]

    def _fork(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            # The other thread does nothing but look whether the parent is there.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if not self._pid:
            ours.close()
            self._serve(theirs)
        theirs.close()
        self._child = ours

    def _serve(self, connection: Connection) -> NoReturn:
        """Answer calls until the parent is gone, or this process has grown."""
        try:
            watch_parent(os.getppid())
            is_last = False
            while not is_last:
                argument = connection.recv()
                try:
                    answer = _DONE + pickle.dumps(self._function(argument), protocol=5)
                except BaseException as error:  # a panic of a Rust library is no Exception
                    error.add_note(traceback.format_exc())
                    answer = _FAILED + pickle.dumps(error)
                is_last = self._has_grown()
                connection.send_bytes(answer)
                connection.send_bytes(b"last" if is_last else b"")
        except (EOFError, OSError):
            pass
        finally:
            os._exit(0)


def watch_parent(parent: int) -> None:
    """End this process with its parent: a killed one cannot end what it has begun."""
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)
