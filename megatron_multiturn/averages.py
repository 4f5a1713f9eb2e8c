"""What the loss can be the mean of: numbers for loss_token_num and turn_num.

With n_t the target tokens of turn t, T the turns of the session that have a target, and t running
from 1 to T:

    average        loss_token_num           turn_num counts            n_t is counted in
    turn           n_t                      turns                      the piece
    token          1                        target tokens              the piece
    session        n_t * T                  sessions                   the session
    session-token  sum of all n_t           sessions                   the session
    prefix         n_t / sum_{j=t..T} 1/j   turns                      the session
    sqrt           sqrt(n_t)                divisor_unit * sqrt(n_t)   the piece

`session`, `session-token` and `prefix` see a session as one, whatever it was cut into: what
turn_num counts, a session or a turn, is counted in the piece that holds its first target.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError

LOSS_AVERAGES = ("turn", "token", "session", "session-token", "prefix", "sqrt")

MAX_DIVISOR_UNIT = 4096


def sqrt_divisor_unit(global_batch_size: int, sequence_length: int) -> int:
    """The largest power of two, at most 4,096, that keeps a global batch's divisor below 2**31.

    Megatron sums the divisor in int32; a batch has at most one target token a position.
    """
    num_positions = global_batch_size * sequence_length
    if num_positions >= 2**31:
        raise ConfigError(
            f"a global batch of {global_batch_size} rows of {sequence_length} tokens has "
            "2**31 positions or more, which Megatron's divisor cannot count; make it smaller"
        )
    unit = MAX_DIVISOR_UNIT
    while unit * num_positions >= 2**31:
        unit //= 2
    return unit


def weigh_turns(
    loss_average: str,
    *,
    num_targets: NDArray[np.int64],  # (num_turns,): in the piece
    session_targets: NDArray[np.int64],  # (num_turns,): in the whole session
    starts_here: NDArray[np.bool_],  # (num_turns,): the turn's first target is in the piece
    turn_in_session: NDArray[np.int64],  # (num_turns,): from 0
    turns_per_piece: NDArray[np.int64],  # (num_pieces,): turns of the piece's whole session
) -> tuple[NDArray[np.float64], float]:
    """loss_token_num of each turn (num_turns,), and the sum that turn_num counts."""
    num_turns = turns_per_piece.repeat(turns_per_piece)  # of the session that the turn is in
    num_sessions = float(np.count_nonzero(starts_here & (turn_in_session == 0)))
    match loss_average:
        case "turn":
            return num_targets.astype(np.float64), float(np.count_nonzero(num_targets))
        case "token":
            return np.ones(len(num_targets)), float(num_targets.sum())
        case "session":
            return (session_targets * num_turns).astype(np.float64), num_sessions
        case "session-token":
            piece = np.arange(len(turns_per_piece)).repeat(turns_per_piece)
            return np.bincount(piece, session_targets)[piece], num_sessions
        case "prefix":
            harmonic = np.cumsum(1 / np.arange(1, turns_per_piece.max(initial=0) + 1))
            before = harmonic[turn_in_session] - 1 / (turn_in_session + 1)
            shares = harmonic[num_turns - 1] - before
            return session_targets / shares, float(np.count_nonzero(starts_here))
        case _:
            roots = np.sqrt(num_targets)
            return roots, float(roots.sum())
