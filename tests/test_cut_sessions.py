"""Batches that hold parts of sessions, on real Megatron: each is a mean of what it holds.

All answers have as many tokens, so every average of a batch weighs all of its tokens alike, and
its objective is the plain token mean, whatever pieces of cut sessions came together in it.
"""

from pathlib import Path

import pytest
from megatron_jobs import make_dataset, train_and_record, train_sentencepiece

WORDS = "red green blue one two three four five".split()
FLAGS = "--seq-length 48 --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 1"


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cut")
    sessions: list[dict[str, object]] = []
    for first in range(4):
        messages = []
        for turn in range(12):
            messages += [
                {"role": "user", "content": WORDS[(first + turn) % 8]},
                {"role": "assistant", "content": f"{WORDS[first]} {WORDS[turn % 8]}"},
            ]
        sessions.append({"messages": messages})
    # One token a word, so that all answers are of one length.
    tokenizer = train_sentencepiece(folder, WORDS, vocab_size=11, model_type="word")
    return make_dataset(folder, sessions, tokenizer)


@pytest.mark.distributed
@pytest.mark.parametrize("average", ["session", "session-token", "prefix", "sqrt"])
def test_every_batch_is_a_mean(data_flags: list[str], average: str, tmp_path: Path) -> None:
    flags = [*data_flags, *FLAGS.split(), "--loss-average", average]
    result = train_and_record(tmp_path, flags, train_iters=6)
    assert "4 cut into" in (tmp_path / "rank-0.log").read_text()
    for losses in result.losses:
        if average == "prefix":  # earlier turns weigh more, also in a part of a session
            assert losses["lm loss"] == pytest.approx(losses["token loss"], rel=0.2)
        else:
            assert losses["lm loss"] == pytest.approx(losses["token loss"], rel=1e-5)
