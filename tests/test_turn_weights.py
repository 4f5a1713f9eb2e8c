"""Weights of turns, from records to the arrays of a row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from session_fixtures import tiny_hugging_face

from megatron_multiturn import preprocess
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.merge import merge_shards
from megatron_multiturn.modes import TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.samples import RowFormat, build_row
from megatron_multiturn.store import SessionStore, manifest_of
from megatron_multiturn.turn_weights import TurnWeights


def modes_of(*numbers: int | None) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Targets with the number of their weight; None for context that begins a message."""
    return np.array(
        [0b1100 if number is None else TARGET_BEGIN | number << 2 for number in numbers], np.int8
    )


def test_numbers_are_given_in_the_order_of_the_segments() -> None:
    weights = TurnWeights()
    modes = weights.renumber(modes_of(None, 2, 0, 1, 2), (1.0, 0.5, 3.0, 9.0))
    assert modes.tolist() == modes_of(None, 1, 0, 2, 1).tolist()
    assert list(weights.values) == [1.0, 3.0, 0.5]
    again = weights.renumber(modes_of(1, None, 2), (1.0, 0.25, 0.5))
    assert again.tolist() == modes_of(3, None, 2).tolist()
    assert list(weights.values) == [1.0, 3.0, 0.5, 0.25]
    unweighted = modes_of(None, 0)
    assert weights.renumber(unweighted, (1.0,)) is unweighted
    gap = np.array([TARGET_CONTINUE | 1 << 2], dtype=np.int8)
    assert weights.renumber(gap, (1.0, 0.25)).tolist() == [TARGET_CONTINUE | 3 << 2]


def test_all_numbers_fit_into_a_mode() -> None:
    weights = TurnWeights(range(1, 33))
    modes = weights.renumber(modes_of(31), range(1, 33))
    assert modes.tolist() == modes_of(31).tolist()
    with pytest.raises(ConfigError, match=r"more than 32 different weights.*last 33; round them"):
        weights.number_of(33)


def record(*weights: float | None) -> str:
    messages: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        answer = {"role": "assistant", "content": f"answer {number}"}
        messages.append({"role": "user", "content": f"question {number}"})
        messages.append(answer if weight is None else answer | {"weight": weight})
    return json.dumps({"messages": messages}) + "\n"


def run(source: Path, prefix: Path, *flags: str) -> int:
    return preprocess.main(
        [
            *("--input", str(source), "--output-prefix", str(prefix)),
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", tiny_hugging_face()),
            *(flags or ("--template", "chatml")),
        ]
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("is_jinja", [False, True])
def test_records_weigh_the_rows(tmp_path: Path, is_jinja: bool) -> None:
    """The loss of a row is the weighted mean over its turns."""
    source = tmp_path / "in.jsonl"
    source.write_text(record(None, 0.5, 0) + record(2, 0.5))
    flags: tuple[str, ...] = ()
    if is_jinja:
        (tmp_path / "chatml.jinja").write_text(CHATML)
        flags = ("--chat-template", str(tmp_path / "chatml.jinja"))
    assert run(source, tmp_path / "out", *flags) == 0
    store = SessionStore.open(str(tmp_path / "out"))
    assert store.manifest.turn_weights == (1.0, 0.5, 2.0)
    assert manifest_of(str(tmp_path / "out"), None) == store.manifest
    assert store.manifest.counts.turns == 4
    row_format = RowFormat(
        sequence_length=512,
        max_pieces_per_row=2,
        pad_token=0,
        divisor_unit=2,
        turn_weights=store.manifest.turn_weights,
    )
    spans = np.array([(0, 0, 0, len(store.session(i).tokens)) for i in range(2)], dtype=np.int32)
    row = build_row(store.read_pieces(np.arange(2), spans), spans, row_format)
    assert row["turn_num"].tolist() == [2 * (1 + 0.5 + 2 + 0.5)]
    turns = row["turn_index"] + 10 * (np.arange(512) >= row["cu_seqlens"][1])
    on = row["loss_mask"] > 0
    weights = 1 / row["loss_token_num"][on] / 2
    sums = {int(turn): weights[turns[on] == turn].sum() for turn in np.unique(turns[on])}
    assert sums == pytest.approx({1: 1, 2: 0.5, 11: 2, 12: 0.5}, rel=1e-6)


def test_shards_number_weights_as_one_run_does(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rng = np.random.default_rng(0)
    drawn = rng.choice([1, 0.5, 2, 0.25, 3, 0, 0.125, 7], size=(200, 3)).tolist()
    source.write_text("".join(record(*weights, None) for weights in drawn))
    assert run(source, tmp_path / "whole", "--template", "chatml", "--workers", "2") == 0
    for index in range(3):
        flags = ("--template", "chatml", "--shard", f"{index}/3")
        assert run(source, tmp_path / "parts", *flags) == 0
    merge_shards(str(tmp_path / "parts"), overwrite=False)
    for suffix in (".bin", ".idx", ".json"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        assert whole == (tmp_path / f"parts{suffix}").read_bytes()
    assert len(manifest_of(str(tmp_path / "whole"), None).turn_weights) == 7


def test_too_many_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(record(*(number / 8 for number in range(1, 35))))
    assert run(source, tmp_path / "out") == 1
    assert "more than 32 different weights" in capsys.readouterr().err
