"""One objective however the job is cut: same seed and data, many layouts of real Megatron."""

from pathlib import Path

import pytest
from megatron_jobs import (
    JobResult,
    make_dataset,
    read_record,
    relative_difference,
    train_and_record,
    train_sentencepiece,
)

STEPS = 2
GLOBAL_BATCH_SIZE = 4
FLAGS = (
    "--num-layers 4 --seq-length 64 --max-position-embeddings 64 "
    f"--global-batch-size {GLOBAL_BATCH_SIZE}"
)

# Layout: (ranks, flags beside --micro-batch-size 1).
LAYOUTS = {
    "micro-batch 2": (1, "--micro-batch-size 2"),
    "micro-batch 4": (1, "--micro-batch-size 4"),
    "DP2": (2, "--micro-batch-size 1"),
    "DP2, micro-batch 2": (2, "--micro-batch-size 2"),
    "DP4": (4, "--micro-batch-size 1"),
    "TP2": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2"),
    "PP2": (2, "--micro-batch-size 1 --pipeline-model-parallel-size 2"),
    "PP2, 2 virtual stages": (
        2,
        "--micro-batch-size 1 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
    "TP2, PP2": (
        4,
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
}


def sessions() -> list[dict[str, object]]:
    """28 sessions; one has 12 turns of one word, some have one turn of 30, one is nearly empty."""
    words = "red green blue one two three four five cat dog bird fish".split()
    made: list[dict[str, object]] = []
    for index in range(28):
        messages = []
        num_turns, num_words = ((12, 1), (1, 30), (2, 5), (3, 3))[index % 4 if index % 7 else 0]
        for turn in range(num_turns):
            answer = " ".join(words[(index + 5 * turn + k) % 12] for k in range(num_words))
            messages += [
                {"role": "user", "content": words[(index + turn) % 12]},
                {"role": "assistant", "content": answer},
            ]
        made.append({"messages": messages})
    return made


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    texts = [m["content"] for s in sessions() for m in s["messages"]]  # type: ignore[attr-defined]
    return make_dataset(folder, sessions(), train_sentencepiece(folder, texts, vocab_size=60))


@pytest.fixture(scope="module")
def one_rank(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run on one rank with micro-batches of one row."""
    folder = tmp_path_factory.mktemp("one-rank")
    train(folder, data_flags, 1, "--micro-batch-size 1")
    return folder


def train(
    folder: Path, data_flags: list[str], num_ranks: int, layout: str, initial: Path | None = None
) -> JobResult:
    return train_and_record(
        folder,
        [*data_flags, *FLAGS.split(), *layout.split()],
        train_iters=STEPS,
        num_ranks=num_ranks,
        env={"INITIAL_PARAMETERS": str(initial)} if initial else None,
    )


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(
    layout: str, data_flags: list[str], one_rank: Path, tmp_path: Path
) -> None:
    num_ranks, flags = LAYOUTS[layout]
    expected = read_record(one_rank, STEPS)
    result = train(tmp_path, data_flags, num_ranks, flags, initial=one_rank / "initial")
    for ours, theirs in zip(result.gradients, expected.gradients, strict=True):
        assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(result.parameters, expected.parameters) < 1e-5
    for mine, other in zip(result.losses, expected.losses, strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


@pytest.mark.distributed
def test_rows_differ_so_that_a_mean_of_means_would_show(
    data_flags: list[str], one_rank: Path
) -> None:
    """The divisor of each row is another one: the layouts above average unlike rows."""
    import numpy as np

    from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig

    config = MultiTurnDatasetConfig(
        random_seed=7,
        sequence_length=64,
        blend=([data_flags[-1]], None),
        split="100,0,0",
        path_to_cache=str(one_rank / "cache"),
    )
    store = MultiTurnDataset.build_low_level_dataset(data_flags[-1], config)
    from megatron.core.datasets.utils import Split

    indices = np.arange(store.num_sessions, dtype=np.int32)
    rows = MultiTurnDataset(
        store, data_flags[-1], indices, STEPS * GLOBAL_BATCH_SIZE, Split.train, config
    )
    turns = [int(rows[i]["turn_num"][0]) for i in range(STEPS * GLOBAL_BATCH_SIZE)]
    assert len(set(turns)) >= 3
    assert max(turns) > 3 * min(turns)
