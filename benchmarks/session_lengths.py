"""Sessions without their texts: how long the segments are, and random tokens for them.

A lengths file has a session a line, the lengths of its segments in tokens, context and target by
turns; lines that begin with # are comments. `+` before a target: it goes on with the turn of the
target before it. A session that opens with a target has a context of 0 before that.

    103 138 51 101        context 103, turn of 138, context 51, turn of 101
    40 12 30 +25 8        one turn of two targets, 12 and 25, with 30 of context in between;
                          8 of context end the session
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.encoding import EncodedSession
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.modes import (
    CONTEXT,
    KIND_MASK,
    MESSAGE_START,
    TARGET_BEGIN,
    TARGET_CONTINUE,
    begins_turn,
    is_target,
)
from megatron_multiturn.store import SessionStore

Segments = tuple[NDArray[np.int32], NDArray[np.int8]]  # lengths and modes, (num_segments,) each


def read_lengths(path: Path) -> list[Segments]:
    """The sessions of a lengths file; DatasetError, with the line, for what is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path}: cannot be read ({error}); name a lengths file, or one of "
            f"{', '.join(known_lengths())}"
        ) from None
    sessions = [
        _parse(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.startswith("#")
    ]
    if not sessions:
        raise DatasetError(f"{path}: holds no session; write a session a line")
    return sessions


def known_lengths() -> dict[str, Path]:
    """The lengths files that come with the benchmark, by the name for `--lengths`."""
    folder = Path(__file__).resolve().parent / "lengths"
    return {path.stem: path for path in sorted(folder.glob("*.txt"))}


def format_lengths(session: EncodedSession) -> str:
    """A session as a line of a lengths file; context segments in a row become one."""
    words: list[str] = []
    context = 0
    for length, mode in zip(session.segment_lengths.tolist(), session.modes.tolist(), strict=True):
        kind = mode & KIND_MASK
        if kind == CONTEXT:
            context += length
        else:
            words += [str(context), ("+" if kind == TARGET_CONTINUE else "") + str(length)]
            context = 0
    return " ".join(words + [str(context)] * (context > 0))


def sample_sessions(store: SessionStore, num_sessions: int, seed: int) -> Iterator[EncodedSession]:
    """So many sessions of a dataset, or all that it has, in an order drawn by `seed`."""
    for index in np.random.default_rng(seed).permutation(store.num_sessions)[:num_sessions]:
        yield store.session(int(index))


def draw_sessions(
    sessions: Iterable[Segments], *, vocab_size: int, seed: int
) -> Iterator[EncodedSession]:
    """The same sessions with tokens drawn evenly from the vocabulary."""
    rng = np.random.default_rng(seed)
    for lengths, modes in sessions:
        tokens = rng.integers(0, vocab_size, int(lengths.sum()), dtype=np.int32)
        yield EncodedSession(tokens=tokens, segment_lengths=lengths, modes=modes)


def split_by_turn(session: EncodedSession) -> Iterator[EncodedSession]:
    """One sample a turn: the session up to the turn's end, of which the turn alone is a target.

    A turn of nothing but the session's first token, which is predicted by nothing, gives none.
    """
    targets = is_target(session.modes)
    turn_of_segment = np.cumsum(begins_turn(session.modes))
    ends = np.cumsum(session.segment_lengths)
    for turn in np.unique(turn_of_segment[targets]):
        own = targets & (turn_of_segment == turn)
        num_segments = int(np.flatnonzero(own)[-1]) + 1
        if num_segments == 1 and ends[0] == 1:
            continue
        modes = np.where(targets & ~own, CONTEXT, session.modes).astype(np.int8)
        yield EncodedSession(
            tokens=session.tokens[: ends[num_segments - 1]],
            segment_lengths=session.segment_lengths[:num_segments],
            modes=modes[:num_segments],
            location=session.location,
        )


def _parse(line: str, where: str) -> Segments:
    lengths: list[int] = []
    modes: list[int] = []
    for index, word in enumerate(line.split()):
        is_context, digits = index % 2 == 0, word.removeprefix("+")
        goes_on = word != digits
        if not digits.isdecimal() or not digits.isascii() or (is_context and goes_on):
            raise DatasetError(
                f"{where}: {word!r} is no length of a {'context' if is_context else 'target'}; "
                "write whole numbers, + before those targets that go on with a turn"
            )
        length = int(digits)
        if goes_on and TARGET_BEGIN not in modes:
            raise DatasetError(f"{where}: {word!r} goes on with a turn, and none has begun")
        if length == 0 and index:
            raise DatasetError(f"{where}: only the context that opens a session may be 0 long")
        if length:
            lengths.append(length)
            kind = TARGET_CONTINUE if goes_on else TARGET_BEGIN
            modes.append(CONTEXT | MESSAGE_START if is_context else kind)
    if TARGET_BEGIN not in modes or sum(lengths) < 2:
        raise DatasetError(f"{where}: a session needs a target and two tokens; write more lengths")
    return np.array(lengths, dtype=np.int32), np.array(modes, dtype=np.int8)
