"""Segments -> tokens and one mode byte a segment, a batch of sessions at a time.

Within a segment adjacent text is one run; a run never crosses the edge of a segment, because the
model does not see past it when it answers. A run that follows text directly is encoded as a
continuation (no space is put before it), so that the segments of a session join to its whole
rendering. Two checks count where they do not: a run that does not decode to its text, and an edge
where the whole rendering would be cut into other tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.modes import (
    CONTEXT,
    LEADING_SYSTEM,
    MESSAGE_START,
    TARGET_BEGIN,
    TARGET_CONTINUE,
)
from megatron_multiturn.sessions import Session
from megatron_multiturn.templates import BOS, EOS, Segment, Special, Template
from megatron_multiturn.vocabulary import RunEncoder, TextRun, Vocabulary

# How much text on either side of an edge decides how it is cut into tokens there, in characters.
_EDGE_LEFT = 16
_EDGE_RIGHT = 8
_EDGE_CACHE_SIZE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSession:
    """A session as tokens."""

    tokens: NDArray[np.int32]  # (num_tokens,)
    segment_lengths: NDArray[np.int32]  # (num_segments,), none is 0
    modes: NDArray[np.int8]  # (num_segments,)
    location: str = ""  # "file.jsonl:17", where it came from; not stored


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """What became of a batch of sessions."""

    sessions: list[EncodedSession | SessionError]  # in the order given
    num_unknown_tokens: int  # text that the vocabulary cannot write
    num_lossy_sessions: int  # some run does not decode to its text
    num_recut_sessions: int  # at some edge the whole rendering is cut into other tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outline:
    """A session in which each text run is still a number."""

    location: str
    segments: list[tuple[int, list[int]]]  # (mode, parts): an id, or ~i for run i of the batch
    runs: list[int]  # their numbers in the batch
    edges: list[tuple[str, str]]  # (text before, text after) where text is cut in two


class SessionEncoder:
    """Renders sessions by a template and encodes them with a vocabulary."""

    def __init__(self, template: Template, vocabulary: Vocabulary) -> None:
        """Raises ConfigError if a special token of the template is not one token."""
        self._template = template
        self._vocabulary = vocabulary
        self._run_encoder = RunEncoder(vocabulary)
        self._ids: dict[Special, int | None] = {BOS: vocabulary.bos_id, EOS: vocabulary.eos_id}
        for special in template.specials:
            self._ids[special] = self._require(special)
        self._unsafe_literals = self._find_unsafe_literals()
        self._edge_cache: dict[tuple[str, str], bool] = {}

    @property
    def omits_bos(self) -> bool:
        """Whether the template opens with a BOS that the vocabulary does not have."""
        return self._ids[BOS] is None and BOS in self._template.opening

    def encode(self, sessions: Sequence[Session]) -> EncodedBatch:
        """Encode a batch; a session that cannot be encoded comes back as its SessionError."""
        numbers: dict[TextRun, int] = {}  # templates write the same runs time and again
        outlines: list[_Outline | SessionError] = []
        for session in sessions:
            try:
                self._check_text(session)
            except SessionError as error:
                outlines.append(error)
            else:
                outlines.append(self._outline(session, numbers))
        runs = list(numbers)
        encoded = self._run_encoder.encode(runs)
        kept = [outline for outline in outlines if isinstance(outline, _Outline)]
        lossy = self._run_encoder.find_lossy(runs, encoded)
        recut = self._find_recut({edge for outline in kept for edge in outline.edges})
        unknown = self._vocabulary.unknown_id
        return EncodedBatch(
            sessions=[
                _assemble(outline, encoded) if isinstance(outline, _Outline) else outline
                for outline in outlines
            ],
            num_unknown_tokens=(
                0
                if unknown is None
                else sum(encoded[i].count(unknown) for o in kept for i in o.runs)
            ),
            num_lossy_sessions=sum(not lossy.isdisjoint(outline.runs) for outline in kept),
            num_recut_sessions=sum(not recut.isdisjoint(outline.edges) for outline in kept),
        )

    def _require(self, special: Special) -> int | None:
        """The id of a special token; None only for BOS, which is left out."""
        if special == BOS:
            return self._vocabulary.bos_id
        if special == EOS:
            if self._vocabulary.eos_id is None:
                raise ConfigError(
                    f"the tokenizer has no end-of-sentence token, which closes every answer in "
                    f"template {self._template.name!r}; use another tokenizer, or another template"
                )
            return self._vocabulary.eos_id
        found = self._vocabulary.id_of(special.token)
        if found is None:
            raise ConfigError(
                f"template {self._template.name!r} needs {special.token!r} as one token, which "
                "the tokenizer's vocabulary does not have; use another template or tokenizer, or "
                "add the token with --tokenizer-special-tokens"
            )
        return found

    def _find_unsafe_literals(self) -> tuple[str, ...]:
        """The special tokens that the tokenizer reads out of plain text.

        SentencePiece does so with user-defined symbols, Hugging Face with tokens that were added
        but not declared special.
        """
        unsafe = []
        for token_id in self._ids.values():
            if token_id is None:
                continue
            literal = self._vocabulary.literal_of(token_id)
            if any(token_id in ids for ids in self._vocabulary.encode([literal, f"a{literal}b"])):
                unsafe.append(literal)
        return tuple(unsafe)

    def _check_text(self, session: Session) -> None:
        for number, message in enumerate(session.messages, start=1):
            for literal in self._unsafe_literals:
                if literal in message.content:
                    raise SessionError(
                        f"{session.location}: message {number} spells {literal!r}, which this "
                        "tokenizer cannot keep as text; remove it, or declare the token special "
                        "(SentencePiece: a control symbol)",
                        reason="special-token-in-text",
                    )

    def _outline(self, session: Session, numbers: dict[TextRun, int]) -> _Outline:
        """The session with its runs added to those of the batch."""
        runs: list[int] = []
        segments: list[tuple[int, list[int]]] = []
        edges: list[tuple[str, str]] = []
        text_before = ""  # the run right before this point, if no special token stands between
        for segment in self._template.render(session):
            parts: list[int] = []
            text = ""
            # The closing None writes out the last run.
            for part in (*segment.parts, None):
                if isinstance(part, str):
                    text += part
                    continue
                if text:
                    if text_before:
                        edges.append((text_before[-_EDGE_LEFT:], text[:_EDGE_RIGHT]))
                    run = (text, bool(text_before))
                    runs.append(numbers.setdefault(run, len(numbers)))
                    parts.append(~runs[-1])
                    text_before, text = text, ""
                if part is not None:
                    token_id = self._special_id(part, session)
                    if token_id is not None:
                        parts.append(token_id)
                    text_before = ""
            segments.append((_mode(segment), parts))
        return _Outline(
            location=session.location,
            segments=segments,
            runs=runs,
            edges=edges,
        )

    def _special_id(self, special: Special, session: Session) -> int | None:
        token_id = self._ids[special]
        if token_id is None and special != BOS:
            raise ConfigError(
                f"{session.location}: plain text ends with an end-of-sentence token, which the "
                "tokenizer does not have; use another tokenizer, or leave plain text out"
            )
        return token_id

    def _find_recut(self, edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """The edges at which encoding the text as a whole gives other tokens."""
        if len(self._edge_cache) > _EDGE_CACHE_SIZE:
            self._edge_cache.clear()
        new = [edge for edge in sorted(edges) if edge not in self._edge_cache]
        runs: list[TextRun] = []
        for left, right in new:
            runs += [(left, False), (right, True), (left + right, False)]
        encoded = self._run_encoder.encode(runs)
        for index, edge in enumerate(new):
            left_ids, right_ids, whole_ids = encoded[3 * index : 3 * index + 3]
            self._edge_cache[edge] = left_ids + right_ids != whole_ids
        return {edge for edge in edges if self._edge_cache[edge]}


def _mode(segment: Segment) -> int:
    if segment.kind != CONTEXT:
        return segment.kind
    return (
        CONTEXT
        | (MESSAGE_START if segment.starts_message else 0)
        | (LEADING_SYSTEM if segment.leading_system else 0)
    )


def _assemble(outline: _Outline, encoded: list[list[int]]) -> EncodedSession:
    """Put the runs in; a segment that came out empty (a BOS left out, only spaces) is none."""
    tokens: list[int] = []
    segment_lengths: list[int] = []
    modes: list[int] = []
    lost_begin = False
    for planned_mode, parts in outline.segments:
        mode = planned_mode
        start = len(tokens)
        for part in parts:
            if part < 0:
                tokens += encoded[~part]
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
