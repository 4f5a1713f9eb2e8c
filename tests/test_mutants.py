"""Mistakes that the comparison with the oracle must see: each is far beyond its tolerance."""

from pathlib import Path

import pytest
from layout_reference import assert_agrees, errors, reference, run_layout
from layouts import Layout
from megatron_jobs import SCRIPT

pytestmark = pytest.mark.distributed

MUTANTS_SCRIPT = SCRIPT.with_name("mutants.py")
MUTANTS = [
    ("divisor_of_every_cp_rank", Layout("llama", "CP2 mb4")),
    ("mean_of_micro_batch_means", Layout("llama", "mb4")),
    ("token_mean", Layout("llama", "mb4")),
    ("shifted_mask", Layout("llama", "mb4")),
    ("leaking_attention", Layout("llama", "mb4")),
]


@pytest.mark.parametrize(("name", "layout"), MUTANTS, ids=[name for name, _ in MUTANTS])
def test_mutant_is_seen(name: str, layout: Layout, tmp_path: Path) -> None:
    result = run_layout(tmp_path, layout, script=MUTANTS_SCRIPT, env={"MUTANT": name})
    found = errors(result, reference(layout.model), layout.model)
    # Far more than 100 times what the layout tests allow.
    assert min(found.gradients) > 0.1
    assert found.moves > 0.1


def test_without_a_mutant_all_is_well(tmp_path: Path) -> None:
    layout = Layout("llama", "CP2 mb4")
    result = run_layout(tmp_path, layout, script=MUTANTS_SCRIPT, env={"MUTANT": "nothing"})
    assert_agrees(errors(result, reference(layout.model), layout.model))
