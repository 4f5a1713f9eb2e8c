"""The command as a whole: outputs, refusals, workers, and being killed."""

import errno
import gzip
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import make_record, tiny_hugging_face, tiny_sentencepiece, write_jsonl

from megatron_multiturn import pipeline
from megatron_multiturn.errors import MultiTurnError
from megatron_multiturn.preprocess import main
from megatron_multiturn.store import SessionStore

Run = Callable[..., tuple[int, str, str]]

BAD = {"messages": [{"role": "user", "content": "q"}]}


def tokenizer_flags(kind: str) -> list[str]:
    if kind == "chatml":
        return [
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            tiny_hugging_face(),
        ]
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tiny_sentencepiece()]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command into tmp_path/out/data; (exit code, stdout, stderr)."""
    importlib.import_module("megatron_multiturn.megatron_compat")
    capsys.readouterr()  # what torch says once, on the first import

    def run_command(*inputs: str, flags: tuple[str, ...] = (), template: str = "firefly") -> Any:
        prefix = str(tmp_path / "out" / "data")
        command = ["--input", *inputs, "--output-prefix", prefix, "--template", template]
        code = main([*command, *tokenizer_flags(template), "--workers", "1", *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def outputs(tmp_path: Path) -> list[str]:
    folder = tmp_path / "out"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("template", ["firefly", "chatml"])
def test_files_become_a_dataset(tmp_path: Path, run: Run, template: str) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [make_record(1), make_record(2)])
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    code, out, err = run(first, str(second), template=template)
    assert (code, err) == (0, "")
    assert outputs(tmp_path) == ["data.bin", "data.idx", "data.json"]
    store = SessionStore.open(str(tmp_path / "out" / "data"))
    counts = store.manifest.counts
    assert (counts.sessions, counts.turns, counts.rejected) == (3, 4, {})
    assert store.manifest.template.name == template
    assert [source.path for source in store.manifest.inputs] == [first, str(second)]
    assert store.manifest.inputs[0].num_bytes == os.path.getsize(first)
    assert counts.tokens == store.session_lengths().sum()
    assert f"3 sessions, 4 turns, {counts.tokens} tokens, {counts.target_tokens} target" in out
    assert "rejected: 0 sessions" in out
    assert "note:" not in out


@pytest.mark.parametrize("workers", ["2", "3"])
def test_the_output_is_the_same_for_any_number_of_workers(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 300)
    records = [make_record(1 + number % 4, id=number) for number in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", [*records[:20], BAD, *records[20:], "{"])
    skip = ("--on-bad-session", "skip")
    assert run(path, flags=skip)[0] == 0
    alone = {name: (tmp_path / "out" / name).read_bytes() for name in outputs(tmp_path)}
    assert len(alone) == 4
    assert run(path, flags=(*skip, "--overwrite", "--workers", workers))[0] == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in outputs(tmp_path)} == alone


def test_bad_sessions_are_skipped_counted_and_kept(tmp_path: Path, run: Run) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1), BAD, b"\xff{", make_record(2), BAD])
    code, out, _ = run(path, flags=("--on-bad-session", "skip"))
    assert code == 0
    assert re.search(r"rejected: 3 sessions, see .*data.rejected.jsonl", out)
    assert "no-assistant: 2" in out
    assert "not-utf8: 1" in out
    rejected_path = tmp_path / "out" / "data.rejected.jsonl"
    rejected = [json.loads(line) for line in rejected_path.read_text("utf-8").splitlines()]
    assert [entry["location"] for entry in rejected] == [f"{path}:{line}" for line in (2, 3, 5)]
    assert [entry["reason"] for entry in rejected] == ["no-assistant", "not-utf8", "no-assistant"]
    assert json.loads(rejected[0]["record"]) == BAD
    assert rejected[1]["record"] == "\\xff{"
    assert "nothing to learn" in rejected[0]["message"]
    manifest = SessionStore.open(str(tmp_path / "out" / "data")).manifest
    assert manifest.counts.rejected == {"no-assistant": 2, "not-utf8": 1}
    assert manifest.counts.sessions == 2


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_first_bad_session_ends_the_run(tmp_path: Path, run: Run, workers: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1), make_record(1), BAD, "{"])
    code, out, err = run(path, flags=("--workers", workers))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path}:3: no assistant message")
    assert err.count("\n") == 1
    assert outputs(tmp_path) == []


def test_bad_inputs_end_the_run(tmp_path: Path, run: Run) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    only_bad = write_jsonl(tmp_path / "bad.jsonl", [BAD, BAD])
    broken = tmp_path / "broken.json"
    broken.write_text('[{"instruction": "q", "output": "a"}, {')
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for path, flags, message in (
        (empty, (), "empty.jsonl: the file is empty"),
        (str(tmp_path / "gone"), (), "gone: no such file"),
        (str(nothing), (), "no file in this folder ends in"),
        (str(broken), ("--on-bad-session", "skip"), "item 2 of the JSON list is broken"),
        (only_bad, ("--on-bad-session", "skip"), "all 2 sessions were rejected.*bad.jsonl:1"),
        (only_bad, ("--workers", "0"), "--workers 0: at least one"),
        (only_bad, ("--tokenizer-model", "gone.model"), "--tokenizer-model gone.model: no such"),
        (only_bad, ("--tokenizer-model", str(broken)), "Megatron cannot build the SentencePiece"),
        (only_bad, ("--template", "chatml", *tokenizer_flags("firefly")), "bad.jsonl:1: no assis"),
    ):
        code, _, err = run(path, flags=flags)
        assert code == 1
        assert re.match(f"error: .*{message}", err)
        assert err.count("\n") == 1
        assert outputs(tmp_path) == []


def test_outputs_are_not_overwritten_unasked(tmp_path: Path, run: Run) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1), BAD])
    assert run(path, flags=("--on-bad-session", "skip"))[0] == 0
    before = (tmp_path / "out" / "data.json").read_bytes()
    code, _, err = run(path)
    assert code == 1
    assert re.search("data.bin: is already there; .* pass --overwrite", err)
    assert (tmp_path / "out" / "data.json").read_bytes() == before
    good = write_jsonl(tmp_path / "b.jsonl", [make_record(3)])
    assert run(good, flags=("--overwrite",))[0] == 0
    assert SessionStore.open(str(tmp_path / "out" / "data")).manifest.counts.turns == 3
    assert outputs(tmp_path) == ["data.bin", "data.idx", "data.json"]  # no stale rejects


def test_an_input_is_never_overwritten(tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()
    path = write_jsonl(tmp_path / "out" / "data.json", [make_record(1)])
    code, _, err = run(path, flags=("--overwrite",))
    assert code == 1
    assert "is both input and output" in err


def test_a_folder_of_every_packing_is_read_in_order(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    lines = [json.dumps(make_record(turns)).encode() for turns in (1, 2, 3)]
    (folder / "b.jsonl").write_bytes(lines[1])
    (folder / "a.json.gz").write_bytes(gzip.compress(b"[" + lines[0] + b"]"))
    (folder / "more" / "c.jsonl").write_bytes(lines[2])
    (folder / "README.md").write_text("not a session")
    assert run(str(folder))[0] == 0
    found = SessionStore.open(str(tmp_path / "out" / "data")).manifest
    assert [Path(entry.path).name for entry in found.inputs] == ["a.json.gz", "b.jsonl", "c.jsonl"]
    assert (found.counts.sessions, found.counts.turns) == (3, 6)


def test_train_on_chooses_the_turns(tmp_path: Path, run: Run) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(3), make_record(2)])
    turns = {}
    for choice in ("all", "last"):
        assert run(path, flags=("--train-on", choice, "--overwrite"))[0] == 0
        counts = SessionStore.open(str(tmp_path / "out" / "data")).manifest.counts
        turns[choice] = (counts.turns, counts.tokens)
    assert turns["all"][0] == 5
    assert turns["last"] == (2, turns["all"][1])


def test_a_weight_is_refused(tmp_path: Path, run: Run) -> None:
    record = make_record(1)
    record["messages"][1]["weight"] = 0.5
    code, _, err = run(write_jsonl(tmp_path / "a.jsonl", [record]))
    assert code == 1
    assert "a.jsonl:1: message 2 has the weight 0.5" in err


def test_a_named_format_is_used(tmp_path: Path, run: Run) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)])
    code, _, err = run(path, flags=("--format", "alpaca"))
    assert code == 1
    assert "'instruction'" in err


def test_a_killed_worker_ends_the_run(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(pipeline._Work, "encode_chunk", die)
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)])
    code, _, err = run(path, flags=("--workers", "2"))
    assert code == 1
    assert "a worker process was killed, perhaps for want of memory" in err
    assert outputs(tmp_path) == []


def test_a_full_disk_ends_the_run(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    code, _, err = run(write_jsonl(tmp_path / "a.jsonl", [make_record(1)]))
    assert (code, err) == (1, "error: [Errno 28] No space left on device\n")
    assert outputs(tmp_path) == []


def test_an_error_in_a_worker_comes_out_as_it_is(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MultiTurnError("what the worker said")

    monkeypatch.setattr(pipeline._Work, "encode_chunk", fail)
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)])
    code, _, err = run(path, flags=("--workers", "2"))
    assert (code, err) == (1, "error: what the worker said\n")
    assert outputs(tmp_path) == []


# The command with a tokenizer of characters, which takes its time over each chunk.
SLOW_COMMAND = """
import sys, time
from megatron_multiturn import pipeline, preprocess
from megatron_multiturn.vocabulary import TokenizerIdentity

