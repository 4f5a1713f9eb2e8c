"""Which answers of a session are trained on: --train-on, over what the records say.

    all             every answer
    last            the last answer of the session
    last-exchange   every answer behind the user's last message: the calls of tools that lead to
                    the last answer, and that answer
    assistant       every answer in words; an answer that calls tools is context

A record can only leave out of these (`"train": false`); `"train": true` adds none. The choice is
written into `train` of the messages, which the templates go by. Plain text is always trained on.
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_multiturn.errors import SessionError
from megatron_multiturn.messages import Message
from megatron_multiturn.sessions import Session, learns_something


def select_answers(session: Session, train_on: str) -> Session:
    """The session with `train` false on the answers that are left out.

    train_on: a key of TRAIN_ON. Raises SessionError if no answer is left, or if one that is left
    has a weight, for which a dataset has no place yet.
    """
    messages = session.messages
    if train_on != "all" and not session.plain:
        chosen = TRAIN_ON[train_on](messages)
        messages = tuple(
            message if number in chosen or not message.is_answer else replace(message, train=False)
            for number, message in enumerate(messages)
        )
        if not any(map(learns_something, messages)):
            raise SessionError(
                f"{session.location}: --train-on {train_on} leaves no answer: those it takes are "
                "missing, or have train false; remove the session, or pass --train-on all",
                reason="nothing-to-train",
            )
    for number, message in enumerate(messages, start=1):
        if message.is_answer and message.weight != 1.0:
            raise SessionError(
                f"{session.location}: message {number} has the weight {message.weight:g}, but "
                "turns of this version's datasets weigh alike; remove 'weight', or write 0 to "
                "leave the answer out",
                reason="weight",
            )
    return session if messages is session.messages else replace(session, messages=messages)


def _all(messages: tuple[Message, ...]) -> set[int]:
    return set(range(len(messages)))


def _last(messages: tuple[Message, ...]) -> set[int]:
    return {max(_of_role(messages, "assistant"))}


def _last_exchange(messages: tuple[Message, ...]) -> set[int]:
    asked = max(_of_role(messages, "user"), default=-1)
    return {number for number in _of_role(messages, "assistant") if number > asked}


def _in_words(messages: tuple[Message, ...]) -> set[int]:
    return {number for number in _of_role(messages, "assistant") if not messages[number].tool_calls}


def _of_role(messages: tuple[Message, ...], role: str) -> list[int]:
    return [number for number, message in enumerate(messages) if message.role == role]


# The numbers of the messages that may be trained on.
TRAIN_ON: dict[str, Callable[[tuple[Message, ...]], set[int]]] = {
    "all": _all,
    "last": _last,
    "last-exchange": _last_exchange,
    "assistant": _in_words,
}
