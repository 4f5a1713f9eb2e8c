"""The disk format: against Megatron's own reader and writer, and what is refused."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_multiturn.batch_checks import count_targets
from megatron_multiturn.encoding import EncodedSession, join_encoded
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.index_file import read_index, smallest_token_dtype, write_index
from megatron_multiturn.manifest import InputFile, TemplateIdentity
from megatron_multiturn.session_writer import SessionWriter
from megatron_multiturn.store import SessionStore
from megatron_multiturn.vocabulary import TokenizerIdentity

TEMPLATE = TemplateIdentity(name="firefly", content_hash="t" * 8)


def identity(vocab_size: int) -> TokenizerIdentity:
    return TokenizerIdentity(type="T", vocab_size=vocab_size, content_hash="h" * 8)


def encoded(lengths: list[int], modes: list[int], first_id: int = 0) -> EncodedSession:
    return EncodedSession(
        tokens=np.arange(first_id, first_id + sum(lengths), dtype=np.int32),
        segment_lengths=np.array(lengths, dtype=np.int32),
        modes=np.array(modes, dtype=np.int8),
        location=f"in.jsonl:{first_id}",
    )


SESSIONS = [
    encoded([2, 3], [4, 1], 10),
    encoded([1, 1, 4, 2, 1], [12, 4, 1, 0, 2], 20),
    encoded([6], [1], 30),
]


def write(prefix: Path, vocab_size: int = 100, sessions: Any = SESSIONS) -> str:
    with SessionWriter(str(prefix), tokenizer=identity(vocab_size), template=TEMPLATE) as writer:
        for session in sessions:
            writer.add(join_encoded([session]), [session.location])
        writer.describe(
            rejected={"b": 2, "a": 1},
            inputs=[InputFile(path="in.jsonl", num_bytes=5, sha256="0" * 64)],
        )
    return str(prefix)


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_files_are_those_of_megatrons_builder(tmp_path: Path, vocab_size: int) -> None:
    from megatron_multiturn.megatron_compat import IndexedDatasetBuilder

    prefix = write(tmp_path / "ours", vocab_size)
    dtype = np.uint16 if vocab_size == 100 else np.int32
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype, multimodal=True)
    for session in SESSIONS:
        lengths, modes = session.segment_lengths.tolist(), session.modes.tolist()
        builder.add_document(session.tokens, lengths, modes)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_the_token_dtype_is_megatrons_choice() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (1, 65_499, 65_500, 65_536, 151_665):
        assert smallest_token_dtype(size) == np.dtype(DType.optimal_dtype(size))


def test_stock_megatron_reads_it(tmp_path: Path) -> None:
    from megatron_multiturn.megatron_compat import IndexedDataset

    stock = IndexedDataset(write(tmp_path / "data"), multimodal=True)
    assert stock.document_indices.tolist() == [0, 2, 7, 8]
    for number, session in enumerate(SESSIONS):
        first, last = stock.document_indices[number : number + 2]
        segments, modes = stock[first:last]
        assert np.concatenate(segments).tolist() == session.tokens.tolist()
        assert modes.tolist() == session.modes.tolist()


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_written_is_read(tmp_path: Path, mmap: bool) -> None:
    store = SessionStore.open(write(tmp_path / "data"), mmap=mmap)
    for reopened in (store, pickle.loads(pickle.dumps(store))):
        assert reopened.num_sessions == 3
        assert reopened.session_lengths().tolist() == [5, 9, 6]
        assert reopened.session_lengths().dtype == np.int64
        for index, session in enumerate(SESSIONS):
            found = reopened.session(index)
            assert found.tokens.tolist() == session.tokens.tolist()
            assert found.tokens.dtype == np.int32
            assert found.segment_lengths.tolist() == session.segment_lengths.tolist()
            assert found.modes.tolist() == session.modes.tolist()
    first_segments, lengths, modes = store.segment_index()
    assert first_segments.tolist() == [0, 2, 7, 8]
    assert lengths.tolist() == [2, 3, 1, 1, 4, 2, 1, 6]
    assert modes.tolist() == [4, 1, 12, 4, 1, 0, 2, 1]
    dtypes = [array.dtype.name for array in (first_segments, lengths, modes)]
    assert dtypes == ["int64", "int32", "int8"]
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of 3 in"):
            store.session(index)


def _sum_in_child(store: SessionStore, results: Any) -> None:
    results.put(int(store.session(1).tokens.sum()))


def test_a_store_is_good_after_a_fork(tmp_path: Path) -> None:
    store = SessionStore.open(write(tmp_path / "data"))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_sum_in_child, args=(store, results))
    child.start()
    assert results.get(timeout=30) == SESSIONS[1].tokens.sum() == store.session(1).tokens.sum()
    child.join()


def test_the_manifest_counts(tmp_path: Path) -> None:
    manifest = SessionStore.open(write(tmp_path / "data")).manifest
    counts = manifest.counts
    assert (counts.sessions, counts.segments, counts.turns, counts.tokens) == (3, 8, 3, 20)
    assert counts.target_tokens == 3 + (4 + 1) + (6 - 1)  # nothing predicts a first token
    assert counts.rejected == {"a": 1, "b": 2}
    assert manifest.turn_weights == (1.0,)
    assert manifest.tokenizer == identity(100)
    assert manifest.template == TEMPLATE
    assert manifest.inputs[0].path == "in.jsonl"
    assert manifest.bin_bytes == 40


@pytest.mark.parametrize(
    ("lengths", "modes", "expected"),
    [
        ([2], [1], (1, 1)),
        ([1], [1], (0, 0)),
        ([1, 3], [1, 1], (1, 3)),  # the first turn has only the first token
        ([1, 1, 3], [1, 0, 2], (1, 3)),
        ([2, 2, 2, 2], [4, 1, 0, 2], (1, 4)),
        ([2, 2], [4, 1 | 3 << 2], (1, 2)),  # with a weight of its own
        ([2], [4], (0, 0)),
    ],
)
def test_turns_and_target_tokens(
    lengths: list[int], modes: list[int], expected: tuple[int, int]
) -> None:
    assert count_targets(join_encoded([encoded(lengths, modes)])) == expected


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (encoded([1, 1], [4, 1], 99), "in.jsonl:99: token id 100 .* vocabulary of 100 tokens"),
        (encoded([1, 1], [4, 1], -1), "in.jsonl:-1: token id -1 is not in the vocabulary"),
        (encoded([2], [1 | 1 << 2], 7), "in.jsonl:7: turn weight number 1 of 1 weights"),
        (encoded([], [], 7), "in.jsonl:7: a session needs tokens"),
        (encoded([2, 0], [4, 1], 7), "every segment at least one"),
    ],
)
def test_bad_sessions_are_refused_and_leave_nothing(
    tmp_path: Path, session: EncodedSession, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        write(tmp_path / "data", sessions=[SESSIONS[0], session])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["data.bin", "data.idx", "data.json"]

    def broken_sessions() -> Any:
        yield SESSIONS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(Path(prefix), sessions=broken_sessions())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no session to write"):
        write(tmp_path / "data", sessions=[])
    assert list(tmp_path.iterdir()) == []


def test_no_manifest_vouches_for_half_replaced_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "data")
    replaced: list[str] = []

    def replace_once(source: str, target: str) -> None:
        if replaced:
            raise OSError("killed here")
        replaced.append(target)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(OSError, match="killed here"):
        write(Path(prefix), sessions=SESSIONS[:2])
    assert replaced == [prefix + ".bin"]
    with pytest.raises(DatasetError, match="no manifest"):
        SessionStore.open(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_cut_off_or_missing_file_is_refused(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "data")
    path = Path(prefix + suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match=f"{suffix}: {len(whole) - 1} bytes, .* {len(whole)}: "):
        SessionStore.open(prefix)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{suffix}: cannot be read"):
        SessionStore.open(prefix)


def test_an_index_of_another_run_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    path = Path(prefix + ".idx")
    whole = path.read_bytes()
    path.write_bytes(b"X" + whole[1:])
    with pytest.raises(DatasetError, match="not an index of Megatron's"):
        SessionStore.open(prefix)
    manifest = Path(prefix + ".json")
    path.write_bytes(whole)
    value = json.loads(manifest.read_text())
    value["counts"]["sessions"] = 4
    manifest.write_text(json.dumps(value))
    with pytest.raises(DatasetError, match="3 sessions and 8 segments, but the manifest says 4"):
        SessionStore.open(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no manifest, so .*data is no complete dataset.*preprocess"),
        ("{", "no manifest of a preprocessed dataset"),
        ("[]", "no manifest of a preprocessed dataset"),
        ({"format_version": 1}, "format version 1, but this version of the package reads 2"),
        ({"bin_bytes": "40"}, "'bin_bytes' is '40'"),
        ({"counts": {}}, "no manifest of a preprocessed dataset"),
        ({"turn_weights": []}, "0 turn weights"),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    prefix = write(tmp_path / "data")
    path = Path(prefix + ".json")
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DatasetError, match=message):
        SessionStore.open(prefix)


def test_the_index_of_many_sessions_is_read_as_arrays(tmp_path: Path) -> None:
    """Chunked offsets and vectorised lengths, where a loop over sessions would take minutes."""
    num_sessions = 1_000_000
    lengths = np.random.default_rng(0).integers(1, 500, 2 * num_sessions, dtype=np.int32)
    with (tmp_path / "x.idx").open("wb") as stream:
        write_index(
            stream,
            token_dtype=np.dtype(np.int32),
            segment_lengths=lengths,
            first_segments=np.arange(0, 2 * num_sessions + 1, 2, dtype=np.int64),
            modes=np.zeros(2 * num_sessions, dtype=np.int8),
        )
    index = read_index(str(tmp_path / "x.idx"))
    ends = np.cumsum(lengths, dtype=np.int64) * 4
    assert np.array_equal(index.byte_offsets, ends - lengths * np.int64(4))
    assert np.array_equal(index.segment_lengths, lengths)
