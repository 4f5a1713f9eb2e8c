"""A run that goes on from a checkpoint must go on with the rows that it had not seen.

What decides which rows come when is written into the arguments, which Megatron keeps in every
checkpoint, and compared when a run goes on from one. How many iterations there are, and on which
layout, is none of it: a plan that lasts longer begins with the shorter one.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_multiturn._version import __version__
from megatron_multiturn.blends import leaves_of, plan_digest
from megatron_multiturn.dataset import MultiTurnDatasetConfig
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.row_order import BalancedRows
from megatron_multiturn.store import Manifest

# The name in Megatron's arguments.
PLAN_ARGUMENT = "multiturn_plan"

_ROWS, _VERSIONS = "the rows themselves", "made by"

_checkpoint_plan: dict[str, str] | None = None


def remember_checkpoint(checkpoint_args: argparse.Namespace) -> None:
    """Keep what the checkpoint's arguments say of its plan until the datasets are there."""
    global _checkpoint_plan
    _checkpoint_plan = getattr(checkpoint_args, PLAN_ARGUMENT, None)


def describe_plan(rows: Any, config: MultiTurnDatasetConfig) -> dict[str, str]:
    """What decides which rows come when, by the flag that sets it, and what came of it.

    rows: the training dataset. Where the data lie is left out: they may be moved.
    """
    balanced = rows if isinstance(rows, BalancedRows) else None
    leaves = leaves_of(rows)
    blend = config.blend or (config.blend_per_split or [None])[0]
    digests = [plan_digest(leaf.plan) for leaf in leaves]
    if balanced is not None:
        digests.append(balanced.digest())
    plan = {
        "--seed": config.random_seed,
        "--seq-length": config.sequence_length,
        "--split, training on": config.split_matrix[0] if config.split_matrix else None,
        "the weights in --data-path": _shares(blend[1]) if blend and blend[1] else None,
        "the data": [_content(leaf.dataset.manifest) for leaf in leaves],
        "--long-session": config.long_session,
        "--session-window": config.session_window,
        "--window-context": config.window_context,
        "--context-parallel-size, whose pieces are a multiple of": config.piece_multiple,
        "--no-balance-data-parallel": balanced is None,
        "--global-batch-size": None if balanced is None else str(balanced.schedule),
        _ROWS: digests,
        _VERSIONS: f"version {__version__} and NumPy {np.__version__}",
    }
    return {name: str(value) for name, value in plan.items()}


def check_goes_on(plan: Mapping[str, str], before: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError, naming each difference, if the checkpoint had another plan.

    before: the checkpoint's plan; by default what `remember_checkpoint` has kept. Nothing is
    compared if there is none: the run begins, or its checkpoint was not made with these rows.
    """
    before = _checkpoint_plan if before is None else before
    if before is None:
        return
    differs = [name for name in plan if plan[name] != before.get(name)]
    changed = [name for name in differs if name not in (_ROWS, _VERSIONS)]
    if not changed and _ROWS in differs:
        changed = [_ROWS, _VERSIONS]
    if changed:
        lines = [
            f"  {name}: {before.get(name, 'nothing')} in the checkpoint, now {plan[name]}"
            for name in changed
        ]
        raise ConfigError(
            "the checkpoint was trained with another plan of rows; with this one, rows would be "
            "seen twice and others never:\n" + "\n".join(lines) + "\nput it back, or pass "
            "--finetune to begin anew from the checkpoint's weights"
        )


def _shares(weights: Sequence[float]) -> list[float]:
    return [round(weight / sum(weights), 9) for weight in weights]


def _content(manifest: Manifest) -> str:
    """A dataset by what its manifest says of it; not by where its files lie."""
    content = asdict(manifest) | {"inputs": [entry.sha256 for entry in manifest.inputs]}
    del content["tool_version"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    counts = manifest.counts
    return f"{counts.sessions:,} sessions of {counts.tokens:,} tokens ({digest})"
