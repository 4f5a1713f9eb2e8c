"""Shards: every record in one of them, and together, byte for byte, what one run writes."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from session_fixtures import make_record, tiny_sentencepiece, write_jsonl
from test_input_files import write_parquet

from megatron_multiturn import merge, preprocess, records
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.records import read_blocks
from megatron_multiturn.shards import Shard, cut_shard, parse_shard

BAD = {"messages": [{"role": "user", "content": "q"}]}
Preprocess = Callable[..., int]


def shard_records(paths: list[str], count: int) -> list[list[str]]:
    """The texts of the records of each shard."""
    return [
        [
            record.data.decode()
            for part in cut_shard(paths, Shard(index=index, count=count))
            for block in read_blocks(part)
            for record in block.records()
        ]
        for index in range(count)
    ]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4),
    kinds=st.lists(st.sampled_from(["lines", "open", "blank", "list", "gzip"]), min_size=4),
    count=st.integers(1, 12),
    block_bytes=st.integers(1, 90),
)
def test_every_record_is_in_one_shard(
    tmp_path: Path, files: list[list[int]], kinds: list[str], count: int, block_bytes: int
) -> None:
    paths, wanted = [], []
    for number, sizes in enumerate(files):
        texts = [json.dumps(f"{number}-{size}".ljust(size, "x")) for size in sizes]
        wanted += texts
        data = {
            "lines": "\n".join(texts) + "\n",
            "open": "\n".join(texts),
            "blank": "\ufeff\n\n" + "\r\n \n\n".join(texts) + "\n\n",
            "list": "[1," + ",\n".join(texts) + "]",
            "gzip": "\n".join(texts),
        }[kinds[number]].encode()
        if kinds[number] == "list":
            wanted.insert(len(wanted) - len(texts), "1")
        path = tmp_path / str(number)
        path.write_bytes(gzip.compress(data) if kinds[number] == "gzip" else data)
        paths.append(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_BLOCK_BYTES", block_bytes)
        shards = shard_records(paths, count)
        assert [text for texts in shards for text in texts] == wanted
        # From every place between two blocks, the rest follows.
        for part in cut_shard(paths, Shard(index=count // 2, count=count)):
            blocks = list(read_blocks(part))
            for number, block in enumerate(blocks):
                rest = [one for each in read_blocks(part, block.end) for one in each.records()]
                left = [one for each in blocks[number + 1 :] for one in each.records()]
                assert rest == left


def test_shards_are_of_like_size(tmp_path: Path) -> None:
    noise = random.Random(1)
    lines = ["x" * noise.randrange(1, 200) for _ in range(5000)]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    sizes = [sum(map(len, texts)) for texts in shard_records([path], 7)]
    assert max(sizes) - min(sizes) < 600


def test_a_shard_reads_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_BLOCK_BYTES", 100)
    path = Path(write_jsonl(tmp_path / "a.jsonl", [f'"{number:06}"' for number in range(10_000)]))
    wanted = shard_records([str(path)], 4)[2]
    data = bytearray(path.read_bytes())
    quarter = len(data) // 4
    data[5000 : 2 * quarter - 9] = bytes(2 * quarter - 5009)
    data[3 * quarter + 200 :] = bytes(quarter - 200)
    path.write_bytes(data)
    assert shard_records([str(path)], 4)[2] == wanted


def test_row_groups_belong_to_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{number} " * 40} for number in range(50)]
    path = write_parquet(tmp_path / "in", rows, row_group_size=4)
    for count in (1, 2, 3, 5, 13, 40):
        shards = shard_records([path], count)
        found = [json.loads(text) for texts in shards for text in texts]
        assert found == rows
        assert max(map(len, shards)) <= -(-13 // count) * 4 + 4
    monkeypatch.setattr(records, "_BLOCK_BYTES", 300)
    for part in cut_shard([path], Shard(index=1, count=3)):
        blocks = list(read_blocks(part))
        assert len(blocks) > 3
        for number, block in enumerate(blocks):
            rest = [one for each in read_blocks(part, block.end) for one in each.records()]
            assert rest == [one for each in blocks[number + 1 :] for one in each.records()]
    (part,) = cut_shard([path], Shard(index=1, count=2))
    first = next(iter(read_blocks(part)))
    assert next(iter(first.records())).location == f"{path}:29 (row group 8)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4/4", "count from 0, so the last is 3/4"),
        ("1", "must be I/N, for example 0/4"),
        ("-1/4", "must be I/N"),
        ("0/0", "1 to 99,999 shards"),
        ("0/100000", "1 to 99,999 shards"),
    ],
)
def test_shards_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_shard(text)
    assert parse_shard("3/4") == Shard(index=3, count=4)


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Files of every kind, with bad records among the good ones."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    made = [make_record(1 + number % 5, id=number) for number in range(90)]
    bad: list[Any] = [
        BAD
        if number % 7 == 3
        else "\ud800{".encode("utf-8", "surrogatepass")
        if number % 31 == 9
        else one
        for number, one in enumerate(made)
    ]
    first = write_jsonl(folder / "a.jsonl", bad[:60])
    (folder / "b.json.gz").write_bytes(gzip.compress(json.dumps(made[60:70]).encode()))
    second = write_jsonl(folder / "c.jsonl", ["", "", *bad[60:]])
    third = write_parquet(folder / "d.parquet", made[:9], row_group_size=2)
    return [first, str(folder / "b.json.gz"), second, third]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Preprocess:
    def preprocess_to(prefix: str, inputs: list[str], *flags: str) -> int:
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer"]
        tokenizer += ["--tokenizer-model", tiny_sentencepiece(), "--template", "firefly"]
        files = ["--input", *inputs, "--output-prefix", str(tmp_path / prefix)]
        skip = ["--on-bad-session", "skip", "--workers", "1"]
        return preprocess.main([*files, *tokenizer, *skip, *flags])

    return preprocess_to


def contents(tmp_path: Path, prefix: str) -> dict[str, bytes]:
    names = (".bin", ".idx", ".json", ".rejected.jsonl")
    return {suffix: (tmp_path / f"{prefix}{suffix}").read_bytes() for suffix in names}


@pytest.mark.parametrize("count", [1, 3, 16])
def test_merged_is_what_one_run_writes(
    tmp_path: Path,
    run: Preprocess,
    corpus: list[str],
    count: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("whole", corpus) == 0
    table = capsys.readouterr().out
    for index in reversed(range(count)):
        assert run("parts", corpus, "--shard", f"{index}/{count}") == 0
    capsys.readouterr()
    prefix = str(tmp_path / "parts")
    assert merge.main([prefix]) == 0
    merged = capsys.readouterr().out
    assert contents(tmp_path, "parts") == contents(tmp_path, "whole")
    assert not (tmp_path / "parts.unfinished").exists()

    def told(text: str) -> list[str]:
        """The table but for the names and the speed."""
        lines = text.replace("parts.rejected", "whole.rejected").splitlines()[1:]
        return [line for line in lines if "speed" not in line]

    assert told(merged) == told(table)
    assert len(told(table)) >= 6
    assert f"{prefix}: {count} shards, which can be removed now" in merged
    assert merge.main([prefix]) == 1
    assert re.search("parts.bin: is already there; pass --overwrite", capsys.readouterr().err)
    assert merge.main([prefix, "--overwrite"]) == 0


def test_an_empty_shard_is_fine_and_all_empty_are_not(
    tmp_path: Path, run: Preprocess, capsys: pytest.CaptureFixture[str]
) -> None:
    long = make_record(30)
    path = write_jsonl(tmp_path / "a.jsonl", [long, BAD])
    for index in range(4):
        assert run("parts", [path], "--shard", f"{index}/4") == 0
    assert merge.main([str(tmp_path / "parts")]) == 0
    assert run("whole", [path]) == 0
    assert contents(tmp_path, "parts") == contents(tmp_path, "whole")
    bad = write_jsonl(tmp_path / "b.jsonl", [BAD] * 9)
    for index in range(2):
        assert run("none", [bad], "--shard", f"{index}/2") == 0
    capsys.readouterr()
    assert merge.main([str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert "all 9 sessions were rejected" in err
    assert "b.jsonl:1: no assistant message" in err
    assert not list(tmp_path.glob("none.[bij]*"))


def test_shards_that_do_not_go_together_are_refused(
    tmp_path: Path, run: Preprocess, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = str(tmp_path / "parts")

    def refused() -> str:
        capsys.readouterr()
        assert merge.main([prefix]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert not (tmp_path / "parts.json").exists()
        return err

    def shard(index: int, *flags: str) -> None:
        assert run("parts", corpus, "--shard", f"{index}/3", "--overwrite", *flags) == 0

    assert "parts: there is no" in refused()
    shard(0)
    shard(2)
    assert "parts.shard-00001-of-00003: the shard is missing; run its command" in refused()
    (tmp_path / "parts.shard-00001-of-00003.unfinished").mkdir()
    assert "parts.shard-00001-of-00003: the shard is not finished" in refused()
    shard(1, "--train-on", "last")
    assert "shard-00001-of-00003: is of another run than shard 0: --train-on was all, is last" in (
        refused()
    )
    shard(1, "--template", "chatml")
    assert "shard-00001-of-00003: is of another run than shard 0: the template is another" in (
        refused()
    )
    shard(1)
    index = tmp_path / "parts.shard-00001-of-00003.idx"
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    assert f"00001-of-00003.idx: has {len(whole) - 1:,} bytes, but the shard was" in refused()
    index.write_bytes(bytes(len(whole)))
    assert "00001-of-00003.idx: is not the index that the shard was written with" in refused()
    index.write_bytes(whole)
    assert run("parts", corpus, "--shard", "0/2") == 0
    assert "there are shards of 2 and of 3; remove those" in refused()
    for path in tmp_path.glob("parts.shard-*-of-00002*"):
        path.unlink()
    stamp = os.stat(corpus[0])
    with Path(corpus[0]).open("a") as stream:
        stream.write("\n")
    assert "a.jsonl: is missing or not the file that the shards were made of" in refused()
    os.truncate(corpus[0], stamp.st_size)
    unfinished = tmp_path / "parts.unfinished"
    unfinished.mkdir()
    (unfinished / "journal.json").write_text("{}")
    assert "parts.unfinished: is of a run without shards that was not finished" in refused()
    assert (unfinished / "journal.json").exists()
    shutil.rmtree(unfinished)
    os.utime(corpus[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert merge.main([prefix]) == 0


def test_the_tool_is_the_command(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "tools" / "merge.py"), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "x: there is no" in done.stderr
