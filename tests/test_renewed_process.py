"""A child process does the work, and another takes its place once it has grown."""

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_multiturn.errors import SessionError
from megatron_multiturn.renewed_process import RenewedProcess


class Counting:
    """Says in which process it is called for which time."""

    def __init__(self) -> None:
        self.num_calls = 0

    def call(self, argument: Any) -> tuple[int, int, Any]:
        self.num_calls += 1
        if argument == "bad":
            raise SessionError("what is bad", reason="bad")
        if argument == "worse":
            raise ValueError("unforeseen")
        if argument == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid(), self.num_calls, argument


def test_a_process_that_has_grown_makes_room_for_another() -> None:
    counting = Counting()
    process = RenewedProcess(counting.call, lambda: counting.num_calls == 3)
    answers = [pickle.loads(process.call(number)) for number in range(8)]
    assert [calls for _, calls, _ in answers] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [argument for *_, argument in answers] == list(range(8))
    pids = [pid for pid, *_ in answers]
    assert len({*pids[:3]}) == len({*pids[3:6]}) == len({*pids[6:]}) == 1
    assert len({*pids, os.getpid()}) == 4
    assert counting.num_calls == 0
    for pid in {*pids[:6]}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_it_raises_is_raised() -> None:
    process = RenewedProcess(Counting().call, lambda: False)
    pid = pickle.loads(process.call(1))[0]
    with pytest.raises(SessionError, match="what is bad") as raised:
        process.call("bad")
    assert raised.value.reason == "bad"
    with pytest.raises(ValueError, match="unforeseen") as unforeseen:
        process.call("worse")
    assert "in call" in "".join(unforeseen.value.__notes__)
    assert pickle.loads(process.call(2)) == (pid, 4, 2)


def in_process(work: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_killed_child_ends_its_parent() -> None:
    process = in_process(lambda: _call_all("x", "die", "never"))
    process.join()
    assert process.exitcode == 1


def test_a_child_ends_with_its_killed_parent() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        process = RenewedProcess(Counting().call, lambda: False)
        sender.send(pickle.loads(process.call(1))[0])
        time.sleep(3600)

    process = in_process(work)
    child = receiver.recv()
    os.kill(child, 0)
    process.kill()
    process.join()
    while os.path.exists(f"/proc/{child}") and _state_of(child) != "Z":
        time.sleep(0.05)


def _call_all(*arguments: str) -> None:
    process = RenewedProcess(Counting().call, lambda: False)
    for argument in arguments:
        process.call(argument)


def _state_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
            return stream.read().rpartition(")")[2].split()[0]
    except OSError:  # it has just gone
        return "Z"
