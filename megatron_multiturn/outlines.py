"""Segments -> runs of text and ids, and back with the runs encoded: one session's outline."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.modes import (
    CONTEXT,
    KIND_MASK,
    LEADING_SYSTEM,
    MESSAGE_START,
    TARGET_BEGIN,
    TARGET_CONTINUE,
)
from megatron_multiturn.run_encoder import TextRun
from megatron_multiturn.templates import BOS, Document, Part, Segment, Special

# How much text on either side of an edge decides how it is cut into tokens there, in characters.
_EDGE_LEFT = 16
_EDGE_RIGHT = 8
# Ends a run without a token: what follows goes on, but is not joined with what stands before.
_BREAK = Special(token="")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSession:
    """A session as tokens."""

    tokens: NDArray[np.int32]  # (num_tokens,)
    segment_lengths: NDArray[np.int32]  # (num_segments,), none is 0
    modes: NDArray[np.int8]  # (num_segments,)
    location: str = ""  # "file.jsonl:17", where it came from; not stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A session in which each text run is still a number."""

    location: str
    segments: list[tuple[int, list[int]]]  # (mode, parts): an id, or ~i for run i of the batch
    runs: list[int]  # their numbers in the batch
    joined: list[bool]  # for each run, whether it goes on from the one before it
    edges: list[tuple[str, str]]  # (text before, text after) where text is cut in two

    def lefts(self) -> list[bool]:
        """For each edge between joined runs, whether a token across it belongs to the left run.

        An answer takes it from its context; a masked gap takes it from its answer.
        """
        kinds: list[tuple[int, bool]] = []  # of each run: its kind, and whether it is such a gap
        for index, (mode, parts) in enumerate(self.segments):
            following = self.segments[index + 1][0] if index + 1 < len(self.segments) else CONTEXT
            kind = mode & KIND_MASK
            is_gap = kind == CONTEXT and following & KIND_MASK == TARGET_CONTINUE
            kinds += [(kind, is_gap)] * sum(part < 0 for part in parts)
        return [
            left[1]
            or (left[0] != CONTEXT and not right[1])
            or (right[0] == CONTEXT and not right[1])
            for left, right, joined in zip(kinds, kinds[1:], self.joined[1:], strict=False)
            if joined
        ]


class Outliner:
    """Makes the outlines of documents."""

    def __init__(self, ids: Mapping[Special, int | None], unsafe_literals: Sequence[str]) -> None:
        """ids: of all special tokens; unsafe_literals: what the tokenizer reads as one of them."""
        self._ids = ids
        unsafe = "|".join(map(re.escape, unsafe_literals))
        self._unsafe_pattern = re.compile(unsafe) if unsafe else None
        self._longest_unsafe = max(map(len, unsafe_literals), default=0)

    def outline(self, document: Document, location: str, numbers: dict[TextRun, int]) -> Outline:
        """The document with its runs added to those of the batch."""
        runs: list[int] = []
        joined: list[bool] = []
        segments: list[tuple[int, list[int]]] = []
        edges: list[tuple[str, str]] = []
        text_before = ""  # all text right before this point, up to a special token
        goes_on = False
        for segment in document.segments:
            parts: list[int] = []
            text = ""
            # The closing None writes out the last run.
            for part in (*self._safe_parts(segment), None):
                if isinstance(part, str):
                    text += part
                    continue
                if text:
                    if self._spells_across(text_before, text):
                        text_before = ""
                    if text_before:
                        edges.append((text_before[-_EDGE_LEFT:], text[:_EDGE_RIGHT]))
                    run = (text, goes_on)
                    runs.append(numbers.setdefault(run, len(numbers)))
                    joined.append(bool(text_before))
                    parts.append(~runs[-1])
                    text_before, text, goes_on = text_before + text, "", True
                if part is not None:
                    token_id = None if part == _BREAK else self._special_id(part, location)
                    if token_id is not None:
                        parts.append(token_id)
                    text_before, goes_on = "", goes_on and part == _BREAK
            segments.append((_mode(segment), parts))
        return Outline(
            location=location,
            segments=segments,
            runs=runs,
            joined=joined,
            edges=edges,
        )

    def _safe_parts(self, segment: Segment) -> Iterator[str | Special]:
        """The parts; text that the tokenizer would read as a control token is broken up."""
        if self._unsafe_pattern is None:
            yield from segment.parts
            return
        for part in _join_texts(segment.parts):
            if not isinstance(part, str):
                yield part
                continue
            done = 0
            # What is left of one literal may hold another.
            while match := self._unsafe_pattern.search(part, done):
                yield part[done : match.start() + 1]
                yield _BREAK
                done = match.start() + 1
            yield part[done:]

    def _spells_across(self, left: str, right: str) -> bool:
        """Whether the two texts spell, where they meet, what neither of them does."""
        if not left or self._unsafe_pattern is None:
            return False
        reach = self._longest_unsafe - 1
        return self._unsafe_pattern.search(left[-reach:] + right[:reach]) is not None

    def _special_id(self, special: Special, location: str) -> int | None:
        token_id = self._ids[special]
        if token_id is None and special != BOS:
            raise ConfigError(
                f"{location}: plain text ends with an end-of-sentence token, which the "
                "tokenizer does not have; use another tokenizer, or leave plain text out"
            )
        return token_id


def _join_texts(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts, with texts that follow each other made one."""
    for is_text, group in itertools.groupby(parts, lambda part: isinstance(part, str)):
        if is_text:
            yield "".join(part for part in group if isinstance(part, str))
        else:
            yield from group


def _mode(segment: Segment) -> int:
    if segment.kind != CONTEXT:
        return segment.kind
    return (
        CONTEXT
        | (MESSAGE_START if segment.starts_message else 0)
        | (LEADING_SYSTEM if segment.leading_system else 0)
    )


def assemble(outline: Outline, encoded: list[list[int]]) -> EncodedSession:
    """Put the runs in; a segment that came out empty (a BOS left out, only spaces) is none.

    encoded: the ids of each run of the outline, in order.
    """
    texts = iter(encoded)
    tokens: list[int] = []
    segment_lengths: list[int] = []
    modes: list[int] = []
    lost_begin = False
    for planned_mode, parts in outline.segments:
        mode = planned_mode
        start = len(tokens)
        for part in parts:
            if part < 0:
                tokens += next(texts)
            else:
                tokens.append(part)
        if len(tokens) == start:
            lost_begin = lost_begin or mode == TARGET_BEGIN
            continue
        if mode == TARGET_CONTINUE and lost_begin:
            mode = TARGET_BEGIN
        lost_begin = lost_begin and mode == CONTEXT
        segment_lengths.append(len(tokens) - start)
        modes.append(mode)
    return EncodedSession(
        tokens=np.array(tokens, dtype=np.int32),
        segment_lengths=np.array(segment_lengths, dtype=np.int32),
        modes=np.array(modes, dtype=np.int8),
        location=outline.location,
    )
