"""Sessions drawn as text, one character a token, so that a test shows what it is about.

    |ss|uuAA|uuuB.BB

`|` (no token) begins a message; `s` is the leading system message; a capital letter is a target
and a change of letter a new turn (B.BB is one turn with a masked gap); all else is context.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.modes import (
    CONTEXT,
    LEADING_SYSTEM,
    MESSAGE_START,
    TARGET_BEGIN,
    TARGET_CONTINUE,
)
from megatron_multiturn.packing import PackPlan, pack
from megatron_multiturn.row_pieces import join_sessions
from megatron_multiturn.samples import RowFormat, build_row
from megatron_multiturn.windows import cut_sessions

Row = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class DrawnSession:
    tokens: NDArray[np.int32]
    segment_lengths: NDArray[np.int32]
    modes: NDArray[np.int8]
    drawing: str  # without the bars: drawing[i] is token i

    @property
    def turn_of_token(self) -> list[str | None]:
        """The turn that each token is a target of; the first token is never one."""
        return [None] + [c if c.isupper() else None for c in self.drawing[1:]]


def draw(drawing: str, first_token: int = 100) -> DrawnSession:
    """Tokens count up from `first_token`."""
    segments: list[tuple[int, int]] = []  # length, mode
    turn = ""
    for message in drawing.split("|"):
        starts_message = True
        for kind, run in groupby(message, key=lambda c: c if c.isupper() else c == "s"):
            length = len(list(run))
            if isinstance(kind, str):
                segments.append((length, TARGET_CONTINUE if kind == turn else TARGET_BEGIN))
                turn = kind
            else:
                flags = (MESSAGE_START if starts_message else 0) | (LEADING_SYSTEM if kind else 0)
                segments.append((length, CONTEXT | flags))
            starts_message = False
    tokens = drawing.replace("|", "")
    return DrawnSession(
        tokens=np.arange(first_token, first_token + len(tokens), dtype=np.int32),
        segment_lengths=np.array([length for length, _ in segments], dtype=np.int32),
        modes=np.array([mode for _, mode in segments], dtype=np.int8),
        drawing=tokens,
    )


def draw_random(rng: np.random.Generator, *, max_turns: int = 6, max_run: int = 9) -> DrawnSession:
    """Every shape a session can have: system or not, adjacent turns, gaps, no turn, target first.

    At least one token long.
    """

    def run(character: str, least: int = 1) -> str:
        return character * int(rng.integers(least, max_run + 1))

    parts = ["|" + run("s")] if rng.random() < 0.4 else []
    for turn in range(int(rng.integers(0, max_turns + 1))):
        letter = chr(ord("A") + turn)
        if rng.random() < 0.85 or (turn == 0 and parts):
            parts += ["|" + run("u") for _ in range(int(rng.integers(1, 3)))]
        if rng.random() < 0.5:
            parts.append("|" + run("h"))  # the header of the answer
        parts.append(run(letter))
        if rng.random() < 0.3:
            parts += [run("."), run(letter)]
    if rng.random() < 0.3 or not parts:
        parts.append("|" + run("u"))
    return draw("".join(parts), first_token=int(rng.integers(0, 1000)))


def segment_index(sessions: list[DrawnSession]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What `SessionStore.segment_index` would return for them."""
    counts = [len(session.modes) for session in sessions]
    return (
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.concatenate([session.segment_lengths for session in sessions]),
        np.concatenate([session.modes for session in sessions]),
    )


def session_lengths(sessions: list[DrawnSession]) -> NDArray[np.int64]:
    return np.array([len(session.tokens) for session in sessions], dtype=np.int64)


def plan_of(corpus: list[DrawnSession], length: int, multiple: int) -> PackPlan:
    """One epoch of a corpus that has to hold sessions to cut, and turns to cut inside."""
    pieces, report = cut_sessions(
        session_lengths(corpus),
        sequence_length=length,
        long_session="window",
        segment_index=segment_index(corpus),
    )
    assert report.num_sessions_cut > 50
    assert report.num_turns_cut > 10
    return pack(pieces, sequence_length=length, piece_multiple=multiple, seed=0)


def build_rows(corpus: list[DrawnSession], plan: PackPlan, row_format: RowFormat) -> list[Row]:
    rows = []
    for pieces in map(plan.pieces_of_row, range(plan.num_rows)):
        sessions = [corpus[session] for session in plan.pieces.session[pieces]]
        rows.append(row_of_sessions(sessions, plan.pieces.spans_of(pieces), row_format))
    return rows


def row_of_sessions(
    sessions: list[DrawnSession], spans: NDArray[np.int32], row_format: RowFormat
) -> Row:
    return build_row(join_sessions(sessions, spans), spans, row_format)
