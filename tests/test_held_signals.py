"""Signals come between two blocks, never in the midst of forking workers."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_multiturn.held_signals import HeldSignals

# Interrupts a pool at random moments, most of them while it forks its workers.
INTERRUPTED_POOLS = """
import os, random, signal, threading, time, types
from megatron_multiturn.encoding_pool import encode_blocks

class Sleeps:
    # Every tenth block's process is the last of its kind, and forked anew.
    engine = types.SimpleNamespace(renews=True, has_grown=lambda: random.random() < 0.1)
    encoder = types.SimpleNamespace(engine=engine)

    def encode_block(self, block):
        time.sleep(0.01)
        return block

number = signal.Signals[NAME]
signal.signal(number, signal.default_int_handler)
for round in range(30):
    try:
        threading.Timer(random.random() * 0.06, os.kill, (os.getpid(), number)).start()
        for _ in encode_blocks(Sleeps(), ((block, block) for block in range(10**6)), 4):
            pass
    except KeyboardInterrupt:
        continue
    raise AssertionError("not interrupted")
print("all interrupted")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_pool_can_be_interrupted_at_any_moment(name: str) -> None:
    code = INTERRUPTED_POOLS.replace("NAME", repr(name))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("all interrupted\n", 0), done.stderr


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that the handler of before was called for."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_a_signal_acts_when_it_is_released(handled: list[int]) -> None:
    with HeldSignals() as signals:
        signals.release()
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == []
        signals.release()
        signals.release()
        assert handled == [signal.SIGTERM]
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(handled) == 2


def test_a_signal_acts_at_the_end_but_not_over_an_error(handled: list[int]) -> None:
    with HeldSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(handled) == 1
    with pytest.raises(ValueError, match="first"):
        hold_and_fail()
    assert len(handled) == 1


def hold_and_fail() -> None:
    with HeldSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("first")


def test_other_threads_change_nothing(handled: list[int]) -> None:
    def hold() -> None:
        with HeldSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            signals.release()

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert handled == [signal.SIGTERM]
