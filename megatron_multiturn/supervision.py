"""Which messages of a session are trained on: --train-roles and --train-on, over the records.

--train-roles names the roles whose messages are answers, the assistant's by default. Of these
--train-on takes

    all             every answer
    last            the last answer of the session
    last-exchange   every answer behind the user's last message: the calls of tools that lead to
                    the last answer, and that answer
    assistant       every answer in words; an answer that calls tools is context

A record can only leave out of these (`"train": false`); `"train": true` adds none. The choice is
written into `train` of the messages, which the templates go by. Plain text is always trained on.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from megatron_multiturn.errors import SessionError
from megatron_multiturn.messages import Message
from megatron_multiturn.sessions import Session, learns_something

TRAIN_ROLES = ("assistant", "user", "tool", "system")
DEFAULT_ROLES = ("assistant",)


def select_answers(
    session: Session, train_on: str, train_roles: Collection[str] = DEFAULT_ROLES
) -> Session:
    """The session with `train` false on the answers that are left out.

    train_on: a key of TRAIN_ON; train_roles: some of TRAIN_ROLES. Raises SessionError if no answer
    is left.
    """
    takes_all = train_on == "all" and set(train_roles) == set(DEFAULT_ROLES)
    if takes_all or session.plain:
        return session
    answers = [
        number for number, message in enumerate(session.messages) if message.role in train_roles
    ]
    chosen = TRAIN_ON[train_on](session.messages, answers) if answers else set()
    messages = tuple(
        replace(message, train=number in chosen and message.train is not False)
        for number, message in enumerate(session.messages)
    )
    if not any(map(learns_something, messages)):
        other = "other --train-roles" if train_on == "all" else "--train-on all"
        raise SessionError(
            f"{session.location}: --train-on {train_on} leaves no answer of the roles "
            f"{', '.join(sorted(train_roles))}: those it takes are missing, or have train false; "
            f"remove the session, or pass {other}",
            reason="nothing-to-train",
        )
    return replace(session, messages=messages)


def _all(_messages: Sequence[Message], answers: list[int]) -> set[int]:
    return set(answers)


def _last(_messages: Sequence[Message], answers: list[int]) -> set[int]:
    return {answers[-1]}


def _last_exchange(messages: Sequence[Message], answers: list[int]) -> set[int]:
    asked = max((n for n, message in enumerate(messages) if message.role == "user"), default=-1)
    return {number for number in answers if number > asked}


def _in_words(messages: Sequence[Message], answers: list[int]) -> set[int]:
    return {number for number in answers if not messages[number].tool_calls}


# The numbers of the messages that may be trained on, of those that are answers by their role.
TRAIN_ON: dict[str, Callable[[Sequence[Message], list[int]], set[int]]] = {
    "all": _all,
    "last": _last,
    "last-exchange": _last_exchange,
    "assistant": _in_words,
}
