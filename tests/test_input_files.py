"""What --input names, and files of every packing, whole and broken."""

import codecs
import datetime
import decimal
import gzip
import importlib
import io
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from session_fixtures import make_record, write_jsonl

from megatron_multiturn import records
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.input_files import expand_inputs, open_decoded
from megatron_multiturn.record_blocks import FilePart
from megatron_multiturn.records import check_input_files, read_blocks, read_records
from megatron_multiturn.sessions import Session, read_sessions

RECORDS = [make_record(turns, id=f"山{turns}") for turns in (1, 2, 3)]


def zstd(data: bytes, **options: Any) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    packed: bytes = zstandard.ZstdCompressor(**options).compress(data)
    return packed


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


def values(path: Path | str) -> list[Any]:
    return [json.loads(record.data) for record in read_records(str(path))]


def locations(path: Path | str) -> list[str]:
    return [record.location.removeprefix(str(path)) for record in read_records(str(path))]


def as_jsonl() -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in RECORDS).encode()


def as_list() -> bytes:
    return json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("content", [as_jsonl(), as_list(), codecs.BOM_UTF8 + as_jsonl()])
def test_files_are_known_by_their_first_bytes(tmp_path: Path, pack: Any, content: bytes) -> None:
    (tmp_path / "plain").write_bytes(content)
    path = tmp_path / "named-as-you-like"
    path.write_bytes(pack(content))
    check_input_files([str(path)])
    assert values(path) == RECORDS
    assert locations(path) == locations(tmp_path / "plain")


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_members_and_frames_follow_each_other(tmp_path: Path, pack: Any) -> None:
    lines = as_jsonl().splitlines(keepends=True)
    path = tmp_path / "in"
    path.write_bytes(
        pack(b"") + pack(lines[0] + lines[1][:9]) + pack(lines[1][9:]) + pack(lines[2])
    )
    assert values(path) == RECORDS
    assert locations(path) == [":1", ":2", ":3"]


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_packed_files_that_break_off_are_refused(tmp_path: Path, pack: Any) -> None:
    noise = random.Random(1)
    lines = [json.dumps({"text": noise.randbytes(40).hex()}) for _ in range(20_000)]
    options = {"write_checksum": True} if pack is zstd else {}
    whole = pack("\n".join(lines).encode(), **options)
    path = tmp_path / "in"
    for cut in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"in: the \w+ file breaks off or is broken .*again"):
            values(path)
    path.write_bytes(whole[:1000] + bytes(200) + whole[1200:])
    with pytest.raises(ConfigError, match="breaks off or is broken"):
        locations(path)


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_what_unfolds_to_much_is_read_in_pieces(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "in"
    path.write_bytes(pack(b" \n" * (1 << 25) + b'{"a": 1}'))
    assert path.stat().st_size < 1 << 17
    assert values(path) == [{"a": 1}]
    assert locations(path) == [f":{(1 << 25) + 1}"]
    with open_decoded(str(path)) as stream:
        assert len(stream.read(1000)) == 1000


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MAX_RECORD_CHARACTERS", 1 << 20)
    path = tmp_path / "in"
    path.write_bytes(b'{"a": 1}\n' + b"x" * (1 << 21))
    with pytest.raises(ConfigError, match="in:2: the line has more than 1 MiB; one line is one"):
        values(path)


def test_a_line_may_be_a_list_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text('["q", "a"]\n["r", "b"]\n')
    assert values(path) == [["q", "a"], ["r", "b"]]
    path.write_text('[["q", "a"],\n["r", "b"]]\n')
    assert values(path) == [["q", "a"], ["r", "b"]]
    assert locations(path) == [":1 (item 1)", ":2 (item 2)"]


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in", RECORDS, row_group_size=2)
    check_input_files([path])
    assert values(path) == RECORDS
    assert locations(path) == [":1 (row group 1)", ":2 (row group 1)", ":3 (row group 2)"]


def test_parquet_fields_that_are_null_are_not_there(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    call = {"name": "f", "arguments": {"x": 1}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}], "tools": None},
        {"messages": [{"role": "user", "content": "q", "tool_calls": None}], "tools": "[]"},
        {"messages": [{"role": "user", "arguments": [None, 1]}], "tools": None},
    ]
    path = write_parquet(tmp_path / "in", rows)
    found = values(path)
    assert found[0] == {"messages": rows[0]["messages"]}
    assert found[1] == {"messages": [{"role": "user", "content": "q"}], "tools": "[]"}
    assert found[2] == {"messages": [{"role": "user", "arguments": [None, 1]}]}
    pairs = pyarrow.array([[("k", 1)]], type=pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"map": pairs}), path)
    assert values(path) == [{"map": {"k": 1}}]


