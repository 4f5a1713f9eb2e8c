"""Input files are described while the work goes on, and no longer than it does."""

import hashlib
from pathlib import Path
from threading import Event

import pytest

from megatron_multiturn import input_hashes
from megatron_multiturn.input_hashes import InputHashes, describe_inputs
from megatron_multiturn.manifest import InputFile


def test_size_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_hashes, "_BLOCK_BYTES", 7)
    contents = {"a": b"", "b": b"1234567", "c": b"123456789" * 11}
    wanted = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        wanted.append(
            InputFile(
                path=str(tmp_path / name),
                num_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )
    paths = [str(tmp_path / name) for name in contents]
    assert describe_inputs(paths) == wanted
    hashes = InputHashes(paths)
    hashes.start()
    hashes.start()
    assert hashes.result() == wanted
    hashes.close()


def test_a_run_that_ends_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, closing = Event(), Event()
    num_updates = 0

    class Digest:
        def update(self, _data: bytes) -> None:
            nonlocal num_updates
            num_updates += 1
            begun.set()
            closing.wait()

        def hexdigest(self) -> str:
            return ""

    (tmp_path / "a").write_bytes(bytes(100))
    monkeypatch.setattr(input_hashes, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(hashlib, "sha256", Digest)
    hashes = InputHashes([str(tmp_path / "a")])
    hashes.start()
    begun.wait()
    hashes._stopped.set()  # what `close` does first, before it waits for the threads
    closing.set()
    hashes.close()
    assert num_updates == 1


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        describe_inputs([str(tmp_path / "gone")])