class Characters:
    size, bos_id, eos_id, unknown_id = 0x110000, 1, 2, None
    def encode(self, texts):
        return [[ord(character) for character in text] for text in texts]
    def decode(self, ids):
        return ["".join(map(chr, one)) for one in ids]
    def literal_of(self, token_id):
        return chr(0x100000 + token_id)
    def control_tokens(self):
        return []

class SlowWork(pipeline._Work):
    def encode_chunk(self, chunk):
        time.sleep(0.2)
        return super().encode_chunk(chunk)

pipeline._Work = SlowWork
pipeline._CHUNK_BYTES = 300
preprocess.build_tokenizer = lambda args: None
preprocess.open_vocabulary = lambda tokenizer: Characters()
preprocess.tokenizer_fingerprint = lambda tokenizer, kind: TokenizerIdentity(
    type=kind, vocab_size=Characters.size, content_hash="x"
)
sys.exit(preprocess.main())
"""


def start_slow_command(tmp_path: Path, num_sessions: int) -> "subprocess.Popen[bytes]":
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(2)] * num_sessions)
    prefix = str(tmp_path / "out" / "data")
    files = ["--input", path, "--output-prefix", prefix, "--tokenizer-model", "none"]
    flags = ["--template", "firefly", "--tokenizer-type", "Llama2Tokenizer", "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, *files, *flags], start_new_session=True
    )


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_slow_command_works_if_it_is_let(tmp_path: Path) -> None:
    assert start_slow_command(tmp_path, 3).wait(timeout=60) == 0
    assert SessionStore.open(str(tmp_path / "out" / "data")).num_sessions == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_no_manifest_and_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start_slow_command(tmp_path, 5000)
    wait_until(lambda: _num_in_group(process.pid) == 3)
    assert f"data.bin.{process.pid}.tmp" in outputs(tmp_path)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert process.wait(timeout=30) == expected[number]
    names = outputs(tmp_path)
    assert all(name.endswith(".tmp") for name in names)
    assert names == [] or number == signal.SIGKILL
    wait_until(lambda: _num_in_group(process.pid) == 0)


def _num_in_group(group: int) -> int:
    """Running processes of the group; one that waits to be reaped does not run."""
    num_running = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        num_running += int(fields[2]) == group and fields[0] != "Z"
    return num_running
