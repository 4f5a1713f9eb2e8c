"""Files that one process makes and others wait for."""

import fcntl
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_multiturn import shared_files
from megatron_multiturn.shared_files import atomic, locked

FORK = multiprocessing.get_context("fork")


def _hold(path: Path, pipe: Connection) -> None:
    with locked(path, "plan the train split of data"):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Any, Connection]]:
    """A process that holds the lock "it.lock" until it is sent something."""
    pipe, its_end = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(tmp_path / "it.lock", its_end))
    process.start()
    assert pipe.poll(30)
    pipe.recv()
    yield process, pipe
    process.kill()
    process.join()


def _lock_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_files, "_FIRST_NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(shared_files, "_NOTICE_SECONDS", 0.6)


def test_those_that_wait_say_for_whom_and_rarely(
    tmp_path: Path,
    holder: tuple[Any, Connection],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _lock_quickly(monkeypatch)
    process, pipe = holder
    real_sleep = time.sleep
    started = time.monotonic()

    def sleep(seconds: float) -> None:
        if time.monotonic() - started > 1.2:
            pipe.send("let go")
        real_sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    with locked(tmp_path / "it.lock", "the same"):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4
    wanted = rf"> waiting for \d+ s: .*it\.lock is held by process {process.pid} on \S+ to plan "
    assert all(re.match(wanted + "the train split of data", line) for line in lines)


def test_who_need_not_wait_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with locked(tmp_path / "it.lock", "work"):
            assert f"process {os.getpid()} on " in (tmp_path / "it.lock").read_text()
    assert (tmp_path / "it.lock").read_text() == ""
    assert capsys.readouterr().out == ""


def test_a_lock_goes_with_its_process(tmp_path: Path, holder: tuple[Any, Connection]) -> None:
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    with locked(tmp_path / "it.lock", "work"):
        pass


def test_a_file_system_without_locks_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "it.lock", "work"):
        pass


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.json"

    def fail_half_way() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
