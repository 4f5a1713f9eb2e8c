"""Sizes and hashes of the input files for the manifest, found while the work goes on."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from megatron_multiturn.manifest import InputFile

_THREADS = 4
_BLOCK_BYTES = 1 << 20


class InputHashes:
    """Describes files in threads."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._threads = ThreadPoolExecutor(_THREADS)
        self._stopped = Event()
        self._pending: list[Future[InputFile]] = []

    def start(self) -> None:
        """Begin, if nobody has; not before all processes are forked."""
        if not self._pending:
            self._pending = [self._threads.submit(self._describe, path) for path in self._paths]

    def result(self) -> list[InputFile]:
        """Size and hash of each file; waits for them."""
        self.start()
        return [one.result() for one in self._pending]

    def close(self) -> None:
        """Leave off, whatever is still to be read."""
        self._stopped.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _describe(self, path: str) -> InputFile:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as stream:
            while not self._stopped.is_set() and (data := stream.read(_BLOCK_BYTES)):
                digest.update(data)
        return InputFile(path=path, num_bytes=os.stat(path).st_size, sha256=digest.hexdigest())


def describe_inputs(paths: Sequence[str]) -> list[InputFile]:
    """Size and hash of each file, now."""
    hashes = InputHashes(paths)
    try:
        return hashes.result()
    finally:
        hashes.close()
