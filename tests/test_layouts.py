"""On every layout of real Megatron, training is what the float64 oracle says it is.

A step's global batch is the whole data set (`layout_sessions`), so the oracle (`oracle`) knows
what is in it without knowing of rows. Gradients and parameters are those of all ranks, put
together. The quick layouts run always; the long list is marked slow.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from layout_reference import (
    GRADIENT_TOLERANCE,
    MOVE_TOLERANCE,
    all_sessions,
    assert_agrees,
    data_flags,
    errors,
    oracle_of,
    reference,
    run_layout,
)
from layout_sessions import NUM_ROWS, SEED, SEQUENCE_LENGTH, build_layout_dataset
from layouts import ADAM, QUICK_LAYOUTS, SLOW_LAYOUTS, STEPS, Layout

from megatron_multiturn.batches import BatchSchedule
from megatron_multiturn.row_order import balance_rows

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "layout",
    [
        *QUICK_LAYOUTS,
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS),
    ],
    ids=str,
)
def test_layout_computes_what_the_oracle_does(layout: Layout, tmp_path: Path) -> None:
    result = run_layout(tmp_path, layout)
    found = errors(result, reference(layout.model), layout.model)
    print(found)  # what is reached, for pytest -rP
    assert_agrees(found)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["session", "token"])
def test_other_averages(average: str, tmp_path: Path) -> None:
    layout = Layout("llama", "CP2 DP2 mb1")
    result = run_layout(tmp_path, layout, flags=["--loss-average", average])
    expected = oracle_of("llama", [all_sessions()] * STEPS, average=average)
    assert_agrees(errors(result, expected, "llama"))
    # The turn mean is another objective.
    assert min(errors(result, reference("llama"), "llama").gradients) > 100 * GRADIENT_TOLERANCE


@pytest.mark.slow
def test_gradient_clipping(tmp_path: Path) -> None:
    """The norm that is clipped is that of the whole gradient, tied parameters once."""
    layout, clip_norm = Layout("gpt2", "TP2 PP2 DP2 mb2 sharded-optimizer"), 0.5
    result = run_layout(tmp_path, layout, flags=["--clip-grad", str(clip_norm)])
    adam = replace(ADAM, clip_norm=clip_norm)
    expected = oracle_of("gpt2", [all_sessions()] * STEPS, adam=adam)
    assert_agrees(errors(result, expected, "gpt2"))
    assert errors(result, reference("gpt2"), "gpt2").moves > 100 * MOVE_TOLERANCE


@pytest.mark.parametrize("words", ["mb1", pytest.param("DP2 mb2", marks=pytest.mark.slow)])
def test_batch_size_ramp_up(words: str, tmp_path: Path) -> None:
    """Half the rows, the other half, then all: each batch is a mean over its own turns."""
    half, layout = NUM_ROWS // 2, Layout("gpt2", words)
    schedule = f"0:{half} {NUM_ROWS * SEQUENCE_LENGTH}:{NUM_ROWS}"  # tokens seen: rows a step
    result = run_layout(
        tmp_path,
        layout,
        batch_flags=["--step-batch-size-schedule", schedule],
        num_rows=2 * NUM_ROWS,
        balance=True,
    )
    dataset = build_layout_dataset(data_flags()[-1], 2 * NUM_ROWS)
    plan = dataset.plan
    ordered = balance_rows(
        dataset,
        BatchSchedule(((0, half), (NUM_ROWS, NUM_ROWS))),
        seed=SEED,
        micro_batch_size=1,
        has_weights=False,
        folder=tmp_path,
    )
    steps = [range(half), range(half, NUM_ROWS), range(NUM_ROWS, 2 * NUM_ROWS)]
    rows = [[ordered.row_at(index) for index in step] for step in steps]
    batches = [
        [
            all_sessions()[session]
            for row in rows_of_step
            for session in plan.pieces.session[plan.pieces_of_row(row)]
        ]
        for rows_of_step in rows
    ]
    assert_agrees(errors(result, oracle_of("gpt2", batches), "gpt2"))