def test_parquet_values_that_json_lacks(tmp_path: Path) -> None:
    row = {
        "text": "山".encode(),
        "image": b"\xff\xfe",
        "day": datetime.date(2024, 5, 1),
        "at": datetime.datetime(2024, 5, 1, 12, 30),
        "took": datetime.timedelta(seconds=3),
        "price": decimal.Decimal("1.50"),
    }
    assert values(write_parquet(tmp_path / "in", [row])) == [
        {
            "text": "山",
            "image": {"binary bytes": 2},
            "day": "2024-05-01",
            "at": "2024-05-01T12:30:00",
            "took": "0:00:03",
            "price": "1.50",
        }
    ]


def test_parquet_text_that_is_no_text_is_a_bad_session(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = pyarrow.array([b"good", b"b\xffd", b"fine"]).view(pyarrow.string())
    path = str(tmp_path / "in")
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table({"text": texts}), path)
    first, bad, last = read_sessions([path])
    assert isinstance(first, Session)
    assert isinstance(last, Session)
    assert last.location == f"{path}:3 (row group 1)"
    assert isinstance(bad, SessionError)
    assert bad.reason == "not-utf8"
    assert str(bad).startswith(f"{path}:2 (row group 1): byte 0xff at position 1 is not UTF-8")


def test_parquet_values_that_python_lacks(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    far = pyarrow.array([1 << 60], type=pyarrow.timestamp("ms"))
    path = str(tmp_path / "in")
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table({"at": far}), path)
    with pytest.raises(ConfigError, match=r"in:1: in or behind this row .*without that column"):
        values(path)


def test_parquet_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = Path(write_parquet(tmp_path / "in", RECORDS))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"in: the Parquet file is broken, or .* write it again"):
        values(path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ConfigError, match=r"in: is a Parquet file in a compressed one.*unpack it"):
        check_input_files([str(path)])
    pyarrow = pytest.importorskip("pyarrow")
    empty = pyarrow.table({"text": pyarrow.array([], type=pyarrow.string())})
    importlib.import_module("pyarrow.parquet").write_table(empty, path)
    with pytest.raises(ConfigError, match="in: the file holds no row; leave it out of --input"):
        values(path)


@pytest.mark.parametrize(
    ("start", "module", "message"),
    [
        (b"PAR1", "pyarrow", "is a Parquet file, which needs .*`pip install pyarrow`, or write"),
        (b"\x28\xb5\x2f\xfd", "zstandard", "is a zstd file, which needs .*zstandard`, or unpack"),
    ],
)
def test_what_needs_a_package_says_so_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, module: str, message: str
) -> None:
    path = tmp_path / "in"
    path.write_bytes(start + bytes(100))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        check_input_files([str(path)])


