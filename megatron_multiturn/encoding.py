"""Segments -> tokens and one mode byte a segment, a batch of sessions at a time.

Within a segment adjacent text is one run. A run that follows text directly is encoded as a
continuation (no space is put before it), so that the segments of a session join to its whole
rendering, token for token. Where they would not, because a token lies across an edge, the text on
both sides is encoded as a whole and cut by the tokenizer's offsets: such a token is the answer's,
and context where it reaches into what is masked inside an answer. Such sessions are counted, and
so are those with a run that does not decode to its text.

Text that spells a control token stays text. Tokenizers that read some of them out of plain text
are given it in two pieces there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_multiturn.control_tokens import ControlLiterals, ControlToken
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.outlines import EncodedSession, Outline, Outliner, assemble
from megatron_multiturn.run_encoder import RunEncoder, TextRun
from megatron_multiturn.sessions import Session
from megatron_multiturn.templates import BOS, EOS, ChatTemplate, Special
from megatron_multiturn.vocabulary import Vocabulary

__all__ = [
    "LITERAL_CONTROL_TOKENS",
    "EncodedBatch",
    "EncodedSession",
    "SessionEncoder",
    "join_encoded",
]

_EDGE_CACHE_SIZE = 1 << 16

LITERAL_CONTROL_TOKENS = ("escape", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """What became of a batch of sessions; all arrays are of the sessions one after another."""

    tokens: NDArray[np.int32]  # (num_tokens,)
    segment_lengths: NDArray[np.int32]  # (num_segments,), none is 0
    modes: NDArray[np.int8]  # (num_segments,)
    first_segments: NDArray[np.int64]  # (num_sessions + 1,), from 0
    # (num_sessions,): which of the given sessions each came from, ascending; one can become several
    # documents, or none.
    sources: NDArray[np.int32]
    errors: list[tuple[int, SessionError]]  # (source, why it could not be encoded), ascending
    # num_unknown_tokens: text that the vocabulary cannot write
    # num_lossy_sessions: some run does not decode to its text
    # num_recut_sessions: some token lies across an edge
    # num_open_turns: whose end is text, so that nothing says that the answer is over
    # num_rewritten_sessions: their template rewrites history
    totals: Counter[str]

    @property
    def num_sessions(self) -> int:
        return len(self.sources)

    def session(self, index: int) -> EncodedSession:
        """Session `index` of the batch; a view."""
        start, stop = self.first_segments[index : index + 2].tolist()
        first_token = int(self.segment_lengths[:start].sum())
        lengths = self.segment_lengths[start:stop]
        return EncodedSession(
            tokens=self.tokens[first_token : first_token + int(lengths.sum())],
            segment_lengths=lengths,
            modes=self.modes[start:stop],
        )


def join_encoded(
    sessions: Sequence[EncodedSession],
    *,
    sources: Sequence[int] | None = None,
    errors: Sequence[tuple[int, SessionError]] = (),
    totals: Mapping[str, int] | None = None,
) -> EncodedBatch:
    """A batch of sessions that are encoded already; without `sources`, each is a source."""
    ends = np.cumsum([len(session.modes) for session in sessions], dtype=np.int64)
    return EncodedBatch(
        tokens=_concatenate([session.tokens for session in sessions], np.int32),
        segment_lengths=_concatenate([session.segment_lengths for session in sessions], np.int32),
        modes=_concatenate([session.modes for session in sessions], np.int8),
        first_segments=np.concatenate([np.zeros(1, dtype=np.int64), ends]),
        sources=np.array(range(len(sessions)) if sources is None else sources, dtype=np.int32),
        errors=list(errors),
        totals=Counter(totals),
    )


def _concatenate(arrays: Sequence[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype, copy=False)


class SessionEncoder:
    """Renders sessions by a template and encodes them with a vocabulary."""

    def __init__(
        self,
        template: ChatTemplate,
        vocabulary: Vocabulary,
        *,
        literal_control_tokens: Literal["escape", "error"] = "escape",
    ) -> None:
        """Raises ConfigError if a special token of the template is not one token.

        literal_control_tokens: whether text may spell one; it is never made one.
        """
        self._template = template
        self._vocabulary = vocabulary
        self._run_encoder = RunEncoder(vocabulary)
        self._ids: dict[Special, int | None] = {BOS: vocabulary.bos_id, EOS: vocabulary.eos_id}
        for special in template.specials:
            self._ids[special] = self._require(special)
        unsafe = self._find_unsafe_literals()
        self._outliner = Outliner(self._ids, unsafe)
        self._refuses_literals = literal_control_tokens == "error"
        self._literals = self._control_literals()
        self._edge_cache: dict[tuple[str, str], bool] = {}

    @property
    def template(self) -> ChatTemplate:
        return self._template

    @property
    def omits_bos(self) -> bool:
        """Whether the template opens with a BOS that the vocabulary does not have."""
        return self._ids[BOS] is None and self._template.opens_with_bos

    def encode(self, sessions: Sequence[Session]) -> EncodedBatch:
        """Encode a batch; a session that cannot be encoded is among its errors."""
        numbers: dict[TextRun, int] = {}  # templates write the same runs time and again
        outlines: list[Outline | SessionError] = []
        sources: list[int] = []
        num_open_turns = num_rewritten = 0
        for source, session in enumerate(sessions):
            found: list[Outline | SessionError] = []
            try:
                self._check_text(session)
                documents = self._template.documents(session)
                found += [
                    self._outliner.outline(document, session.location, numbers)
                    for document in documents
                ]
            except SessionError as error:
                found = [error]
            else:
                num_open_turns += sum(document.num_open_turns for document in documents)
                num_rewritten += any(document.history_rewritten for document in documents)
            outlines += found
            sources += [source] * len(found)
        runs = list(numbers)
        encoded = self._run_encoder.encode(runs)
        kept = [outline for outline in outlines if isinstance(outline, Outline)]
        lossy = self._run_encoder.find_lossy(runs, encoded)
        recut = self._find_recut({edge for outline in kept for edge in outline.edges})
        unknown = self._vocabulary.unknown_id
        finished_sessions: list[EncodedSession] = []
        kept_sources: list[int] = []
        errors: list[tuple[int, SessionError]] = []
        for source, outline in zip(sources, outlines, strict=True):
            finished = self._finish(outline, runs, encoded, recut)
            if isinstance(finished, SessionError):
                errors.append((source, finished))
            else:
                finished_sessions.append(finished)
                kept_sources.append(source)
        totals = {
            "num_unknown_tokens": (
                0
                if unknown is None
                else sum(encoded[i].count(unknown) for o in kept for i in o.runs)
            ),
            "num_lossy_sessions": sum(not lossy.isdisjoint(outline.runs) for outline in kept),
            "num_recut_sessions": sum(not recut.isdisjoint(outline.edges) for outline in kept),
            "num_open_turns": num_open_turns,
            "num_rewritten_sessions": num_rewritten,
        }
        return join_encoded(finished_sessions, sources=kept_sources, errors=errors, totals=totals)

    def _finish(
        self,
        outline: Outline | SessionError,
        runs: list[TextRun],
        encoded: list[list[int]],
        recut: set[tuple[str, str]],
    ) -> EncodedSession | SessionError:
        if isinstance(outline, SessionError):
            return outline
        own = [encoded[number] for number in outline.runs]
        if not recut.isdisjoint(outline.edges):
            try:
                own = self._encode_whole(outline, runs)
            except SessionError as error:
                return error
        return assemble(outline, own)

    def _encode_whole(self, outline: Outline, runs: list[TextRun]) -> list[list[int]]:
        """The ids of each run, where runs that go on from one another are encoded as one text."""
        encoded: list[list[int]] = []
        is_left = iter(outline.lefts())
        start = 0
        for stop in range(1, len(outline.runs) + 1):
            if stop < len(outline.runs) and outline.joined[stop]:
                continue
            texts = [runs[number][0] for number in outline.runs[start:stop]]
            ends = np.cumsum([len(text) for text in texts])[:-1].tolist()
            edges = [(end, next(is_left)) for end in ends]
            goes_on = runs[outline.runs[start]][1]
            ids = self._run_encoder.encode_cut(("".join(texts), goes_on), edges)
            if ids is None:
                raise SessionError(
                    f"{outline.location}: a token lies across the edge of an answer, and this "
                    "tokenizer does not say where in the text its tokens lie; use its fast "
                    "variant, or leave the session out",
                    reason="token-across-edge",
                )
            encoded += ids
            start = stop
        return encoded

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

    def _find_unsafe_literals(self) -> list[str]:
        """The special tokens that the tokenizer reads out of plain text, the longest first.

        SentencePiece does so with user-defined symbols, Hugging Face with tokens that were added
        but not declared special.
        """
        ids = [token_id for token_id in self._ids.values() if token_id is not None]
        literals = [self._vocabulary.literal_of(token_id) for token_id in ids]
        encoded = self._vocabulary.encode(
            [text for literal in literals for text in (literal, f"a{literal}b")]
        )
        unsafe = {
            literal
            for number, (token_id, literal) in enumerate(zip(ids, literals, strict=True))
            if any(token_id in found for found in encoded[2 * number : 2 * number + 2])
        }
        return sorted(unsafe, key=lambda literal: (-len(literal), literal))

    def _control_literals(self) -> ControlLiterals:
        """The control tokens that no message may spell, if such sessions are refused."""
        tokens = {token.literal: token for token in self._vocabulary.control_tokens()}
        for token_id in self._ids.values():
            if token_id is not None:
                literal = self._vocabulary.literal_of(token_id)
                tokens.setdefault(literal, ControlToken(literal=literal, special=True))
        return ControlLiterals([t for t in tokens.values() if t.special and t.literal.strip()])

    def _check_text(self, session: Session) -> None:
        if not self._refuses_literals:
            return
        for number, message in enumerate(session.messages, start=1):
            calls = (text for call in message.tool_calls for text in (call.name, call.arguments))
            for text in (message.content, message.reasoning, *calls):
                for _, _, token in self._literals.find(text):
                    raise SessionError(
                        f"{session.location}: message {number} spells the control token "
                        f"{token.literal!r}; remove it, or pass --literal-control-tokens escape "
                        "to keep it as text",
                        reason="control-token-in-text",
                    )

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
