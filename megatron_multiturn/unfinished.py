"""PREFIX.unfinished: the folder of a run that is not over, so that it can go on.

It holds the columns of the dataset as far as they are (`spooled_columns`), the journal, which says
how much of them is sound and where in the input that was, and a lock against a second run.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.session_writer import sync_folder

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def unfinished_folder(prefix: str) -> str:
    return prefix + ".unfinished"


class UnfinishedRun:
    """The folder, locked while the `with` block lasts.

    It stays if the block ends by an error and there is a journal, so that there is something to
    go on from.
    """

    def __init__(self, prefix: str) -> None:
        self.folder = unfinished_folder(prefix)
        self._prefix = prefix
        self._journal = os.path.join(self.folder, "journal.json")
        self._lock = -1

    def __enter__(self) -> Self:
        """Raises ConfigError if another process has the lock, or the folder cannot be made."""
        try:
            self._take_lock()
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another "
                "--output-prefix"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not os.path.exists(self._journal):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def read(self) -> dict[str, Any] | None:
        """What was written to the journal last; None if nothing was.

        Raises ConfigError if it cannot be read.
        """
        try:
            value = json.loads(Path(self._journal).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._journal}: cannot be read ({error}); remove {self.folder}, or pass "
                "--overwrite, to begin again"
            ) from None
        if not isinstance(value, dict):
            raise ConfigError(f"{self._journal}: is no journal; remove {self.folder}")
        return value

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the journal; it is on the disk then."""
        temporary = self._journal + ".tmp"
        try:
            with open(temporary, "wb") as stream:
                stream.write(json.dumps(state, ensure_ascii=False).encode("utf-8", "surrogatepass"))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self._journal)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        sync_folder(Path(self.folder))

    def forget(self) -> None:
        """Remove the journal: what lies here is of no use, or no longer here."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._journal)

    def _take_lock(self) -> None:
        path = os.path.join(self.folder, "lock")
        while True:
            os.makedirs(self.folder, exist_ok=True)
            try:
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the folder of a run that just ended
                continue
            try:
                # Of this process alone: workers that outlive it for a moment do not hold it.
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return
                holder = os.read(self._lock, 200).decode("utf-8", "replace").strip()
                os.close(self._lock)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise ConfigError(
                    f"{self._prefix}: is being written by {holder or 'another process'}; wait for "
                    "it, or choose another --output-prefix"
                ) from None
            # The run that had it may have removed it in between.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(self._lock).st_ino:
                    break
            os.close(self._lock)
        os.truncate(self._lock, 0)
        os.write(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of two runs, a phrase each."""
    changes = []
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if isinstance(before, list) or isinstance(after, list) or len(f"{before}{after}") > 80:
            changes.append(f"{name} is another")
        else:
            changes.append(f"{name} was {before}, is {after}")
    return changes