def test_names_stand_for_files_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json.gz", "c.PARQUET", "sub/z.ndjson.zst", "sub/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for hidden in (".a.jsonl", ".git/x.json"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    folder = str(tmp_path)

    def named(*names: str) -> list[str]:
        return [os.path.relpath(path, folder) for path in expand_inputs(names)]

    assert named(folder) == ["a.json.gz", "b.jsonl", "c.PARQUET", "sub/z.ndjson.zst"]
    assert named(folder + "/*.js*", folder + "/sub") == ["a.json.gz", "b.jsonl", "sub/z.ndjson.zst"]
    assert named(folder + "/**/*.zst") == ["sub/z.ndjson.zst"]
    assert named(folder + "/b.jsonl", folder + "/a.json.gz") == ["b.jsonl", "a.json.gz"]
    (tmp_path / "x[1].jsonl").touch()
    assert named(folder + "/x[1].jsonl") == ["x[1].jsonl"]  # a file is not taken for a pattern


def test_names_that_stand_for_nothing_or_twice(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"no file in this folder ends in .json, .*\*.txt"):
        expand_inputs([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"\*.jsonl: no file matches; check --input"):
        expand_inputs([str(tmp_path / "*.jsonl")])
    assert expand_inputs([str(tmp_path / "gone")]) == [str(tmp_path / "gone")]
    with pytest.raises(ConfigError, match="gone: no such file"):
        check_input_files([str(tmp_path / "gone")])
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(ConfigError, match=r"a.jsonl: is named twice .*weigh it in --data-path"):
        expand_inputs([path, str(tmp_path)])
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(ConfigError, match="is named twice"):
        expand_inputs([str(tmp_path)])


def test_unreadable_folders_are_found(tmp_path: Path) -> None:
    def walk(folder: str, onerror: Any) -> Any:
        onerror(PermissionError(13, "Permission denied", folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "walk", walk)
        with pytest.raises(ConfigError, match=r"cannot be searched \(Permission denied\)"):
            expand_inputs([str(tmp_path)])


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_blocks_know_how_much_of_the_file_is_read(tmp_path: Path, pack: Any) -> None:
    noise = random.Random(1)
    lines = [json.dumps({"text": noise.randbytes(200).hex()}) for _ in range(40_000)]
    path = tmp_path / "in"
    path.write_bytes(pack("\n".join(lines).encode()))
    positions = [block.raw_position for block in read_blocks(FilePart.whole(str(path)))]
    assert len(positions) > 4
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size
    assert positions[0] < path.stat().st_size / 2


def test_sessions_are_the_same_from_every_packing(tmp_path: Path) -> None:
    packings = {"gzip": gzip.compress(as_list()), "zstd": zstd(as_jsonl()), "plain": as_jsonl()}
    for name, content in packings.items():
        (tmp_path / name).write_bytes(content)
    write_parquet(tmp_path / "parquet", RECORDS)
    read = {}
    for name in (*packings, "parquet"):
        sessions = list(read_sessions([str(tmp_path / name)]))
        read[name] = [one.messages for one in sessions if isinstance(one, Session)]
    assert len(read["plain"]) == len(RECORDS)
    assert all(messages == read["plain"] for messages in read.values())


def test_a_reader_gives_back_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(gzip.compress(b"x"))
    stream = open_decoded(str(path))
    assert isinstance(stream, io.BufferedReader)
    stream.close()
    assert stream.closed


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    start=st.sampled_from([b"", b"[", b'["', b"[{", b"\xef\xbb\xbf", b"\x1f\x8b\x08", b"PAR1"]),
    content=st.one_of(
        st.binary(max_size=80),
        st.text(st.sampled_from('[]{}":, \n\ta1\\'), max_size=60).map(str.encode),
        st.binary(max_size=60).map(gzip.compress),
    ),
    packed=st.booleans(),
    cut=st.integers(0, 12),
)
def test_any_bytes_are_read_or_refused(
    tmp_path: Path, start: bytes, content: bytes, packed: bool, cut: int
) -> None:
    data = start + content
    data = gzip.compress(data) if packed else data
    path = tmp_path / "in"
    path.write_bytes(data[: len(data) - cut] if cut < 6 else data)
    try:
        outcomes = list(read_sessions([str(path)]))
    except ConfigError as error:
        outcomes = []
        refused = str(error)
    else:
        refused = f"{path}: nothing"
    for said in (refused, *(str(one) for one in outcomes if isinstance(one, SessionError))):
        assert re.match(re.escape(str(path)) + r":[^\n]*$", said)
