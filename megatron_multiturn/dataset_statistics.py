"""What a dataset holds and what it would weigh: the tables of `megatron-multiturn-inspect --stats`.

Everything comes from the `.idx` and the manifest; no token is read and no tokenizer needed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.averages import LOSS_AVERAGES, weigh_turns
from megatron_multiturn.packing import PackStats
from megatron_multiturn.store import SessionStore
from megatron_multiturn.targets import target_runs
from megatron_multiturn.windows import CutReport

PERCENTILES = (0, 1, 10, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetTurns:
    """All turns of a dataset that have a target, in the order of their sessions."""

    tokens_per_session: NDArray[np.int64]  # (num_sessions,)
    turns_per_session: NDArray[np.int64]  # (num_sessions,)
    targets_per_turn: NDArray[np.int64]  # (num_turns,)
    turn_weights: NDArray[np.float64] | None  # (num_turns,): None for 1 each


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShares:
    """How the loss is shared out among turns, by their number of target tokens."""

    least_targets: NDArray[np.int64]  # (num_buckets,): 1, 2, 4, 8, ...: where a bucket begins
    num_turns: NDArray[np.int64]  # (num_buckets,)
    num_targets: NDArray[np.int64]  # (num_buckets,)
    shares: dict[str, NDArray[np.float64]]  # of each average, (num_buckets,), adding up to 1


def dataset_turns(store: SessionStore) -> DatasetTurns:
    first_segments, segment_lengths, modes = store.segment_index()
    runs = target_runs(np.diff(first_segments), segment_lengths, modes)
    return DatasetTurns(
        tokens_per_session=store.session_lengths(),
        turns_per_session=np.bincount(runs.session[runs.first_run], minlength=store.num_sessions),
        targets_per_turn=runs.sum_by_turn(runs.end - runs.begin),
        turn_weights=runs.weights(modes, store.manifest.turn_weights),
    )


def loss_shares(turns: DatasetTurns) -> LossShares:
    """Shares in the loss of a whole epoch, every session in one piece."""
    num_targets = turns.targets_per_turn
    turns_before = np.cumsum(turns.turns_per_session) - turns.turns_per_session
    turn_in_session = np.arange(len(num_targets)) - turns_before.repeat(turns.turns_per_session)
    bucket = np.frexp(num_targets)[1] - 1  # floor(log2(num_targets))
    num_buckets = int(bucket.max(initial=-1)) + 1
    shares = {}
    for average in LOSS_AVERAGES:
        loss_token_num, _ = weigh_turns(
            average,
            num_targets=num_targets,
            session_targets=num_targets,
            turn_in_session=turn_in_session,
            turns_per_piece=turns.turns_per_session,
            turn_weights=turns.turn_weights,
        )
        weight = np.bincount(bucket, num_targets / loss_token_num, minlength=num_buckets)
        shares[average] = weight / max(1.0, weight.sum())
    return LossShares(
        least_targets=2 ** np.arange(num_buckets),
        num_turns=np.bincount(bucket, minlength=num_buckets),
        num_targets=np.bincount(bucket, num_targets, minlength=num_buckets).astype(np.int64),
        shares=shares,
    )


def format_statistics(
    store: SessionStore, sequence_length: int, report: CutReport, packed: PackStats
) -> str:
    """The whole of `--stats`, for a plan at `sequence_length`."""
    turns = dataset_turns(store)
    blocks = [
        _overview(store, turns),
        _percentiles(turns),
        f"packed at --seq-length {sequence_length:,}\n  {packed}\n  "
        + str(report).replace("; ", "\n  "),
        _shares_table(loss_shares(turns)),
    ]
    return "\n\n".join(blocks)


def _overview(store: SessionStore, turns: DatasetTurns) -> str:
    manifest = store.manifest
    num_sessions, num_turns = store.num_sessions, len(turns.targets_per_turn)
    num_tokens = int(turns.tokens_per_session.sum())
    num_targets = int(turns.targets_per_turn.sum())
    without = int((turns.turns_per_session == 0).sum())
    rows = [
        ("sessions", f"{num_sessions:,}" + (f", {without:,} without a turn" if without else "")),
        ("turns", f"{num_turns:,}, {num_turns / num_sessions:.1f} a session"),
        ("tokens", f"{num_tokens:,}, {num_tokens / num_sessions:,.0f} a session"),
        ("target tokens", f"{num_targets:,}, {num_targets / num_tokens:.1%} of all tokens"),
        ("template", manifest.template.name),
        ("tokenizer", f"{manifest.tokenizer.type}, {manifest.tokenizer.vocab_size:,} tokens"),
    ]
    if rejected := manifest.counts.rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.items())
        rows.append(("rejected", f"{sum(rejected.values()):,} sessions: {reasons}"))
    return "\n".join([store.prefix, *(f"  {name:<15}{text}" for name, text in rows)])


def _percentiles(turns: DatasetTurns) -> str:
    heads = ["min", *(f"{p}%" for p in PERCENTILES[1:-1]), "max", "mean"]
    lines = [f"{'percentiles':<24}" + "".join(f"{head:>9}" for head in heads)]
    for name, values in (
        ("tokens a session", turns.tokens_per_session),
        ("turns a session", turns.turns_per_session),
        ("target tokens a turn", turns.targets_per_turn),
    ):
        if not len(values):
            continue
        cells = [f"{v:,.0f}" for v in np.percentile(values, PERCENTILES, method="lower")]
        cells.append(f"{values.mean():,.1f}")
        lines.append(f"  {name:<22}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def _shares_table(shares: LossShares) -> str:
    columns = ["turns", "targets", *LOSS_AVERAGES]
    widths = [max(9, len(column) + 2) for column in columns]
    lines = [
        "share of the loss, by target tokens of the turn, under each --loss-average",
        f"  {'target tokens':<14}"
        + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)),
    ]
    for bucket in np.flatnonzero(shares.num_turns).tolist():
        least = int(shares.least_targets[bucket])
        name = f"{least:,}-{2 * least - 1:,}" if least > 1 else "1"
        cells = [f"{shares.num_turns[bucket]:,}", f"{shares.num_targets[bucket]:,}"]
        cells += [f"{shares.shares[average][bucket]:.1%}" for average in LOSS_AVERAGES]
        lines.append(
            f"  {name:<14}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )
    return "\n".join(lines)
