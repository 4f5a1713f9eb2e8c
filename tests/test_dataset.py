"""MultiTurnDataset: splits, epochs, blends, the cached plan, and what it refuses."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split
from session_fixtures import make_record, megatron_tokenizer, tiny_sentencepiece, write_jsonl

from megatron_multiturn import dataset as dataset_module
from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.megatron_compat import build_blended_datasets
from megatron_multiturn.preprocess import main as preprocess
from megatron_multiturn.store import SessionStore
from megatron_multiturn.vocabulary import tokenizer_fingerprint

NUM_SESSIONS = 40
SEQUENCE_LENGTH = 128


def write_dataset(prefix: Path, num_sessions: int, first_turns: int = 1) -> str:
    records = [make_record(turns=first_turns + index % 3) for index in range(num_sessions)]
    source = write_jsonl(prefix.with_suffix(".jsonl"), records)
    command = ["--input", source, "--output-prefix", str(prefix), "--template", "chatml"]
    command += ["--tokenizer-type", "SentencePieceTokenizer"]
    command += ["--tokenizer-model", tiny_sentencepiece(), "--workers", "1"]
    assert preprocess(command) == 0
    return str(prefix)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "sessions", NUM_SESSIONS)


def make_config(cache: Path, prefix: str, **overrides: Any) -> MultiTurnDatasetConfig:
    fields: dict[str, Any] = {
        "random_seed": 5,
        "sequence_length": SEQUENCE_LENGTH,
        "blend": ([prefix], None),
        "split": "100,0,0",
        "path_to_cache": str(cache),
    }
    return MultiTurnDatasetConfig(**fields | overrides)


def make_dataset(
    config: MultiTurnDatasetConfig,
    prefix: str,
    *,
    num_samples: int | None = None,
    sessions: range = range(NUM_SESSIONS),
) -> MultiTurnDataset:
    store = MultiTurnDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(sessions.start, sessions.stop, dtype=np.int32)
    return MultiTurnDataset(store, prefix, indices, num_samples, Split.train, config)


def build(config: MultiTurnDatasetConfig, sizes: list[int | None]) -> list[Any]:
    return build_blended_datasets(MultiTurnDataset, sizes, lambda: True, config)


def sessions_of(dataset: MultiTurnDataset, rows: range) -> list[int]:
    pieces = np.concatenate([dataset.plan.pieces_of_row(row) for row in rows])
    return sorted(dataset.plan.pieces.session[pieces].tolist())


def test_an_epoch_holds_every_target_once(tmp_path: Path, prefix: str) -> None:
    rows = make_dataset(make_config(tmp_path, prefix), prefix)
    counts = SessionStore.open(prefix).manifest.counts
    assert sum(int(rows[i]["loss_mask"].sum()) for i in range(len(rows))) == counts.target_tokens
    assert sum(int(rows[i]["turn_num"][0]) for i in range(len(rows))) == counts.turns
    assert sessions_of(rows, range(len(rows))) == list(range(NUM_SESSIONS))
    assert len(rows) < NUM_SESSIONS


def test_what_the_rows_count_is_in_the_runs_unit(tmp_path: Path, prefix: str) -> None:
    config = make_config(tmp_path, prefix, loss_average="session", divisor_unit=64)
    rows = make_dataset(config, prefix)
    assert sum(int(rows[i]["turn_num"][0]) for i in range(len(rows))) == 64 * NUM_SESSIONS


def test_splits_share_out_the_sessions(tmp_path: Path, prefix: str) -> None:
    config = make_config(tmp_path, prefix, split="70,20,10")
    splits = build(config, [None, None, None])
    parts = [sessions_of(split, range(len(split))) for split in splits]
    assert [len(part) for part in parts] == [28, 8, 4]
    assert sorted(session for part in parts for session in part) == list(range(NUM_SESSIONS))


def test_epochs_repeat_the_sessions_with_other_neighbours(tmp_path: Path, prefix: str) -> None:
    config = make_config(tmp_path, prefix)
    one = make_dataset(config, prefix)
    two = make_dataset(config, prefix, num_samples=len(one) + 1)
    assert len(two) == 2 * len(one)
    for epoch in (range(len(one)), range(len(one), 2 * len(one))):
        assert sessions_of(two, epoch) == list(range(NUM_SESSIONS))
    neighbours = [set(two.plan.pieces_of_row(row).tolist()) for row in range(2 * len(one))]
    first_epoch, second_epoch = neighbours[: len(one)], neighbours[len(one) :]
    assert first_epoch == [set(one.plan.pieces_of_row(row).tolist()) for row in range(len(one))]
    assert sum(row in first_epoch for row in second_epoch) < len(one) / 2


def test_another_seed_is_another_order(tmp_path: Path, prefix: str) -> None:
    orders = [
        make_dataset(make_config(tmp_path, prefix, random_seed=seed), prefix).plan.row_pieces
        for seed in (1, 2)
    ]
    assert not np.array_equal(orders[0], orders[1])


def test_blend_by_weights(tmp_path: Path, prefix: str) -> None:
    other = write_dataset(tmp_path / "other", 10, first_turns=3)
    config = make_config(tmp_path / "cache", prefix, blend=([prefix, other], [0.75, 0.25]))
    train, valid, test = build(config, [100, 0, 0])
    assert (len(train), valid, test) == (100, None, None)
    origins = [int(train[i]["dataset_id"]) for i in range(100)]
    assert 70 <= origins.count(0) <= 80


def test_each_split_from_its_own_files(tmp_path: Path, prefix: str) -> None:
    other = write_dataset(tmp_path / "other", 10)
    config = make_config(
        tmp_path / "cache",
        prefix,
        blend=None,
        split=None,
        blend_per_split=[([prefix], None), ([other], None), None],
    )
    train, valid, test = build(config, [None, None, 0])
    assert sessions_of(train, range(len(train))) == list(range(NUM_SESSIONS))
    assert sessions_of(valid, range(len(valid))) == list(range(10))
    assert test is None


def test_the_plan_is_built_once(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, prefix)
    first = make_dataset(config, prefix)

    def never(*arguments: object) -> None:
        raise AssertionError("the plan was built again")

    monkeypatch.setattr(dataset_module, "_build_plan", never)
    again = make_dataset(replace(config, loss_average="token"), prefix)
    assert np.array_equal(again.plan.row_pieces, first.plan.row_pieces)
    assert again.plan.stats == first.plan.stats
    for changed in ({"random_seed": 6}, {"sequence_length": 256}, {"window_context": 0.5}):
        with pytest.raises(AssertionError, match="built again"):
            make_dataset(replace(config, **changed), prefix)


def test_what_became_of_the_sessions_is_said_at_every_start(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, prefix, sequence_length=48, long_session="truncate")
    logs = []
    for _ in range(2):
        make_dataset(config, prefix)
        logs.append(capsys.readouterr().out)
    assert "> Plan the train split of" in logs[0]
    assert "all ranks of this node wait for it" in logs[0]
    said = [log.splitlines()[-1].rpartition("; ") for log in logs]
    assert said[0][0] == said[1][0]
    assert said[0][2].startswith("planned in ")
    assert said[1][2].startswith("plan read in ")
    counts = r"40 sessions, \d+ longer .*turns lost; \d+ target tokens lost; .*pieces in \d+ rows"
    assert re.search(counts, said[0][0])


def test_a_rank_keeps_nothing_of_the_size_of_the_corpus(tmp_path: Path, prefix: str) -> None:
    rows = make_dataset(make_config(tmp_path, prefix), prefix, num_samples=500)
    assert len(rows.indices) == 0
    pieces = rows.plan.pieces
    for array in (rows.plan.row_offsets, rows.plan.row_pieces, pieces.session, pieces.num_tokens):
        assert isinstance(array.base, np.memmap)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_the_same_rows(tmp_path: Path, prefix: str, context: str) -> None:
    rows = make_dataset(make_config(tmp_path, prefix), prefix)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=2, multiprocessing_context=context
    )
    loaded = list(loader)
    assert len(loaded) == len(rows)
    for row, expected in zip(loaded, (rows[i] for i in range(len(rows))), strict=True):
        for name, array in expected.items():
            np.testing.assert_array_equal(row[name], array)


def test_the_plan_is_of_the_index_wherever_it_lies(tmp_path: Path, prefix: str) -> None:
    """A copy of a dataset, on another node or of another day, has the same plan."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"copy{suffix}")
    first = make_dataset(make_config(tmp_path / "cache", prefix), prefix)
    copy = str(tmp_path / "copy")
    second = make_dataset(make_config(tmp_path / "cache", copy), copy)
    assert len(list((tmp_path / "cache").glob("plan-*.json"))) == 1
    np.testing.assert_array_equal(first.plan.row_pieces, second.plan.row_pieces)


