"""Sessions -> tokens and one mode byte a segment, a batch of sessions at a time.

The segments of a document join to its whole rendering, token for token (see `layouts`). Where a
token lies across the edge of an answer, the text on both sides is cut by the tokenizer's offsets:
such a token is the answer's, and context where it reaches into what is masked inside an answer.
Such documents are counted, and so are those with text that does not decode to itself.

Text that spells a control token stays text. Tokenizers that read some of them out of plain text
are given it in two pieces there.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from megatron_multiturn.batch_encoding import DocumentBatch
from megatron_multiturn.control_tokens import ControlLiterals, ControlToken
from megatron_multiturn.encoded_sessions import EncodedBatch, EncodedSession, join_encoded
from megatron_multiturn.engines import Engine, ReferenceEngine
from megatron_multiturn.entries import ROLES
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.layouts import ConstantPool, LayoutMaker
from megatron_multiturn.message_layouts import MessageLayouts
from megatron_multiturn.messages import Message
from megatron_multiturn.plain_chats import PlainChat
from megatron_multiturn.prompt_variants import PromptVariants
from megatron_multiturn.run_encoder import RunEncoder
from megatron_multiturn.sessions import Session
from megatron_multiturn.supervision import DEFAULT_ROLES, select_answers
from megatron_multiturn.template_input import keys_in, message_variables, texts_in
from megatron_multiturn.templates import BOS, EOS, ChatTemplate, Document, Special
from megatron_multiturn.text_groups import fill_texts
from megatron_multiturn.vocabulary import Vocabulary

__all__ = [
    "LITERAL_CONTROL_TOKENS",
    "EncodedBatch",
    "EncodedSession",
    "SessionEncoder",
    "join_encoded",
]

LITERAL_CONTROL_TOKENS = ("escape", "error")

_BARE_MESSAGES = {role: Message(role=role, content="") for role in ROLES.values()}


class SessionEncoder:
    """Renders sessions by a template and encodes them with a vocabulary."""

    def __init__(
        self,
        template: ChatTemplate,
        vocabulary: Vocabulary,
        *,
        engine: Engine | None = None,
        train_on: str = "all",
        train_roles: Sequence[str] = DEFAULT_ROLES,
        prompt_variants: PromptVariants | None = None,
        literal_control_tokens: Literal["escape", "error"] = "escape",
    ) -> None:
        """Raises ConfigError if a special token of the template is not one token.

        engine: encodes texts, as the vocabulary itself does by default; train_on and
        train_roles: see `supervision`; literal_control_tokens: whether text may spell one; it is
        never made one.
        """
        self._template = template
        self._vocabulary = vocabulary
        self._engine = engine or ReferenceEngine(vocabulary)
        if set(train_roles) != set(DEFAULT_ROLES) and not template.trains_any_role:
            raise ConfigError(
                f"--train-roles {' '.join(train_roles)}: template {template.name!r} marks only the "
                "assistant's messages as answers; pass --template chatml or llama3, or leave out "
                "--train-roles"
            )
        self._train_on = train_on
        self._train_roles = tuple(train_roles)
        self._prompt_variants = prompt_variants
        self._run_encoder = RunEncoder(vocabulary)
        self._ids: dict[Special, int | None] = {BOS: vocabulary.bos_id, EOS: vocabulary.eos_id}
        for special in template.specials:
            self._ids[special] = self._require(special)
        self._pool = ConstantPool()
        self._layout_maker = LayoutMaker(
            id_of=self._ids.__getitem__,
            unsafe_literals=self._find_unsafe_literals(),
            run_encoder=self._run_encoder,
            pool=self._pool,
        )
        self._message_layouts = MessageLayouts(template, self._layout_maker, self._answers_of)
        self._refuses_literals = literal_control_tokens == "error"
        self._literals = self._control_literals()

    @property
    def template(self) -> ChatTemplate:
        return self._template

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def omits_bos(self) -> bool:
        """Whether the template opens with a BOS that the vocabulary does not have."""
        return self._ids[BOS] is None and self._template.opens_with_bos

    def encode(
        self, sessions: Sequence[Session | PlainChat], *, stops_at_error: bool = False
    ) -> EncodedBatch:
        """Encode a batch; a session that cannot be encoded is among its errors.

        stops_at_error: leave out what follows such a session. A template may take seconds to fail
        on each.
        """
        batch = DocumentBatch()
        sources: list[int] = []
        errors: list[tuple[int, SessionError]] = []
        totals: Counter[str] = Counter()
        with self._template.batch():
            for source, session in enumerate(sessions):
                rephrased = self._rephrased(session)
                try:
                    documents = self._add(batch, rephrased)
                except SessionError as error:
                    errors.append((source, error))
                    if stops_at_error:
                        break
                    continue
                sources += [source] * len(documents)
                totals["num_rephrased_sessions"] += rephrased is not session
                totals["num_open_turns"] += sum(one.num_open_turns for one in documents)
                totals["num_rewritten_sessions"] += any(one.history_rewritten for one in documents)
        return self._finish(batch, sessions, sources, errors, totals)

    def _add(self, batch: DocumentBatch, session: Session | PlainChat) -> Sequence[Document]:
        """Add a session's documents to the batch."""
        if isinstance(session, PlainChat):
            if self._fill_layout(batch, session):
                return _ONE_DOCUMENT
            session = session.session()
        session = select_answers(session, self._train_on, self._train_roles)
        if self._refuses_literals:
            self._check_texts(session)
        if session.plain and self._ids[EOS] is None:
            raise ConfigError(
                f"{session.location}: plain text ends with an end-of-sentence token, which the "
                "tokenizer does not have; use another tokenizer, or leave plain text out"
            )
        documents = self._template.documents(session)
        layouts = [
            self._layout_maker.make(one.segments, batch.weights, has_slots=False)
            for one in documents
        ]
        for layout in layouts:
            batch.add(layout)
        return documents

    def _rephrased(self, session: Session | PlainChat) -> Session | PlainChat:
        """The session with its only question phrased anew, if it is a bare term."""
        if self._prompt_variants is None:
            return session
        if isinstance(session, PlainChat):
            roles, texts = session.roles, session.contents
        else:
            roles = tuple(message.role for message in session.messages)
            texts = [message.content for message in session.messages]
        if roles.count("user") != 1 or roles.count("assistant") != 1:
            return session
        asked = roles.index("user")
        phrased = self._prompt_variants.phrase(texts[asked], texts)
        if phrased == texts[asked]:
            return session
        if isinstance(session, PlainChat):
            contents = [*texts[:asked], phrased, *texts[asked + 1 :]]
            return session._replace(contents=contents)
        messages = list(session.messages)
        messages[asked] = replace(messages[asked], content=phrased)
        return replace(session, messages=tuple(messages))

    def _fill_layout(self, batch: DocumentBatch, chat: PlainChat) -> bool:
        """Add a chat by the layout of its roles; False if there is none."""
        layout = self._message_layouts.layout_of(chat.roles)
        if layout is None:
            return False
        contents = chat.contents
        if self._template.strips:
            contents = [content.strip() for content in contents]
        texts = fill_texts(layout.group_fills, contents)
        if self._layout_maker.is_unsafe("\n".join(texts)):
            return False
        if self._refuses_literals:
            for number, content in enumerate(contents, start=1):
                self._check_text(content, f"{chat.location}: message {number}")
        batch.fill(layout, contents, texts)
        return True

    def _answers_of(self, roles: tuple[str, ...]) -> list[bool]:
        """Which messages of a chat are trained on; SessionError if none is."""
        messages = tuple([_BARE_MESSAGES[role] for role in roles])
        session = Session(messages=messages, location="roles")
        chosen = select_answers(session, self._train_on, self._train_roles)
        return [message.is_answer for message in chosen.messages]

    def _finish(
        self,
        batch: DocumentBatch,
        sessions: Sequence[Session | PlainChat],
        sources: list[int],
        errors: list[tuple[int, SessionError]],
        totals: Counter[str],
    ) -> EncodedBatch:
        if not len(batch):
            return join_encoded([], errors=errors, totals=totals)
        all_sources = np.array(sources, dtype=np.int32)
        encoded = batch.encode(
            self._engine,
            self._run_encoder,
            self._pool.ids,
            all_sources,
            unknown_id=self._vocabulary.unknown_id,
        )
        totals["num_lossy_sessions"] += int(encoded.is_lossy.sum())
        totals["num_recut_sessions"] += int(encoded.is_recut.sum())
        if self._vocabulary.unknown_id is not None:
            is_unknown = encoded.tokens == self._vocabulary.unknown_id
            totals["num_unknown_tokens"] += int(np.count_nonzero(is_unknown))
        errors += [
            (source, _across_edge(sessions[source].location))
            for source in np.unique(all_sources[encoded.failed]).tolist()
        ]
        return EncodedBatch(
            tokens=encoded.tokens,
            segment_lengths=encoded.segment_lengths,
            modes=encoded.modes,
            first_segments=encoded.first_segments,
            sources=all_sources[~encoded.failed],
            errors=sorted(errors, key=lambda entry: entry[0]),
            totals=totals,
            turn_weights=batch.weights.values,
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

    def _find_unsafe_literals(self) -> list[str]:
        """The control tokens that the tokenizer reads out of plain text, the longest first.

        SentencePiece does so with user-defined symbols, Hugging Face with tokens that were added
        but not declared special.
        """
        found_ids = [token_id for token_id in self._ids.values() if token_id is not None]
        by_literal = {self._vocabulary.literal_of(token_id): token_id for token_id in found_ids}
        for token in self._vocabulary.control_tokens():
            token_id = self._vocabulary.id_of(token.literal) if token.special else None
            if token_id is not None:
                by_literal.setdefault(token.literal, token_id)
        literals, ids = list(by_literal), list(by_literal.values())
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

    def _check_texts(self, session: Session) -> None:
        """Refuse control tokens in whatever a template may write of a session."""
        given: list[tuple[str, Any]] = [
            (f"message {number}", message_variables(message))
            for number, message in enumerate(session.messages, start=1)
        ]
        given += [("'tools'", session.tools), ("a variable", dict(session.template_variables))]
        for where, value in given:
            for text in (*(text for text, _ in texts_in(value)), *keys_in(value)):
                self._check_text(text, f"{session.location}: {where}")

    def _check_text(self, text: str, where: str) -> None:
        for _, _, token in self._literals.find(text):
            raise SessionError(
                f"{where} spells the control token {token.literal!r}; remove it, or pass "
                "--literal-control-tokens escape to keep it as text",
                reason="control-token-in-text",
            )


_ONE_DOCUMENT = (Document(segments=()),)


def _across_edge(location: str) -> SessionError:
    return SessionError(
        f"{location}: a token lies across the edge of an answer, and this tokenizer does not say "
        "where in the text its tokens lie; use its fast variant, or leave the session out",
        reason="token-across-edge",
    )
