"""What the loss can be the mean of: numbers for loss_token_num and turn_num.

With n_t the target tokens of turn t, T the turns of the session that have a target, and t running
from 1 to T:

    average        loss_token_num           turn_num counts            n_t is counted in
    turn           n_t                      turns                      the piece
    token          1                        target tokens              the piece
    session        n_t * T                  sessions                   the session
    session-token  sum of all n_t           sessions                   the session
    prefix         n_t / sum_{j=t..T} 1/j   turns                      the session
    sqrt           sqrt(n_t)                sqrt(n_t)                  the piece

`session`, `session-token` and `prefix` see a session as one, whatever it was cut into. Its pieces
lie in unlike batches, so each adds to turn_num the share of the session, or of the turn, that it
trains: what a batch counts is always the sum of the weights of its targets. Such shares, and the
square roots, are fractions: turn_num counts them in a fixed unit (see `largest_divisor_unit`).

A turn that the data weigh counts as many times: its loss_token_num is divided by its weight, and
turn_num counts the weight too.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError

LOSS_AVERAGES = ("turn", "token", "session", "session-token", "prefix", "sqrt")

MAX_DIVISOR_UNIT = 2**16

# `prefix` gives a one-token answer the weight 1 + 1/2 + ... + 1/T: 14.4 for a million turns.
_MAX_PREFIX_WEIGHT = 16


def largest_divisor_unit(
    loss_average: str,
    global_batch_size: int,
    sequence_length: int,
    turn_weights: Iterable[float] = (),
) -> int:
    """The largest power of two, at most 2**16, that keeps a global batch's divisor below 2**31.

    Megatron sums the divisor in int32; a batch has at most one target token a position, and no
    average but `prefix` gives a token a weight above 1, turn_weights (all that the data have)
    aside. `turn` and `token` count whole things alone, of cut sessions too: their unit is 1 where
    the weights are whole numbers.
    """
    weights = (1.0, *turn_weights)
    largest_sum = math.ceil(global_batch_size * sequence_length * max(weights))
    if loss_average == "prefix":
        largest_sum *= _MAX_PREFIX_WEIGHT
    if largest_sum >= 2**31:
        raise ConfigError(
            f"a global batch of {global_batch_size} rows of {sequence_length} tokens is more than "
            f"Megatron's divisor can count under --loss-average {loss_average}; make it smaller"
        )
    if loss_average in ("turn", "token") and all(weight.is_integer() for weight in weights):
        return 1
    unit = MAX_DIVISOR_UNIT
    while unit * largest_sum >= 2**31:
        unit //= 2
    return unit


def fixed_point(value: float, unit: int) -> tuple[int, float]:
    """(count, factor): `value` in units, rounded but to 0 only if it is 0, and count / exact.

    Weights multiplied by the factor add up to the count. What is a whole number but for the
    rounding of floats has the factor 1.
    """
    exact = value * unit
    count = round(exact)
    if abs(count - exact) <= 1e-9 * exact:
        return count, 1.0
    count = max(count, 1)
    return count, count / exact


def weigh_turns(
    loss_average: str,
    *,
    num_targets: NDArray[np.int64],  # (num_turns,): in the piece
    session_targets: NDArray[np.int64],  # (num_turns,): in the whole session
    turn_in_session: NDArray[np.int64],  # (num_turns,): from 0
    turns_per_piece: NDArray[np.int64],  # (num_pieces,): turns of the piece's whole session
    turn_weights: NDArray[np.float64] | None = None,  # (num_turns,): None for 1 each
) -> tuple[NDArray[np.float64], float]:
    """loss_token_num of each turn (num_turns,), and the sum that turn_num counts.

    The sum is that of the weights of all targets, so that their loss divided by it is a mean.
    """
    loss_token_num = _loss_token_num(
        loss_average, num_targets, session_targets, turn_in_session, turns_per_piece
    )
    if turn_weights is not None:
        loss_token_num = loss_token_num / turn_weights
    here = num_targets > 0
    return loss_token_num, float((num_targets[here] / loss_token_num[here]).sum())


def _loss_token_num(
    loss_average: str,
    num_targets: NDArray[np.int64],
    session_targets: NDArray[np.int64],
    turn_in_session: NDArray[np.int64],
    turns_per_piece: NDArray[np.int64],
) -> NDArray[np.float64]:
    match loss_average:
        case "turn":
            return num_targets.astype(np.float64)
        case "token":
            return np.ones(len(num_targets))
        case "session":
            num_turns = turns_per_piece.repeat(turns_per_piece)  # of the turn's session
            return (session_targets * num_turns).astype(np.float64)
        case "session-token":
            piece = np.arange(len(turns_per_piece)).repeat(turns_per_piece)
            return np.bincount(piece, session_targets)[piece]
        case "prefix":
            harmonic = np.cumsum(1 / np.arange(1, turns_per_piece.max(initial=0) + 1))
            num_turns = turns_per_piece.repeat(turns_per_piece)
            before = harmonic[turn_in_session] - 1 / (turn_in_session + 1)
            return session_targets / (harmonic[num_turns - 1] - before)
        case _:
            return np.sqrt(num_targets)