def test_a_plan_without_its_description_does_not_count(tmp_path: Path, prefix: str) -> None:
    config = make_config(tmp_path, prefix)
    expected = np.array(make_dataset(config, prefix).plan.row_pieces)
    (description,) = tmp_path.glob("plan-*.json")
    description.unlink()
    (arrays,) = tmp_path.glob("plan-*-row_pieces.npy")
    arrays.write_bytes(b"cut off")
    again = make_dataset(config, prefix)
    assert np.array_equal(again.plan.row_pieces, expected)


def test_an_unwritable_cache_is_said(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"cannot keep the pack plan.*--data-cache-path"):
        make_dataset(make_config(tmp_path / "file" / "cache", prefix), prefix)


def test_another_tokenizer_is_refused(tmp_path: Path, prefix: str) -> None:
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", tiny_sentencepiece())
    identity = tokenizer_fingerprint(tokenizer, "SentencePieceTokenizer")
    config = make_config(tmp_path, prefix, tokenizer_identity=identity)
    make_dataset(config, prefix)
    config = replace(config, tokenizer_identity=replace(identity, content_hash="0" * 64))
    with pytest.raises(DatasetError, match=r"made with another tokenizer.*preprocess"):
        make_dataset(config, prefix)


def test_an_empty_split_is_refused(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(DatasetError, match=r"train split .* holds none of its 40 sessions"):
        make_dataset(make_config(tmp_path, prefix), prefix, sessions=range(0), num_samples=8)


def test_all_sessions_dropped_is_refused(tmp_path: Path, prefix: str) -> None:
    config = make_config(tmp_path, prefix, sequence_length=8, long_session="drop")
    with pytest.raises(DatasetError, match="fills no row"):
        make_dataset(config, prefix)


def test_the_session_that_is_too_long_is_named(tmp_path: Path, prefix: str) -> None:
    config = make_config(tmp_path, prefix, sequence_length=64, long_session="error")
    with pytest.raises(DatasetError, match=r"begins at session 4 .*: session 1 has \d+ tokens"):
        make_dataset(config, prefix, sessions=range(4, 12))


def test_boundaries_can_be_lengthened(tmp_path: Path, prefix: str) -> None:
    rows = make_dataset(make_config(tmp_path, prefix), prefix)
    before = rows[0]["cu_seqlens"]
    rows.set_num_boundaries(len(before) + 3)
    after = rows[0]["cu_seqlens"]
    assert after.tolist() == before.tolist() + [SEQUENCE_LENGTH] * 3
