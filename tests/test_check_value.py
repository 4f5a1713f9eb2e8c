"""How each average weighs the turns of sessions {a} and {a, b, c}: gradients on real Megatron.

The gradient of a run on both sessions must be the weighted sum of the gradients of a, of b and of
c alone, each from a run in which nothing else is trained.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron_jobs import (
    make_dataset,
    relative_difference,
    train_and_record,
    train_sentencepiece,
)

WEIGHTS = {
    "turn": (2 / 4, 1 / 4, 1 / 4),
    "session": (2 / 3, 1 / 6, 1 / 6),
    "prefix": (17 / 24, 5 / 24, 1 / 12),
}
TURNS = {"a": ("one two", "red"), "b": ("three", "green blue"), "c": ("four five", "cat dog bird")}
FLAGS = "--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 1"


def session(turns: str, trained: str) -> dict[str, object]:
    """A session of the named turns, in which only `trained` ones are scored."""
    messages: list[dict[str, object]] = []
    for turn in turns:
        question, answer = TURNS[turn]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "train": turn in trained})
    return {"messages": messages}


Gradient = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def gradient(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Gradient]:
    """The gradient of one step on all the given sessions, in one row, by some average."""
    folder = tmp_path_factory.mktemp("check-value")
    texts = [text for pair in TURNS.values() for text in pair]
    tokenizer = train_sentencepiece(folder, texts, vocab_size=40)

    def run(name: str, sessions: list[dict[str, object]], average: str) -> Gradient:
        data = make_dataset(folder / name, sessions, tokenizer)
        flags = [*data, *FLAGS.split(), "--loss-average", average]
        job_folder: Path = folder / f"{name}-{average}"
        return train_and_record(job_folder, flags, train_iters=1).gradients[0]

    return run


@pytest.fixture(scope="module")
def alone(gradient: Callable[..., Gradient]) -> list[Gradient]:
    """The gradients of a, b and c; a is the first turn of both sessions."""
    return [
        gradient("only-a", [session("a", "a")], "turn"),
        gradient("only-b", [session("abc", "b")], "turn"),
        gradient("only-c", [session("abc", "c")], "turn"),
    ]


def weighted_sum(gradients: list[Gradient], weights: tuple[float, ...]) -> Gradient:
    return {
        name: sum(w * g[name] for w, g in zip(weights, gradients, strict=True))  # type: ignore[misc]
        for name in gradients[0]
    }


@pytest.mark.distributed
@pytest.mark.parametrize("average", WEIGHTS)
def test_weights_of_turns(
    average: str, gradient: Callable[..., Gradient], alone: list[Gradient]
) -> None:
    both = gradient(f"both-{average}", [session("a", "a"), session("abc", "abc")], average)
    for name, weights in WEIGHTS.items():
        difference = relative_difference(both, weighted_sum(alone, weights))
        if name == average:
            assert difference < 1e-5
        else:
            assert difference > 1e-2
