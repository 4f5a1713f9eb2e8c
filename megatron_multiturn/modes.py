"""The mode byte of a segment, as it lies in the `.idx` of a dataset.

A segment is a run of tokens that is wholly context or wholly target. Its mode is an int8:

    bits 0-1  what it is: CONTEXT, TARGET_BEGIN or TARGET_CONTINUE
    context   bit 2  MESSAGE_START   it begins a message: a later window may open here
              bit 3  LEADING_SYSTEM  it belongs to the system message that opens the session
    target    bits 2-6  index into the manifest's list of turn weights (0: weight 1)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

KIND_MASK = 0b11
CONTEXT = 0
TARGET_BEGIN = 1
TARGET_CONTINUE = 2

MESSAGE_START = 1 << 2
LEADING_SYSTEM = 1 << 3

WEIGHT_SHIFT = 2
MAX_TURN_WEIGHTS = 1 << 5


def is_target(modes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which segments are targets; same shape as `modes`."""
    return (modes & KIND_MASK) != CONTEXT


def begins_turn(modes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which segments begin a turn; same shape as `modes`."""
    return (modes & KIND_MASK) == TARGET_BEGIN


def is_context_with(modes: NDArray[np.int8], flag: int) -> NDArray[np.bool_]:
    """Which segments are context and carry `flag` (MESSAGE_START or LEADING_SYSTEM)."""
    context: NDArray[Any] = ~is_target(modes)
    return context & ((modes & flag) != 0)
