"""A run that is killed goes on with the very rows that an unbroken run would have had."""

import argparse
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from megatron_jobs import (
    MODEL_FLAGS,
    SCRIPT,
    make_dataset,
    run_ranks,
    train_sentencepiece,
    word_sessions,
)

from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.resume import check_goes_on, describe_plan

pytestmark = pytest.mark.distributed

NOTING_SCRIPT = SCRIPT.with_name("pretrain_and_note.py")

FLAGS = (
    "--seq-length 64 --max-position-embeddings 64 --lr 1e-2 --min-lr 1e-2 "
    "--lr-decay-style constant --weight-decay 0 --clip-grad 0 --adam-eps 1e-3 --seed 7 "
    "--split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1 --no-one-logger"
).split()


@dataclass(frozen=True, slots=True)
class Notes:
    """What a job noted: by the rows consumed before the step."""

    rows: dict[int, Counter[str]]
    losses: dict[int, float]
    epochs: dict[int, float]


def run_noting(folder: Path, flags: Sequence[str], num_ranks: int) -> Notes:
    """A job of `num_ranks` data parallel ranks; what it noted, also if it was killed."""
    run_ranks(
        [str(NOTING_SCRIPT), *MODEL_FLAGS, *FLAGS, *flags],
        num_ranks,
        {"RECORD_DIR": str(folder)},
        folder,
    )
    return read_notes(folder)


