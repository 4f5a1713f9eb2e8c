"""What a training run of the quickstart shows: its progress and its closing summary.

Both read the lines that Megatron itself logs.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_multiturn.errors import DatasetError
from megatron_multiturn.modes import begins_turn
from megatron_multiturn.packing import PackPlan
from megatron_multiturn.plan_cache import PlanKey, cached_plan
from megatron_multiturn.store import SessionStore
from megatron_multiturn.windows import CutReport

_NUMBER = r"\s*([-+.\w]+)"
_ITERATION = re.compile(
    rf"iteration\s+(\d+)/\s*(\d+) \| consumed samples:\s*(\d+) .*?"
    rf"elapsed time per iteration \(ms\):{_NUMBER} .*?"
    rf"\| lm loss:{_NUMBER} \| token loss:{_NUMBER}"
)
_EVALUATION = re.compile(rf"loss at (.*?) \| lm loss value:{_NUMBER} .*?token loss value:{_NUMBER}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """A logged iteration; the losses are means since the one logged before."""

    number: int
    of: int
    consumed_rows: int
    milliseconds: float
    turn_loss: float
    token_loss: float

    def __str__(self) -> str:
        return (
            f"  iteration {self.number:>4}/{self.of}   lm loss {self.turn_loss:6.3f}   "
            f"token loss {self.token_loss:6.3f}   {self.milliseconds:6.0f} ms"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A logged evaluation."""

    where: str  # "iteration 100 on validation set"
    turn_loss: float
    token_loss: float

    def __str__(self) -> str:
        return (
            f"  evaluation at {self.where}: lm loss {self.turn_loss:.3f}, "
            f"token loss {self.token_loss:.3f}"
        )


def read_log_line(line: str) -> Iteration | Evaluation | None:
    """What a line of Megatron's log says, None if it is about something else."""
    if found := _ITERATION.search(line):
        number, of, rows, milliseconds, turn_loss, token_loss = found.groups()
        return Iteration(
            number=int(number),
            of=int(of),
            consumed_rows=int(rows),
            milliseconds=float(milliseconds),
            turn_loss=float(turn_loss),
            token_loss=float(token_loss),
        )
    if found := _EVALUATION.search(line):
        where, turn_loss, token_loss = found.groups()
        return Evaluation(where=where, turn_loss=float(turn_loss), token_loss=float(token_loss))
    return None


def progress_lines(log: Iterable[str]) -> Iterator[str]:
    """The log's iterations and evaluations as lines to read, each as soon as it is there."""
    for line in log:
        entry = read_log_line(line)
        if entry is not None:
            yield str(entry)


def summarize(log: Path, *, data_prefix: str, cache: Path) -> str:
    """The summary of a finished run: losses at start and end, fill, turns and tokens seen.

    log: Megatron's output; data_prefix: the one dataset it trained on; cache: its
    `--data-cache-path`. Raises DatasetError if the log holds no iteration or the cache no plan.
    """
    entries = [read_log_line(line) for line in log.read_text(errors="replace").splitlines()]
    iterations = [entry for entry in entries if isinstance(entry, Iteration)]
    evaluations = [entry for entry in entries if isinstance(entry, Evaluation)]
    if not iterations:
        raise DatasetError(f"{log}: holds no logged iteration; look there for what went wrong")
    first, last = iterations[0], iterations[-1]
    plan = _training_plan(cache)
    turns, tokens = _seen(plan, SessionStore.open(data_prefix), last.consumed_rows)
    lines = [
        "                        start      end",
        f"lm loss (turn mean)    {first.turn_loss:6.3f}   {last.turn_loss:6.3f}",
        f"token loss             {first.token_loss:6.3f}   {last.token_loss:6.3f}",
    ]
    if evaluations:
        lines.append(f"held-out lm loss                {evaluations[0].turn_loss:6.3f}")
    lines += [
        f"packing                {plan.stats.fill:.1%} of the positions filled, "
        f"{plan.stats.num_pieces / plan.stats.num_rows:.1f} pieces a row",
        f"seen                   {turns:,} turns, {tokens:,} tokens, "
        f"{last.consumed_rows:,} rows in {last.number:,} iterations "
        f"({last.consumed_rows / plan.stats.num_rows:.1f} epochs)",
    ]
    return "\n".join(lines)


def _training_plan(cache: Path) -> PackPlan:
    """The plan in `cache` that begins with the first session: the training split's."""
    keys = []
    for path in cache.glob("plan-*.json"):
        fields = json.loads(path.read_text())["key"]
        keys.append(PlanKey(**{**fields, "sessions": tuple(fields["sessions"])}))
    keys = [key for key in keys if key.sessions[0] == 0]
    if not keys:
        raise DatasetError(f"{cache}: holds no pack plan; run the quickstart again")
    key = max(keys, key=lambda key: key.num_samples or 0)
    return cached_plan(cache, key, _no_plan).plan


def _no_plan() -> tuple[PackPlan, CutReport]:
    raise DatasetError("the pack plan of the training was changed since; run the quickstart again")


def _seen(plan: PackPlan, store: SessionStore, num_rows: int) -> tuple[int, int]:
    """(turns, tokens) of the first `num_rows` rows; a repeated context counts as tokens again."""
    used = np.asarray(plan.row_pieces[: plan.row_offsets[num_rows]])
    pieces, times = np.unique(used, return_counts=True)
    turns = tokens = 0
    for piece, count in zip(pieces.tolist(), times.tolist(), strict=True):
        system_stop, start, target_start, stop = plan.pieces.spans_of(np.array([piece]))[0].tolist()
        session = store.session(int(plan.pieces.session[piece]))
        lengths = session.segment_lengths.astype(np.int64)
        begins = np.cumsum(lengths) - lengths
        opens = begins_turn(session.modes) & (begins >= target_start) & (begins < stop)
        turns += count * int(opens.sum())
        tokens += count * (system_stop + stop - start)
    return turns, tokens
