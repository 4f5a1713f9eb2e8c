"""Plans on disk: built by one process, mapped by all."""

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_multiturn.packing import PackPlan, pack
from megatron_multiturn.plan_cache import CachedPlan, PlanKey, cached_plan
from megatron_multiturn.windows import CutReport, cut_sessions

KEY = PlanKey(
    dataset_hash="x",
    sessions=(0, 50),
    num_samples=None,
    seed=1,
    sequence_length=64,
    piece_multiple=1,
    long_session="window",
    session_window=None,
    window_context=0.25,
)


def build() -> tuple[PackPlan, CutReport]:
    lengths = np.random.default_rng(0).integers(1, 60, 50)
    index = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int8))
    pieces, report = cut_sessions(
        lengths, sequence_length=64, long_session="error", segment_index=index
    )
    return pack(pieces, sequence_length=64, seed=1), report


def never() -> tuple[PackPlan, CutReport]:
    raise AssertionError("built again")


def _arrays(cached: CachedPlan) -> list[Any]:
    plan = cached.plan
    return [plan.row_offsets, plan.row_pieces, plan.pieces.session, plan.pieces.num_tokens]


def test_what_is_built_is_what_is_read(tmp_path: Path) -> None:
    built = cached_plan(tmp_path, KEY, build)
    read = cached_plan(tmp_path, KEY, never)
    assert (built.built_here, read.built_here) == (True, False)
    assert read.report == built.report == build()[1]
    assert read.plan.stats == built.plan.stats == build()[0].stats
    for one, other in zip(_arrays(built), _arrays(read), strict=True):
        np.testing.assert_array_equal(one, other)
    assert read.plan.pieces.cut_spans.shape == (0, 4)


def test_all_processes_share_the_maps(tmp_path: Path) -> None:
    """Also the one that built it: no rank holds a plan of its own."""
    for cached in (cached_plan(tmp_path, KEY, build), cached_plan(tmp_path, KEY, never)):
        for array in _arrays(cached):
            assert isinstance(array.base, np.memmap)
            assert not array.flags.writeable


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_damaged_plan_is_made_again(damage: str, tmp_path: Path) -> None:
    built = _arrays(cached_plan(tmp_path, KEY, build))
    (rows,) = tmp_path.glob("plan-*-row_pieces.npy")
    if damage == "removed":
        rows.unlink()
    else:
        rows.write_bytes(rows.read_bytes()[:-1])
    again = cached_plan(tmp_path, KEY, build)
    assert again.built_here
    for one, other in zip(built, _arrays(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_part_of_the_key_names_another_plan() -> None:
    changes: dict[str, Any] = {
        "dataset_hash": "y",
        "sessions": (0, 49),
        "num_samples": 7,
        "seed": 2,
        "sequence_length": 128,
        "piece_multiple": 2,
        "long_session": "drop",
        "session_window": 9,
        "window_context": 0.5,
    }
    assert changes.keys() == set(PlanKey.__dataclass_fields__)
    names = {replace(KEY, **{name: value}).digest() for name, value in changes.items()}
    assert len(names | {KEY.digest()}) == len(changes) + 1


def _build_slowly(folder: Path, builders: Any, results: Any) -> None:
    def slow() -> tuple[PackPlan, CutReport]:
        with builders.get_lock():
            builders.value += 1
        time.sleep(1)
        return build()

    cached = cached_plan(folder, KEY, slow)
    results.put((cached.built_here, cached.plan.row_pieces.tolist()))


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    builders, results = context.Value("i", 0), context.Queue()
    processes = [
        context.Process(target=_build_slowly, args=(tmp_path, builders, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert builders.value == 1
    assert sum(built_here for built_here, _ in found) == 1
    assert all(rows == found[0][1] for _, rows in found)


def test_a_build_that_fails_leaves_nothing_that_counts(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="built again"):
        cached_plan(tmp_path, KEY, never)
    assert cached_plan(tmp_path, KEY, build).built_here
