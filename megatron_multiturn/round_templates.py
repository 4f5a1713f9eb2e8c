"""Templates that write rounds of a question and an answer, as those of older chat models do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_multiturn.errors import SessionError
from megatron_multiturn.sessions import Message, Session
from megatron_multiturn.templates import (
    EOS,
    BuiltInTemplate,
    MessageParts,
    Part,
    Segment,
    Unit,
    UnitKey,
    group_parts,
    stripped_runs,
)

# Number of the round from 1, the leading system message ("" but in the first), the question.
WriteQuestion = Callable[[int, str, str], tuple[Part, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTemplate(BuiltInTemplate):
    """Writes rounds of a question and an answer.

    All messages before an answer are its question, joined by "\\n"; the system messages at the
    head of the session are written by `write_system`, or else handed to the first question.
    """

    write_question: WriteQuestion = field(repr=False)
    write_system: Callable[[str], str] | None = field(default=None, repr=False)
    default_system: str = ""
    before_answer: str = ""  # learnt with the answer
    after_answer: str = ""  # likewise
    after_closing: str = ""  # context

    def write(self, session: Session) -> list[Segment]:
        return self._write(session.messages, session.location)

    def units(self, roles: Sequence[str], answers: Sequence[bool]) -> list[Unit]:
        """The rounds, each with its number; what follows the last answer is one too."""
        ends = [index + 1 for index, role in enumerate(roles) if role == "assistant"]
        if not ends or ends[-1] < len(roles):
            ends.append(len(roles))
        return [
            ((number, tuple(roles[start:stop]), tuple(answers[start:stop])), stop - start)
            for number, (start, stop) in enumerate(pairwise([0, *ends]), start=1)
        ]

    def write_unit(self, key: UnitKey, messages: Sequence[Message]) -> list[Segment]:
        number: int = key[0]
        segments = self._write(messages, "a round", number=number)
        return self.with_opening(segments) if number == 1 else segments

    def _write(self, given: Sequence[Message], location: str, *, number: int = 1) -> list[Segment]:
        """The segments of rounds; number: of the first, before which there may be a head."""
        messages = list(given)
        heads = []
        while number == 1 and messages and messages[0].role == "system":
            heads.append(self._text(messages.pop(0)))
        system = "\n".join(heads) or (self.default_system if number == 1 else "")
        segments: list[Segment] = []
        if system and self.write_system is not None:
            segments += group_parts([(self.write_system(system), False)], leading=True)
            system = ""
        question: list[str] = []
        for message in messages:
            if message.role != "assistant":
                question.append(self._question_text(message, location))
                continue
            if not question:
                raise SessionError(
                    f"{location}: an answer stands where template {self.name!r} wants a "
                    "question: at the head, or after another answer; join answers that follow "
                    "each other, or use a template with roles, such as chatml",
                    reason="role-order",
                )
            segments += self._question(number, system, question)
            segments += group_parts(self._answer(message), leading=False, answer=message)
            number, system, question = number + 1, "", []
        if question:
            segments += self._question(number, system, question)
        return segments

    def _question(self, number: int, system: str, texts: list[str]) -> list[Segment]:
        parts = self.write_question(number, system, "\n".join(texts))
        return group_parts([(part, False) for part in parts], leading=False)

    def _question_text(self, message: Message, location: str) -> str:
        if message.role == "tool":
            raise SessionError(
                f"{location}: template {self.name!r} has no place for a message of the "
                "role 'tool'; use --chat-template, or make it a user's message",
                reason="unwritten-role",
            )
        return self._text(message)

    def _text(self, message: Message) -> str:
        return message.content.strip() if self.strips else message.content

    def _answer(self, message: Message) -> MessageParts:
        runs = stripped_runs(message) if self.strips else message.runs()
        parts: MessageParts = [*runs]
        if self.before_answer:
            parts.insert(0, (self.before_answer, runs[0][1]))
        if self.after_answer:
            parts.append((self.after_answer, runs[-1][1]))
        parts.append((EOS, runs[-1][1]))
        if self.after_closing:
            parts.append((self.after_closing, False))
        return parts
