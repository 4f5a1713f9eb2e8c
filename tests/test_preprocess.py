"""The command as a whole: outputs, refusals, workers, and being killed."""

import errno
import gzip
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from session_fixtures import make_record, tiny_hugging_face, tiny_sentencepiece, write_jsonl

from megatron_multiturn import records
from megatron_multiturn.encoding_pool import Work, encode_blocks
from megatron_multiturn.errors import MultiTurnError
from megatron_multiturn.merge import merge_shards
from megatron_multiturn.preprocess import main
from megatron_multiturn.progress import Progress
from megatron_multiturn.record_blocks import FilePart
from megatron_multiturn.records import read_blocks
from megatron_multiturn.store import SessionStore

Run = Callable[..., tuple[int, str, str]]

ANNOUNCED = "preprocess: "
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


def said(err: str) -> str:
    """What stands on stderr behind the lines that name the input and the tokenizer's engine."""
    lines = rf"^{ANNOUNCED}.*; loading the tokenizer\n({ANNOUNCED}encoding with gigatoken.*\n)?"
    return re.sub(lines, "", err)


def outputs(tmp_path: Path) -> list[str]:
    folder = tmp_path / "out"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("template", ["firefly", "chatml"])
def test_files_become_a_dataset(tmp_path: Path, run: Run, template: str) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [make_record(1), make_record(2)])
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    size = os.path.getsize(first) + os.path.getsize(second)
    code, out, err = run(first, str(second), template=template)
    assert (code, said(err)) == (0, "")
    assert err.startswith(f"{ANNOUNCED}2 files, {size} bytes; loading the tokenizer\n")
    assert "encoding with gigatoken, equal to the tokenizer on 8 texts" in err
    assert outputs(tmp_path) == ["data.bin", "data.idx", "data.json"]
    store = SessionStore.open(str(tmp_path / "out" / "data"))
    counts = store.manifest.counts
    assert (counts.sessions, counts.turns, counts.rejected) == (3, 4, {})
    assert store.manifest.template.name == template
    assert [source.path for source in store.manifest.inputs] == [first, str(second)]
    assert store.manifest.inputs[0].num_bytes == os.path.getsize(first)
    assert counts.tokens == store.session_lengths().sum()
    assert "kept      3 sessions, 4 turns\n" in out
    assert f"tokens    {counts.tokens}, targets {counts.target_tokens} (" in out
    longest = max(store.session_lengths())
    assert f"p99 {longest} max {longest} tokens a session; the longest is {first}:2\n" in out
    assert "rejected  0 sessions\n" in out
    assert "note:" not in out


@pytest.mark.parametrize("workers", ["2", "3"])
def test_the_output_is_the_same_for_any_number_of_workers(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setattr(records, "_BLOCK_BYTES", 300)
    made = [make_record(1 + number % 4, id=number) for number in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", [*made[:20], BAD, *made[20:], "{"])
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
    assert re.search(r"rejected  3 sessions, see .*data.rejected.jsonl\n", out)
    assert f" 2 no-assistant  first: {path}:2\n" in out
    assert f" 1 not-utf8      first: {path}:3\n" in out
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
    assert said(err).startswith(f"error: {path}:3: no assistant message")
    assert said(err).count("\n") == 1
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
        (
            only_bad,
            ("--tokenizer-model", str(broken)),
            "the SentencePieceTokenizer of ",
        ),
        (only_bad, ("--template", "chatml", *tokenizer_flags("firefly")), "bad.jsonl:1: no assis"),
    ):
        code, _, err = run(path, flags=flags)
        assert code == 1
        assert re.match(f"error: .*{message}", said(err))
        assert said(err).count("\n") == 1
        assert outputs(tmp_path) == []


def test_a_template_that_never_ends_is_stopped_once(tmp_path: Path, run: Run) -> None:
    """Each session would take its 5 s, and the first ends the run."""
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)] * 20)
    endless = tmp_path / "endless.jinja"
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    endless.write_text(loops + "{% for m in messages %}{{ m.content }}{% endfor %}")
    prefix = str(tmp_path / "out" / "data")
    command = ["--input", path, "--output-prefix", prefix, "--chat-template", str(endless)]
    began = time.process_time()
    assert main([*command, *tokenizer_flags("firefly"), "--workers", "1"]) == 1
    assert time.process_time() - began < 40


