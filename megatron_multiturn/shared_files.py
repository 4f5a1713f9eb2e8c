"""Files that several processes of a run need and one of them makes.

Whoever comes first makes them under a lock; the others wait, say for whom, and then read them.
"""

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# When a process that waits says so for the first time, and how long it is silent thereafter.
_FIRST_NOTICE_SECONDS = 5.0
_NOTICE_SECONDS = 60.0
_POLL_SECONDS = 0.05


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock `path` while doing what `doing` says ("plan the train split of data").

    The holder writes who it is and what it does into the lock file, and those that wait for
    longer than a few seconds print it, once a minute. The lock goes with its process. A file
    system without locks only costs doing the work twice.
    """
    with path.open("a+") as lock:
        _wait_for(lock, path)
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()} to {doing}")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def _wait_for(lock: TextIO, path: Path) -> None:
    started = time.monotonic()
    next_notice = _FIRST_NOTICE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR):
                return
        else:
            return
        waited = time.monotonic() - started
        if waited >= next_notice:
            lock.seek(0)
            holder = lock.read() or "another process"
            print(f"> waiting for {waited:.0f} s: {path} is held by {holder}", flush=True)
            next_notice = waited + _NOTICE_SECONDS
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name once written and synced."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}-", suffix=path.suffix, dir=path.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
