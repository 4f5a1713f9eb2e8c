"""Merged sessions train as their split samples do, on real Megatron.

The split form (tests/scripts/pretrain_and_record.py) shares no code with the package: a sample a
row, Megatron's own attention, its own mean over micro-batches. Every step is the whole data set,
so both forms take the same steps in exact arithmetic.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_jobs import (
    JobResult,
    make_dataset,
    relative_difference,
    train_and_record,
    train_sentencepiece,
)

STEPS = 3
SEQUENCE_LENGTH = 512
TOLERANCE = 1e-5


def own_sessions() -> list[dict[str, object]]:
    """Sessions of 1 to 4 turns, of short and long answers."""
    words = "red green blue one two three four five cat dog bird fish".split()
    sessions: list[dict[str, object]] = []
    for index in range(6):
        messages = []
        for turn in range(1 + index % 4):
            start = 3 * index + turn
            question = " ".join(words[(start + k) % 12] for k in range(3 + turn))
            answer = " ".join(words[(start * 5 + k) % 12] for k in range(1 + 7 * (start % 4)))
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        sessions.append({"messages": messages})
    return sessions


def real_sessions(shared_data: Path) -> list[dict[str, object]]:
    """The beginnings of some real sessions, three Chinese ones and three English ones."""
    sessions: list[dict[str, object]] = []
    for name, num_messages in (("smile", (2, 4, 6)), ("sgd", (5, 9, 13))):
        with (shared_data / name / "messages.jsonl").open(encoding="utf-8") as lines:
            for count, line in zip(num_messages, lines, strict=False):
                messages = [m for m in json.loads(line)["messages"] if m["role"] != "tool"]
                sessions.append({"messages": messages[:count]})
    return sessions


@pytest.fixture(scope="module", params=["own", "real"])
def data_flags(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    folder = tmp_path_factory.mktemp(f"data-{request.param}")
    if request.param == "own":
        sessions = own_sessions()
        texts = [m["content"] for s in sessions for m in s["messages"]]  # type: ignore[attr-defined]
        tokenizer = train_sentencepiece(folder, texts, vocab_size=60)
    else:
        shared_data = request.getfixturevalue("shared_data")
        shared_tokenizers = request.getfixturevalue("shared_tokenizers")
        sessions = real_sessions(shared_data)
        tokenizer = shared_tokenizers / "chinese-llama2-55k" / "tokenizer.model"
    return make_dataset(folder, sessions, tokenizer)


Job = Callable[..., JobResult]


@pytest.fixture(scope="module")
def job(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trains for STEPS steps, each on all samples; the same job is run once."""
    done: dict[tuple[str, str], JobResult] = {}
    flags = [*data_flags, "--seq-length", str(SEQUENCE_LENGTH)]
    flags += ["--max-position-embeddings", str(SEQUENCE_LENGTH), "--micro-batch-size", "1"]

    def run(form: str, average: str) -> JobResult:
        if (form, average) not in done:
            folder = tmp_path_factory.mktemp(f"{form}-{average}")
            samples = num_samples(Path(data_flags[-1]), form, average)
            ours = ["--loss-average", average, "--global-batch-size", str(samples)]
            if form == "split":
                ours += ["--dataset-provider", "megatron"]
            done[form, average] = train_and_record(
                folder, [*flags, *ours], train_iters=STEPS, env={"SPLIT_FORM": average}
            )
        return done[form, average]

    return run


def num_samples(prefix: Path, form: str, average: str) -> int:
    """Rows or split samples of one pass over the data."""
    from megatron_multiturn.packing import pack
    from megatron_multiturn.store import SessionStore
    from megatron_multiturn.windows import cut_sessions

    store = SessionStore.open(str(prefix))
    if form == "split":
        counts = store.manifest.counts
        return counts.sessions if average == "session" else counts.turns
    pieces, report = cut_sessions(
        store.session_lengths(),
        sequence_length=SEQUENCE_LENGTH,
        long_session="error",
        segment_index=store.segment_index(),
    )
    plan = pack(pieces, sequence_length=SEQUENCE_LENGTH, seed=0)
    assert plan.num_rows < report.num_sessions, "some sessions must share a row"
    return plan.num_rows


@pytest.mark.distributed
@pytest.mark.parametrize("average", ["turn", "session", "prefix"])
def test_packed_sessions_train_as_their_split_samples(job: Job, average: str) -> None:
    packed, split = job("packed", average), job("split", average)
    for ours, theirs in zip(packed.gradients, split.gradients, strict=True):
        assert relative_difference(ours, theirs) < TOLERANCE
    assert relative_difference(packed.parameters, split.parameters) < TOLERANCE
    for mine, theirs_ in zip(packed.losses, split.losses, strict=True):
        assert mine["lm loss"] == pytest.approx(theirs_["lm loss"], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("average", ["turn", "session", "prefix"])
def test_a_token_mean_does_not(job: Job, average: str) -> None:
    token, split = job("packed", "token"), job("split", average)
    for ours, theirs in zip(token.gradients, split.gradients, strict=True):
        assert relative_difference(ours, theirs) > 1e-2
    assert relative_difference(token.parameters, split.parameters) > 100 * TOLERANCE
