"""What came of the sessions: counted while they go by, told in a table at the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.encoded_sessions import EncodedBatch
from megatron_multiturn.errors import SessionError
from megatron_multiturn.manifest import Counts

_PERCENTILES = (50, 90, 99)
_NOTES = {
    "num_unknown_tokens": "tokens are unknown to the vocabulary",
    "num_lossy_sessions": "sessions do not decode to exactly their text",
    "num_recut_sessions": "sessions have a token across the edge of an answer",
    "num_rephrased_sessions": "sessions have their question phrased anew by --prompt-variants",
    "num_rewritten_sessions": "sessions have a history that the template rewrites, see "
    "--history-rewriting",
    "num_open_turns": "turns do not end with a control token, so that the model does not learn to "
    "stop; put the template's closing token into its {% generation %} block",
}


@dataclass(slots=True, kw_only=True)
class Rejection:
    """The sessions that were rejected for one reason."""

    count: int
    location: str  # of the first
    message: str  # the first one's


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over batches; of the order in which they come nothing but the firsts depends."""

    rejected: dict[str, Rejection] = field(
        default_factory=dict
    )  # by reason, in order of the firsts
    totals: dict[str, int] = field(default_factory=dict)  # what is to be noted
    longest_tokens: int = 0
    longest_location: str = ""  # of the first of that length

    def add_batch(
        self, batch: EncodedBatch, lengths: NDArray[np.int64], locations: list[str]
    ) -> None:
        """Count the sessions kept; lengths: tokens of each."""
        self._note(batch.totals)
        if len(lengths) and int(lengths.max()) > self.longest_tokens:
            longest = int(lengths.argmax())
            self.longest_tokens = int(lengths[longest])
            self.longest_location = locations[longest]

    def add_rejected(self, errors: Iterable[tuple[str, SessionError]]) -> None:
        """Count rejected sessions; errors: (location, why)."""
        for location, error in errors:
            self._reject(error.reason, 1, location, str(error))

    def add(self, later: "Tally") -> None:
        """Count in what came behind."""
        for reason, entry in later.rejected.items():
            self._reject(reason, entry.count, entry.location, entry.message)
        self._note(later.totals)
        if later.longest_tokens > self.longest_tokens:
            self.longest_tokens = later.longest_tokens
            self.longest_location = later.longest_location

    def rejected_counts(self) -> dict[str, int]:
        return {reason: entry.count for reason, entry in sorted(self.rejected.items())}

    @property
    def num_rejected(self) -> int:
        return sum(entry.count for entry in self.rejected.values())

    @property
    def first_message(self) -> str:
        """Of the first rejected session; empty if there is none."""
        return next((entry.message for entry in self.rejected.values()), "")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        rejected = {key: Rejection(**entry) for key, entry in value["rejected"].items()}
        return cls(**dict(value) | {"rejected": rejected})

    def _note(self, totals: Mapping[str, int]) -> None:
        for name, number in totals.items():
            self.totals[name] = self.totals.get(name, 0) + number

    def _reject(self, reason: str, count: int, location: str, message: str) -> None:
        found = self.rejected.get(reason)
        if found is None:
            self.rejected[reason] = Rejection(count=count, location=location, message=message)
        else:
            found.count += count


class LengthHistogram:
    """How many sessions have how many tokens."""

    def __init__(self, blocks: Iterable[NDArray[np.integer[Any]]] = ()) -> None:
        self._lengths = np.zeros(0, dtype=np.int64)  # (num_distinct,), ascending
        self._counts = np.zeros(0, dtype=np.int64)
        for block in blocks:
            self.add(block)

    def add(self, lengths: NDArray[np.integer[Any]]) -> None:
        self._add(*np.unique(lengths.astype(np.int64), return_counts=True))

    def add_pairs(self, pairs: Sequence[Sequence[int]]) -> None:
        """Count in what `pairs` of another has given."""
        new, counts = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        self._add(new, counts)

    def pairs(self) -> list[list[int]]:
        """(tokens, sessions) of every length, ascending."""
        return np.stack([self._lengths, self._counts], axis=1).tolist()

    def _add(self, new: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        joined = np.concatenate([self._lengths, new])
        self._lengths, where = np.unique(joined, return_inverse=True)
        summed = np.zeros(len(self._lengths), dtype=np.int64)
        np.add.at(summed, where, np.concatenate([self._counts, counts]))
        self._counts = summed

    def percentile(self, percent: int) -> int:
        """The smallest length that so many of 100 sessions do not exceed."""
        ends = np.cumsum(self._counts)
        wanted = -(-int(ends[-1]) * percent // 100)
        return int(self._lengths[np.searchsorted(ends, wanted)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast it went, over what this process did itself."""

    seconds: float
    sessions: int  # kept or rejected
    input_bytes: int  # as they lie in the files
    tokens: int


def format_table(
    title: str,
    counts: Counts,
    tally: Tally,
    lengths: LengthHistogram,
    *,
    pace: Pace | None = None,
    rejected_path: str | None = None,
    omits_bos: bool = False,
) -> str:
    """The closing table."""
    lines = [title, f"  kept      {counts.sessions:,} sessions, {counts.turns:,} turns"]
    if counts.sessions:
        per_session = " ".join(f"p{p} {lengths.percentile(p):,}" for p in _PERCENTILES)
        share = counts.target_tokens / counts.tokens
        lines += [
            f"  tokens    {counts.tokens:,}, targets {counts.target_tokens:,} ({share:.1%})",
            f"  length    {per_session} max {tally.longest_tokens:,} tokens a session; the longest "
            f"is {tally.longest_location}",
        ]
    rejected = f"  rejected  {tally.num_rejected:,} sessions"
    lines.append(rejected + (f", see {rejected_path}" if rejected_path else ""))
    width = max((len(reason) for reason in tally.rejected), default=0)
    for reason, entry in sorted(tally.rejected.items(), key=lambda item: -item[1].count):
        lines.append(f"  {entry.count:>9,} {reason.ljust(width)}  first: {entry.location}")
    if pace is not None:
        seconds = max(pace.seconds, 1e-9)
        lines.append(
            f"  speed     {pace.seconds:.1f} s, {pace.sessions / seconds:,.0f} sessions/s, "
            f"{pace.input_bytes / seconds / 1e6:.1f} MB/s, {pace.tokens / seconds:,.0f} tokens/s"
        )
    for name, number in tally.totals.items():
        if number:
            lines.append(f"  note: {number:,} {_NOTES.get(name, name)}")
    if omits_bos:
        lines.append("  note: the tokenizer has no BOS token; the template's <s> is left out")
    return "\n".join(lines)
