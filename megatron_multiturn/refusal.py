"""What a refused setting is, and how Megatron's arguments are read for it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OWN_LOSS = "remove it, or train with --dataset-provider megatron"  # a remedy


class Flags:
    """Megatron's arguments; None for those that its version does not have."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._values = vars(args)

    def __getattr__(self, name: str) -> Any:
        return self._values.get(name)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One line of the table. `{name}` in the texts stands for the value of that argument."""

    setting: str
    applies: Callable[[Flags], object]
    reason: str
    remedy: str = "remove it"


def cp_size(a: Flags) -> int:
    return a.context_parallel_size or 1


def tp_size(a: Flags) -> int:
    return a.tensor_model_parallel_size or 1


def as_set(value: Any) -> set[str]:
    return {value} if isinstance(value, str) else set(value or [])