def test_remedies_help(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)])
    added = ("--tokenizer-special-tokens", "<new>")
    for flags, message in (
        (("--output-prefix", ""), "--output-prefix is empty; name the files"),
        (added, "cannot be built: .*; pass --tokenizer-sentencepiece-legacy too"),
        (
            ("--template", "chatml", *tokenizer_flags("chatml"), "--train-roles", "system"),
            "no answer of the roles system.*or pass other --train-roles",
        ),
    ):
        code, _, err = run(path, flags=flags)
        assert code == 1
        assert re.match(f"error: .*{message}", said(err))
    assert run(path, flags=(*added, "--tokenizer-sentencepiece-legacy"))[0] == 0
    (tmp_path / "out" / "data.idx").unlink()
    (tmp_path / "out" / "data.idx").mkdir()
    code, _, err = run(path, flags=("--overwrite",))
    assert code == 1
    assert re.match("error: .*data.idx: is a folder; remove it", said(err))
    assert outputs(tmp_path) == ["data.bin", "data.idx", "data.json"]
    with pytest.raises(SystemExit):
        run(path, flags=("--prompt-variants", str(tmp_path / "gone")))
    assert "argument --prompt-variants: /" in capsys.readouterr().err


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

    monkeypatch.setattr(Work, "encode_block", die)
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
    assert code == 1
    assert re.fullmatch(
        "error: .*out/data: No space left on device; make room there and give the same command "
        "again\n",
        said(err),
    )
    assert outputs(tmp_path) == []


def test_an_error_in_a_worker_comes_out_as_it_is(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MultiTurnError("what the worker said")

    monkeypatch.setattr(Work, "encode_block", fail)
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)])
    code, _, err = run(path, flags=("--workers", "2"))
    assert (code, said(err)) == (1, "error: what the worker said\n")
    assert outputs(tmp_path) == []


# The command with a tokenizer of characters, which takes its time over each chunk.
SLOW_COMMAND = """
import signal, sys, time
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from megatron_multiturn import encoding_pool, journal, pipeline, preprocess, records
from megatron_multiturn.vocabulary import TokenizerIdentity

class Characters:
    size, bos_id, eos_id, unknown_id = 0x110000, 1, 2, None
    def encode(self, texts):
        return [[ord(character) for character in text] for text in texts]
    def encode_flat(self, texts):
        lengths = [len(text) for text in texts]
        return np.array(list(map(ord, "".join(texts))), dtype=np.int32), lengths
    def decode(self, ids):
        return ["".join(map(chr, one)) for one in ids]
    def decode_flat(self, ids):
        return "".join(map(chr, ids.tolist()))
    def literal_of(self, token_id):
        return chr(0x100000 + token_id)
    def control_tokens(self):
        return []

class SlowWork(encoding_pool.Work):
    def encode_block(self, block):
        time.sleep(PAUSE)
        return super().encode_block(block)

pipeline.Work = SlowWork
records._BLOCK_BYTES = 300
journal._JOURNAL_SECONDS = 0.1
preprocess.build_tokenizer = lambda args, **_: None
preprocess.open_vocabulary = lambda tokenizer: Characters()
preprocess.tokenizer_fingerprint = lambda tokenizer, kind: TokenizerIdentity(
    type=kind, vocab_size=Characters.size, content_hash="x"
)
sys.exit(preprocess.main())
"""


def slow_command(
    tmp_path: Path, source: str, *flags: str, pause: float = 0.2, prefix: str = "data"
) -> list[str]:
    command = [sys.executable, "-c", SLOW_COMMAND.replace("PAUSE", str(pause))]
    command += ["--input", source, "--output-prefix", str(tmp_path / "out" / prefix)]
    command += ["--template", "firefly", "--tokenizer-type", "Llama2Tokenizer"]
    return [*command, "--tokenizer-model", "none", "--workers", "2", *flags]


