"""The weights that turns have in the objective, and their numbers in the modes of segments.

A dataset lists its weights once, in its manifest; a target's mode byte says which of them is its
turn's. The first of the list is 1, which is what a turn weighs of which nothing is said.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.modes import KIND_MASK, MAX_TURN_WEIGHTS, WEIGHT_SHIFT, is_target

UNWEIGHTED = (1.0,)


class TurnWeights:
    """A list of weights that grows by those that come up."""

    def __init__(self, weights: Iterable[float] = UNWEIGHTED) -> None:
        self._numbers: dict[float, int] = {}
        for weight in weights:
            self.number_of(weight)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(self._numbers)

    def number_of(self, weight: float) -> int:
        """The weight's place in the list; ConfigError if it finds none."""
        number = self._numbers.setdefault(float(weight), len(self._numbers))
        if number >= MAX_TURN_WEIGHTS:
            raise ConfigError(
                f"the turns have more than {MAX_TURN_WEIGHTS} different weights, 1 among them, "
                f"the last {weight:g}; round them, or make several datasets and blend them"
            )
        return number

    def renumber(self, modes: NDArray[np.int8], weights: Sequence[float]) -> NDArray[np.int8]:
        """The modes (num_segments,) that number `weights`, so that they number these.

        New weights are added in the order in which segments come to have them.
        """
        if len(weights) == 1:
            return modes
        numbers = (modes >> WEIGHT_SHIFT)[is_target(modes)]
        used, first = np.unique(numbers, return_index=True)
        renumbered = np.zeros(MAX_TURN_WEIGHTS, dtype=np.int8)
        for number in used[np.argsort(first)].tolist():
            renumbered[number] = self.number_of(weights[number])
        made = modes.copy()
        made[is_target(modes)] = (modes[is_target(modes)] & KIND_MASK) | (
            renumbered[numbers] << WEIGHT_SHIFT
        )
        return made
