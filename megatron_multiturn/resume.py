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
import torch

from megatron_multiturn._version import __version__
from megatron_multiturn.blends import leaves_of, plan_digest
from megatron_multiturn.dataset import MultiTurnDatasetConfig
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.row_order import BalancedRows
from megatron_multiturn.store import Manifest

# The name in Megatron's arguments.
PLAN_ARGUMENT = "multiturn_plan"

_ROWS, _VERSIONS = "the rows themselves", "made by"

_NO_PLAN = 2**62  # above every number of a plan

_checkpoint_plan: dict[str, str] | None = None


def remember_checkpoint(checkpoint_args: argparse.Namespace) -> None:
    """Keep what the checkpoint's arguments say of its plan until the datasets are there."""
    global _checkpoint_plan
    _checkpoint_plan = getattr(checkpoint_args, PLAN_ARGUMENT, {})


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
        "the sessions trained on": [
            f"{len(leaf.sessions)} from {leaf.sessions.start}" for leaf in leaves
        ],
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

    before: the checkpoint's plan, empty if it has none; by default what `remember_checkpoint` has
    kept. Nothing is compared if nothing was: the run begins, or begins anew.
    """
    before = _checkpoint_plan if before is None else before
    if before is None:
        return
    if not before:
        raise ConfigError(
            "the checkpoint does not say which rows it was trained on: it was made by other "
            "datasets, or by an older version of this plugin, so that rows could be seen twice and "
            "others never; pass --finetune to begin anew from its weights"
        )
    differs = [name for name in plan if name in before and plan[name] != before[name]]
    changed = [name for name in differs if name not in (_ROWS, _VERSIONS)]
    if not changed and _ROWS in differs:
        changed = [_ROWS, _VERSIONS]
    if changed:
        lines = [
            f"  {name}: {before[name]} in the checkpoint, now {plan[name]}" for name in changed
        ]
        raise ConfigError(
            "the checkpoint was trained with another plan of rows; with this one, rows would be "
            "seen twice and others never:\n" + "\n".join(lines) + "\nput it back, or pass "
            "--finetune to begin anew from the checkpoint's weights"
        )


def agree_on_plan(plan: Mapping[str, str] | None) -> None:
    """Raise ConfigError on every rank if the plans of those that have one differ; collective.

    Each node reads its own files: a copy of the data that differs would give ranks other rows of
    one epoch, and pipeline stages other pieces of one row.
    """
    mine = [_NO_PLAN, _NO_PLAN] if plan is None else [_number_of(plan), -_number_of(plan)]
    extremes = torch.tensor(mine, device="cuda")
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MIN)
    lowest, negated = extremes.tolist()
    if lowest == -negated or lowest == _NO_PLAN:
        return
    plans: list[Mapping[str, str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(plans, plan)
    of_ranks = [(rank, found) for rank, found in enumerate(plans) if found is not None]
    first, expected = of_ranks[0]
    rank, other = next((rank, found) for rank, found in of_ranks if found != expected)
    lines = [
        f"  {name}: {expected[name]} on rank {first}, {other.get(name)} on rank {rank}"
        for name in expected
        if other.get(name) != expected[name]
    ]
    raise ConfigError(
        "ranks read different rows:\n" + "\n".join(lines) + "\nput the same data, flags and "
        "versions on every node"
    )


def _number_of(plan: Mapping[str, str]) -> int:
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _shares(weights: Sequence[float]) -> list[float]:
    return [round(weight / sum(weights), 9) for weight in weights]


def _content(manifest: Manifest) -> str:
    """A dataset by what its manifest says of it; not by where its files lie."""
    content = asdict(manifest) | {"inputs": [entry.sha256 for entry in manifest.inputs]}
    del content["tool_version"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    counts = manifest.counts
    return f"{counts.sessions:,} sessions of {counts.tokens:,} tokens ({digest})"