def many_sessions(tmp_path: Path, num_sessions: int) -> str:
    made = (make_record(1 + number % 5, id=number) for number in range(num_sessions))
    bad = (BAD if number % 50 == 40 else one for number, one in enumerate(made))
    return write_jsonl(tmp_path / "a.jsonl", bad)


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def contents(tmp_path: Path, prefix: str) -> dict[str, bytes]:
    """The files of a prefix, by their suffix; folders left out."""
    return {
        path.name.removeprefix(prefix): path.read_bytes()
        for path in (tmp_path / "out").glob(f"{prefix}.*")
        if path.is_file()
    }


SKIP = ("--on-bad-session", "skip")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, bytes]]:
    """A folder, an input in it, and what an unbroken run makes of it."""
    folder = tmp_path_factory.mktemp("unbroken")
    source = many_sessions(folder, 400)
    subprocess.run(slow_command(folder, source, *SKIP, pause=0), check=True)
    made = contents(folder, "data")
    assert sorted(made) == [".bin", ".idx", ".json", ".rejected.jsonl"]
    assert len(made[".rejected.jsonl"].splitlines()) == 8
    return folder, source, made


def test_a_run_with_phrasings_goes_on(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are the same when they come back from the journal."""
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)])
    phrasings = tmp_path / "phrasings"
    phrasings.write_text("what is {query}?\n{query}?\n")
    flags = ("--prompt-variants", str(phrasings))

    def fail(*_: str) -> None:
        raise OSError(errno.EIO, "no luck")

    with monkeypatch.context() as broken:
        broken.setattr("megatron_multiturn.pipeline.place_files", fail)
        assert run(path, flags=flags)[0] == 1
    assert outputs(tmp_path) == ["data.unfinished"]
    code, _, err = run(path, flags=flags)
    assert code == 0, err
    assert outputs(tmp_path) == ["data.bin", "data.idx", "data.json"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on(
    tmp_path: Path, unbroken: tuple[Path, str, dict[str, bytes]], number: signal.Signals
) -> None:
    _, source, wanted = unbroken
    command = slow_command(tmp_path, source, *SKIP)
    process = start(command)
    folder = tmp_path / "out" / "data.unfinished"
    wait_until(lambda: (folder / "journal.json").exists())
    wait_until(lambda: _num_in_group(process.pid) == 5)  # two workers, and a child of each
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    err = process.communicate(timeout=30)[1]
    assert process.returncode == expected[number]
    if number == signal.SIGINT:
        assert f"note: {folder} holds what is done so far; the same command goes on" in err
    assert outputs(tmp_path) == ["data.unfinished"]
    wait_until(lambda: _num_in_group(process.pid) == 0)
    journal = json.loads((folder / "journal.json").read_bytes())
    done = journal["counts"]["sessions"]
    assert 0 < done < 390
    # What is done is not done again: it is not even read.
    scribbled = Path(source).read_bytes()
    stamp = os.stat(source).st_mtime_ns
    offset = journal["progress"]["place"]["offset"]
    Path(source).write_bytes(b"x" * offset + scribbled[offset:])
    os.utime(source, ns=(stamp, stamp))
    try:
        done = subprocess.run(
            [*slow_command(tmp_path, source, *SKIP, pause=0), "--workers", "3"],
            capture_output=True,
            text=True,
        )
    finally:
        Path(source).write_bytes(scribbled)
        os.utime(source, ns=(stamp, stamp))
    assert done.returncode == 0, done.stderr
    made = contents(tmp_path, "data")
    # The manifest's hash is of the scribbled input.
    for suffix in (".bin", ".idx", ".rejected.jsonl"):
        assert made[suffix] == wanted[suffix]
    assert not folder.exists()


def test_killed_at_any_point_it_goes_on(
    tmp_path: Path, unbroken: tuple[Path, str, dict[str, bytes]]
) -> None:
    _, source, wanted = unbroken
    draw = random.Random(7)
    command = slow_command(tmp_path, source, *SKIP, pause=0.02)
    for _ in range(12):
        process = start(command)
        time.sleep(draw.uniform(0.3, 2.5))
        process.kill()
        process.communicate(timeout=30)
        wait_until(lambda group=process.pid: _num_in_group(group) == 0)  # type: ignore[misc]
        if process.returncode == 0:
            break
        assert not (tmp_path / "out" / "data.json").exists()
    if process.returncode != 0:
        subprocess.run(command, check=True)
    assert contents(tmp_path, "data") == wanted


def test_a_killed_shard_goes_on(
    tmp_path: Path, unbroken: tuple[Path, str, dict[str, bytes]]
) -> None:
    """Its lines are counted as if it had not been killed, so that the merge can number them."""
    _, source, wanted = unbroken
    process = start(slow_command(tmp_path, source, *SKIP, "--shard", "1/3", pause=0.1))
    folder = tmp_path / "out" / "data.shard-00001-of-00003.unfinished"

    def rejected_one() -> bool:
        path = folder / "journal.json"
        return path.exists() and bool(
            json.loads(path.read_bytes())["progress"]["tally"]["rejected"]
        )

    wait_until(rejected_one)
    process.kill()
    process.communicate()
    strict = slow_command(tmp_path, source, "--shard", "1/3", pause=0)
    done = subprocess.run(strict, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"error: .*a.jsonl:\d+ \(from byte \d+\): no assistant", done.stderr)
    assert folder.exists()
    for index in (2, 1, 0):
        command = slow_command(tmp_path, source, *SKIP, "--shard", f"{index}/3", pause=0)
        subprocess.run(command, check=True)
    assert not folder.exists()
    merge_shards(str(tmp_path / "out" / "data"), overwrite=False)
    assert {suffix: contents(tmp_path, "data")[suffix] for suffix in wanted} == wanted


def test_moving_the_files_goes_on_too(
    tmp_path: Path, unbroken: tuple[Path, str, dict[str, bytes]]
) -> None:
    _, source, wanted = unbroken
    for num_moved in range(4):
        patch = (
            "import os; replace, left = os.replace, [NUM]\n"
            "def move(source, target):\n"
            "    if not source.endswith('.tmp'):\n"
            "        left[0] -= 1\n"
            "        if left[0] < 0: os._exit(9)\n"
            "    replace(source, target)\n"
            "os.replace = move\n"
        ).replace("NUM", str(num_moved))
        command = slow_command(tmp_path, source, *SKIP, pause=0)
        command[2] = patch + command[2]
        assert subprocess.run(command).returncode == 9
        assert ".json" not in contents(tmp_path, "data")
        assert len(contents(tmp_path, "data")) == num_moved
        command = slow_command(tmp_path, source, *SKIP, pause=0)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.search(r"length    p50 \d+ p90", done.stdout)
        assert contents(tmp_path, "data") == wanted
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_another_run_does_not_go_on(tmp_path: Path) -> None:
    source = many_sessions(tmp_path, 300)
    process = start(slow_command(tmp_path, source, *SKIP))
    journal = tmp_path / "out" / "data.unfinished" / "journal.json"
    wait_until(journal.exists)
    second = subprocess.run(slow_command(tmp_path, source), capture_output=True, text=True)
    assert second.returncode == 1
    assert f"data: is being written by process {process.pid} on " in second.stderr
    process.kill()
    process.communicate()

    def refused(*flags: str) -> str:
        command = slow_command(tmp_path, source, *SKIP, *flags, pause=0)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert journal.exists()
        return done.stderr

    assert "--train-on was all, is last. Repeat that command" in refused("--train-on", "last")
    assert "remove the folder, or pass --overwrite" in refused("--format", "openai")
    with Path(source).open("a") as stream:
        stream.write(json.dumps(make_record(1)) + "\n")
    assert "--input is another" in refused()
    command = slow_command(tmp_path, source, *SKIP, "--overwrite", pause=0)
    subprocess.run(command, check=True)
    assert sorted(contents(tmp_path, "data")) == [".bin", ".idx", ".json", ".rejected.jsonl"]
    assert SessionStore.open(str(tmp_path / "out" / "data")).num_sessions == 295


def test_a_full_disk_leaves_what_can_go_on(
    tmp_path: Path, unbroken: tuple[Path, str, dict[str, bytes]]
) -> None:
    _, source, wanted = unbroken
    command = slow_command(tmp_path, source, *SKIP, pause=0.05)
    # No file may grow beyond this; the tokens do.
    limit = len(wanted[".bin"]) // 2
    broken = list(command)
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    broken[2] = limits + command[2]
    done = subprocess.run(broken, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: [Errno 27] File too large" in done.stderr
    assert ".json" not in contents(tmp_path, "data")
    subprocess.run(command, check=True)
    assert contents(tmp_path, "data") == wanted


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


def test_a_dry_run_shows_sessions_and_writes_nothing(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    path = write_jsonl(tmp_path / "a.jsonl", [BAD, *(make_record(turns) for turns in (2, 1, 3))])
    flags = ("--on-bad-session", "skip", "--dry-run", "2")
    code, out, err = run(path, flags=flags, template="chatml")
    assert (code, said(err)) == (0, "")
    assert outputs(tmp_path) == []
    assert "\x1b[" not in out  # no terminal
    assert f"session 1: {path}:2\n" in out
    assert f"session 2: {path}:3\n" in out
    assert f"{path}:4" not in out
    assert out.count("┃ answer 1<|im_end|>") == 2
    assert "│ question 2" in out
    assert "kept      2 sessions, 3 turns\n" in out
    assert f"1 no-assistant  first: {path}:1\n" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    in_color = run(path, flags=flags, template="chatml")[1]
    assert re.search("\x1b\\[32m┃ answer 1<.im_end.>\x1b", in_color)
    assert re.sub("\x1b\\[[0-9;]*m", "", in_color) == out
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(path, flags=flags, template="chatml")[1] == out
    code, _, err = run(path, flags=("--dry-run", "1"))
    assert code == 1
    assert "a.jsonl:1: no assistant message" in err
    code, _, err = run(path, flags=("--dry-run", "0"))
    assert code == 1
    assert "--dry-run 0: show at least 1 session" in err
    assert run(path, flags=(*flags, "--shard", "1/2"))[0] == 0
    assert outputs(tmp_path) == []


def test_the_first_line_comes_before_anything_heavy(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)])
    code = (
        "import sys\n"
        "from megatron_multiturn import preprocess\n"
        "def heavy(args, **_):\n"
        "    names = ('torch', 'transformers', 'megatron', 'pyarrow', 'sentencepiece')\n"
        "    sys.exit(' '.join(name for name in names if name in sys.modules) or 77)\n"
        "preprocess.build_tokenizer = heavy\n"
        "preprocess.main()\n"
    )
    command = [sys.executable, "-c", *slow_command(tmp_path, path)[3:]]
    command.insert(2, code)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 77, done.stderr
    size = os.path.getsize(path)
    assert done.stderr == f"{ANNOUNCED}1 file, {size} bytes; loading the tokenizer\n"


def test_progress_is_told_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = iter([0.0, 10.0, 40.0, 50.0, 71.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    bar = Progress(4_000_000_000, 1_000_000_000)
    for step in range(1, 5):
        bar.update(1_000_000_000 + step * 500_000_000, 100)
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "preprocess: 50.0% of 4.0 GB, 200 sessions, 5 sessions/s, 25.0 MB/s, 0:01:20 left",
        "preprocess: 75.0% of 4.0 GB, 400 sessions, 6 sessions/s, 28.2 MB/s, 0:00:36 left",
    ]


def test_a_pool_of_workers_is_not_asked_for_more_than_it_has(tmp_path: Path) -> None:
    """However much input there is, only so many blocks are read ahead."""
    path = write_jsonl(tmp_path / "a.jsonl", [make_record(1)] * 3000)
    taken = []

    class Instant(Work):
        def encode_block(self, block: Any) -> Any:
            return len(block.data)

    def blocks() -> Any:
        for number, block in enumerate(read_blocks(FilePart.whole(path))):
            taken.append(number)
            yield number, block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_BLOCK_BYTES", 1000)
        encoder: Any = SimpleNamespace(engine=SimpleNamespace(has_grown=lambda: False))
        work = Instant(encoder=encoder, form="auto")
        done = 0
        for number, _, _ in encode_blocks(work, blocks(), 2):
            assert number == done
            assert len(taken) <= done + 8
            done += 1
    assert done > 100