def read_notes(folder: Path) -> Notes:
    rows: dict[int, Counter[str]] = {}
    for file in folder.glob("rows-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            rows.setdefault(line["consumed"], Counter()).update(line["rows"])
    steps = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return Notes(
        rows=rows,
        losses={step["consumed"]: step["lm loss"] for step in steps},
        epochs={step["consumed"]: step["epoch"] for step in steps},
    )


def kill_when(folder: Path, num_steps: int, num_ranks: int) -> threading.Thread:
    """Once a job has done so many steps, and is in the middle of the next, SIGKILL its ranks."""

    def watch() -> None:
        losses = folder / "losses.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if losses.exists() and len(losses.read_text().splitlines()) >= num_steps:
                for rank in range(num_ranks):
                    os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Two datasets, of 110 and of 50 sessions of unlike lengths; the flags to train on each way."""
    folder = tmp_path_factory.mktemp("resume")
    lengths = [
        [1 + (7 * index + 5 * turn) % 13 for turn in range(1 + index % 3)] for index in range(160)
    ]
    sessions = word_sessions(lengths)
    texts = [str(message) for session in sessions for message in session["messages"]]  # type: ignore[attr-defined]
    model = train_sentencepiece(folder, texts, 120)
    one = make_dataset(folder / "one", sessions[:110], model)
    other = make_dataset(folder / "other", sessions[110:], model)
    return {"one": one, "blend": [*one[:-1], "0.7", one[-1], "0.3", other[-1]]}


GROWING = ["--step-batch-size-schedule", f"0:4 {64 * 30}:8", "--train-samples"]
STEADY = ["--global-batch-size", "8", "--train-iters"]


@pytest.mark.parametrize(
    ("which", "length", "before", "after"),
    [
        pytest.param("one", (STEADY, 9, 12), (2, 2, 0), (1, 4, 2), id="2 ranks, then 1"),
        pytest.param("blend", (STEADY, 12, 12), (1, 4, 0), (2, 1, 0), id="1 rank, then 2, a blend"),
        pytest.param("one", (GROWING, 80, 80), (2, 1, 0), (1, 4, 1), id="a growing batch"),
    ],
)
def test_killed_and_resumed_it_sees_what_an_unbroken_run_sees(
    which: str,
    length: tuple[list[str], int, int],
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    tmp_path: Path,
    data: dict[str, list[str]],
) -> None:
    """Also if it was to be shorter, and with other ranks, micro-batches and loader workers."""
    length_flags, shorter, whole = length
    common = [*data[which], "--data-cache-path", str(tmp_path / "cache")]

    def flags(layout: tuple[int, int, int], total: int) -> list[str]:
        _, micro_batch_size, num_workers = layout
        micro = ["--micro-batch-size", str(micro_batch_size), "--num-workers", str(num_workers)]
        return [*common, *micro, *length_flags, str(total)]

    unbroken = run_noting(tmp_path / "unbroken", flags(before, whole), before[0])

    saved = tmp_path / "saved"
    saving = ["--save", str(saved), "--save-interval", "4"]
    killer = kill_when(tmp_path / "killed", 6, before[0])
    with pytest.raises(AssertionError, match=r"rank \d failed"):
        run_noting(tmp_path / "killed", [*flags(before, shorter), *saving], before[0])
    killer.join()
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "4"
    killed = read_notes(tmp_path / "killed")
    assert 6 <= len(killed.losses) < len(unbroken.losses)

    going_on = [*flags(after, whole), "--load", str(saved), "--override-opt-param-scheduler"]
    resumed = run_noting(tmp_path / "resumed", going_on, after[0])

    starts = sorted(unbroken.losses)
    assert len(starts) >= 12
    assert sorted(resumed.losses) == starts[4:]  # from the checkpoint on
    for start in starts:
        runs = [run for run in (killed, resumed) if start in run.losses]
        assert runs
        for run in runs:
            assert run.rows[start] == unbroken.rows[start]
            assert run.losses[start] == pytest.approx(unbroken.losses[start], rel=2e-5)
            assert run.epochs[start] == pytest.approx(unbroken.epochs[start], rel=1e-6)
    assert max(unbroken.epochs.values()) > 1.5  # over the end of an epoch
    assert unbroken.losses[starts[-1]] < unbroken.losses[starts[0]]  # and it did learn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: dict[str, list[str]]) -> Path:
    """Two steps of a run, saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    flags = [*data["one"], "--micro-batch-size", "4", *STEADY, "2", "--num-workers", "0"]
    flags += ["--save", str(folder / "saved"), "--save-interval", "2"]
    run_noting(folder / "run", [*flags, "--data-cache-path", str(folder / "cache")], 1)
    return folder / "saved"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", "8"], r"--seed: 7 in the checkpoint, now 8\n"),
        (
            ["--global-batch-size", "4"],
            r"--global-batch-size: 8 from row 0 in the checkpoint, now 4 from row 0\n",
        ),
        (["--seq-length", "48"], r"--seq-length: 64 in the checkpoint, now 48\n"),
        (["--long-session", "drop"], r"--long-session: window in the checkpoint, now drop\n"),
        (["--session-window", "32"], r"--session-window: None in the checkpoint, now 32\n"),
        (["--no-balance-data-parallel"], r"--no-balance-data-parallel: False .* now True\n"),
        (["other data"], r"the data: \['110 sessions of .*now \['50 sessions of "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_plan_is_refused(
    changed: list[str], message: str, tmp_path: Path, checkpoint: Path, data: dict[str, list[str]]
) -> None:
    flags = [*data["one"], "--micro-batch-size", "4", *STEADY, "4", "--num-workers", "0"]
    flags += ["--load", str(checkpoint), "--override-opt-param-scheduler"]
    flags += ["--data-cache-path", str(tmp_path / "cache")]
    if changed == ["other data"]:
        changed = ["--data-path", data["blend"][-1]]
    with pytest.raises(AssertionError, match="rank 0 failed") as refusal:
        run_noting(tmp_path, [*flags, *changed], 1)
    assert re.search(
        r"(?s)error on rank 0: the checkpoint was trained with another plan", str(refusal.value)
    )
    assert re.search(message, str(refusal.value))
    others = re.findall(r"^  \S.* in the checkpoint, now", str(refusal.value), re.M)
    assert len(others) <= 2  # what was changed, and not everything that follows from it
    notes = run_noting(tmp_path / "anew", [*flags, *changed, "--finetune"], 1)
    assert min(notes.losses) == 0


@pytest.mark.parametrize("layout", ["", "--pipeline-model-parallel-size 2"])
def test_nodes_whose_copies_of_the_data_differ_are_refused(
    layout: str, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    for rank, name in enumerate(("one", "blend")):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copyfile(data[name][-1] + suffix, tmp_path / f"copy-{rank}{suffix}")
    flags = [*data["one"][:-1], str(tmp_path / "copy-@"), "--micro-batch-size", "2", *STEADY, "2"]
    flags += ["--num-workers", "0", "--data-cache-path", str(tmp_path / "cache-@"), *layout.split()]
    script = str(SCRIPT.with_name("node_local_data.py"))
    with pytest.raises(AssertionError, match="rank 0 failed") as refusal:
        run_ranks([script, *MODEL_FLAGS, *FLAGS, *flags], 2, {}, tmp_path / "logs")
    assert re.search(
        r"(?s)ranks read different rows:\n.*^  the data: \['110 sessions .* on rank 0, \['50 "
        r"sessions .* on rank 1\n",
        str(refusal.value),
        re.MULTILINE,
    )


PLAN = {"--seed": "7", "the data": "a", "the rows themselves": "['ab']", "made by": "version 1"}


def test_rows_that_another_version_makes_are_refused() -> None:
    check_goes_on(PLAN, PLAN)
    check_goes_on(PLAN | {"made by": "version 2"}, PLAN)  # the same rows
    with pytest.raises(ConfigError) as refusal:
        check_goes_on(PLAN | {"made by": "version 2", "the rows themselves": "['cd']"}, PLAN)
    assert "the rows themselves: ['ab'] in the checkpoint, now ['cd']\n" in str(refusal.value)
    assert "made by: version 1 in the checkpoint, now version 2\n" in str(refusal.value)
    assert "--seed" not in str(refusal.value)
    # What a later version asks besides says nothing of an earlier one's checkpoint.
    check_goes_on(PLAN | {"--new-flag": "1"}, PLAN)


def test_a_checkpoint_that_says_nothing_of_its_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not say which rows it was trained on.*--finetune"):
        check_goes_on(PLAN, {})


def test_a_run_that_begins_is_compared_with_nothing() -> None:
    check_goes_on(PLAN)


def test_what_says_the_same_in_other_words_is_the_same(
    tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """Shares of a blend and of a split, and where the data lie."""
    from megatron.core.datasets.utils import Split

    moved = [tmp_path / f"{name}.copy" for name in ("one", "other")]
    prefixes = [data["one"][-1], data["blend"][-1]]
    for prefix, copy in zip(prefixes, moved, strict=True):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copyfile(prefix + suffix, f"{copy}{suffix}")

    def plan(
        blend: tuple[list[str], list[float]], split: str, num_sessions: int = 40
    ) -> dict[str, str]:
        config = MultiTurnDatasetConfig(
            random_seed=7,
            sequence_length=64,
            blend=blend,
            split=split,
            path_to_cache=str(tmp_path / "cache"),
        )
        leaves = []
        for prefix in blend[0]:
            store = MultiTurnDataset.build_low_level_dataset(prefix, config)
            indices = np.arange(num_sessions, dtype=np.int32)
            leaves.append(MultiTurnDataset(store, prefix, indices, None, Split.train, config))
        return describe_plan(argparse.Namespace(datasets=leaves), config)

    here = plan((prefixes, [0.7, 0.3]), "80,20,0")
    assert here == plan(([str(copy) for copy in moved], [7.0, 3.0]), "8,1,1")
    changed = {
        "the sessions trained on": plan((prefixes, [0.7, 0.3]), "80,20,0", num_sessions=39),
        "the weights in --data-path": plan((prefixes, [0.8, 0.2]), "80,20,0"),
    }
    for name, other in changed.items():
        differs = {key for key in here if here[key] != other[key]} - {"the rows themselves"}
        assert differs == {name}
