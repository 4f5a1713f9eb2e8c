"""Layouts with slots for whole chats, put together from those of their messages.

Sequences of roles are many, of chats with tools nearly as many as chats; what is written of one
message depends on few things. A template says what (see `templates.Unit`), and the layout of
each unit, or of several where text goes on from one to the next, is made once.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import SessionError
from megatron_multiturn.layouts import Layout, LayoutMaker
from megatron_multiturn.messages import Message
from megatron_multiturn.templates import ChatTemplate, Segment, Special, Unit, UnitKey
from megatron_multiturn.text_groups import Fill, moved_fill, slot_text
from megatron_multiturn.turn_weights import TurnWeights

_MAX_CHATS = 4096
_MAX_KEPT_MESSAGES = 512  # a longer chat hardly has its like
_MAX_UNITS = 4096

# Units that text goes on through.
_Run = tuple[Unit, ...]


class ChatLayout(NamedTuple):
    """The layouts of a chat one after another; the slots of each are numbered from its first."""

    numbers: NDArray[np.int64]  # (num_layouts,), each named by a number of its own
    layouts: Mapping[int, Layout]  # by these numbers
    first_messages: Sequence[int]  # (num_layouts,)
    # Of all layouts, with the slots numbered throughout:
    group_fills: Sequence[Fill]
    edge_fills: Sequence[Fill]


class MessageLayouts:
    """Makes the layouts of chats of a template; its turns weigh 1, and nothing is masked."""

    def __init__(
        self,
        template: ChatTemplate,
        maker: LayoutMaker,
        answers_of: Callable[[tuple[str, ...]], Sequence[bool]],
    ) -> None:
        """answers_of: the roles of a chat -> whether each message is trained on; SessionError
        if none is."""
        self._template = template
        self._maker = maker
        self._answers_of = answers_of
        self._chats: dict[tuple[str, ...], ChatLayout | None] = {}
        self._ends: dict[UnitKey, tuple[bool, bool]] = {}  # whether units begin, end with text
        self._layouts: dict[_Run, tuple[int, Layout]] = {}
        self._next_number = 0

    def layout_of(self, roles: tuple[str, ...]) -> ChatLayout | None:
        """The layout of a chat of these roles; None if it has to be rendered."""
        try:
            return self._chats[roles]
        except KeyError:
            pass
        if len(self._ends) + len(self._layouts) >= _MAX_UNITS:
            self._ends.clear()
            self._layouts.clear()
        layout = None
        with contextlib.suppress(SessionError):  # said again of each such session, with its place
            layout = self._make(roles, self._answers_of(roles))
        if len(roles) <= _MAX_KEPT_MESSAGES:
            if len(self._chats) >= _MAX_CHATS:
                self._chats.clear()
            self._chats[roles] = layout
        return layout

    def _make(self, roles: Sequence[str], answers: Sequence[bool]) -> ChatLayout | None:
        units = self._template.units(roles, answers)
        if units is None:
            return None
        runs: list[tuple[_Run, int]] = []
        run: list[Unit] = []
        first = number = 0  # the first message of the run, and of the unit
        goes_on = False
        for unit in units:
            key, num_messages = unit
            ends = self._ends.get(key)
            if ends is None:
                messages = _slots(roles[number:], answers[number:], num_messages)
                ends = self._ends[key] = _text_ends(self._template.write_unit(key, messages))
            if run and not (goes_on and ends[0]):
                runs.append((tuple(run), first))
                run, first = [], number
            run.append(unit)
            number += num_messages
            goes_on = ends[1]
        runs.append((tuple(run), first))
        numbered = [self._layout_of(run, roles[first:], answers[first:]) for run, first in runs]
        firsts = [first for _, first in runs]
        return ChatLayout(
            numbers=np.array([number for number, _ in numbered], dtype=np.int64),
            layouts=dict(numbered),
            first_messages=firsts,
            group_fills=[
                moved_fill(fill, first)
                for (_, layout), first in zip(numbered, firsts, strict=True)
                for fill in layout.group_fills
            ],
            edge_fills=[
                moved_fill(fill, first)
                for (_, layout), first in zip(numbered, firsts, strict=True)
                for fill in layout.edge_fills
            ],
        )

    def _layout_of(
        self, run: _Run, roles: Sequence[str], answers: Sequence[bool]
    ) -> tuple[int, Layout]:
        """(number, layout) of a run, with which the roles and answers begin."""
        found = self._layouts.get(run)
        if found is not None:
            return found
        segments: list[Segment] = []
        offset = 0
        for key, num_messages in run:
            messages = _slots(roles[offset:], answers[offset:], num_messages, offset)
            segments += self._template.write_unit(key, messages)
            offset += num_messages
        layout = self._maker.make(segments, TurnWeights(), has_slots=True)
        self._layouts[run] = (self._next_number, layout)
        self._next_number += 1
        return self._layouts[run]


def _slots(
    roles: Sequence[str], answers: Sequence[bool], count: int, first_slot: int = 0
) -> list[Message]:
    """The first messages of these, with slots for their contents."""
    return [
        Message(role=roles[index], content=slot_text(first_slot + index), train=answers[index])
        for index in range(count)
    ]


def _text_ends(segments: Sequence[Segment]) -> tuple[bool, bool]:
    """Whether they begin, and end, with text."""
    return (
        not isinstance(segments[0].parts[0], Special),
        not isinstance(segments[-1].parts[-1], Special),
    )
