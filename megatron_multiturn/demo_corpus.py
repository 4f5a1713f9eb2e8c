"""The demo corpus: sessions whose later answers need what was said in earlier turns.

A person tells a name, a town and what they buy and use up; later questions ask for it. A
system message, where there is one, decides whether answers are short or whole sentences. Some
answers are wrong on purpose and marked `"train": false`; the corrected answer follows. A
model that sees a turn alone can only guess, so the loss falls low only for one that has
learned to look back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NAMES = (
    "Nora",
    "Ravi",
    "Lena",
    "Omar",
    "Mia",
    "Tom",
    "Yuki",
    "Sara",
    "Ivan",
    "Ada",
    "Leo",
    "Wei",
    "Ines",
    "Paul",
    "Zoe",
    "Kofi",
)
TOWNS = (
    "Oslo",
    "Lima",
    "Cairo",
    "Paris",
    "Delhi",
    "Kyoto",
    "Quito",
    "Rome",
    "Accra",
    "Perth",
    "Turin",
    "Hanoi",
)
ITEMS = ("apples", "pears", "books", "pens", "cups", "keys", "eggs", "maps")

SHORT_STYLE = "Answer in as few words as you can."
LONG_STYLE = "Answer in whole sentences."

Message = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Conversation:
    """One session in the making: what has been told so far, and its messages."""

    rng: np.random.Generator
    is_short: bool
    name: str | None = None
    town: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def choose(self, options: tuple[str, ...]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def say(self, question: str, short: str, long: str) -> None:
        answer = short if self.is_short else long
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": answer})


def tell_name(talk: Conversation) -> None:
    talk.name = talk.choose(NAMES)
    question = talk.choose(("My name is {}.", "I am {}.", "Please call me {}."))
    talk.say(question.format(talk.name), "Hello.", f"Hello {talk.name}, nice to meet you.")


def tell_town(talk: Conversation) -> None:
    talk.town = talk.choose(TOWNS)
    question = talk.choose(("I live in {}.", "My home is in {}."))
    talk.say(question.format(talk.town), "Noted.", f"Thank you, I will remember {talk.town}.")


def buy(talk: Conversation) -> None:
    item, number = talk.choose(ITEMS), int(talk.rng.integers(2, 7))
    talk.counts[item] = total = talk.counts.get(item, 0) + number
    talk.say(f"I buy {number} {item}.", f"{total}.", f"Now you have {total} {item}.")


def use_up(talk: Conversation) -> None:
    item = talk.choose(tuple(talk.counts))
    number = int(talk.rng.integers(1, talk.counts[item] + 1))
    talk.counts[item] = total = talk.counts[item] - number
    talk.say(f"I use up {number} {item}.", f"{total}.", f"Then {total} {item} are left.")
    if total == 0:
        del talk.counts[item]


def ask_name(talk: Conversation) -> None:
    talk.say("What is my name?", f"{talk.name}.", f"Your name is {talk.name}.")


def ask_town(talk: Conversation) -> None:
    talk.say("Where do I live?", f"{talk.town}.", f"You live in {talk.town}.")


def ask_count(talk: Conversation) -> None:
    item = talk.choose(tuple(talk.counts))
    total = talk.counts[item]
    question = f"How many {item} do I have?"
    if talk.rng.random() < 0.15:
        wrong = f"{total + 1}." if talk.is_short else f"You have {total + 1} {item}."
        talk.say(question, wrong, wrong)
        talk.messages[-1]["train"] = False
        question = "That is wrong, count again."
    talk.say(question, f"{total}.", f"You have {total} {item}.")


def ask_whether(talk: Conversation) -> None:
    guess = talk.name if talk.rng.random() < 0.5 else talk.choose(NAMES)
    if guess == talk.name:
        talk.say(f"Am I {guess}?", "Yes.", f"Yes, you are {guess}.")
    else:
        talk.say(f"Am I {guess}?", "No.", f"No, you are not {guess}, you are {talk.name}.")


def ask_all(talk: Conversation) -> None:
    known = [f"you have {total} {item}" for item, total in talk.counts.items()]
    if talk.town:
        known.insert(0, f"you live in {talk.town}")
    if talk.name:
        known.insert(0, f"your name is {talk.name}")
    listed = ", ".join(known)
    talk.say("Tell me all you know about me.", f"{listed}.", f"This is what I know: {listed}.")


Action = tuple[Callable[[Conversation], None], Callable[[Conversation], object]]

# Each with what it needs to have been told before.
ACTIONS: tuple[Action, ...] = (
    (tell_name, lambda talk: talk.name is None),
    (tell_town, lambda talk: talk.town is None),
    (buy, lambda talk: len(talk.counts) < 3),
    (use_up, lambda talk: talk.counts),
    (ask_name, lambda talk: talk.name),
    (ask_town, lambda talk: talk.town),
    (ask_count, lambda talk: talk.counts),
    (ask_whether, lambda talk: talk.name),
    (ask_all, lambda talk: talk.name and talk.town and talk.counts),
)


def demo_session(rng: np.random.Generator) -> dict[str, list[Message]]:
    """One session of 2 to 8 turns in OpenAI form: {"messages": [...]}."""
    style = (None, SHORT_STYLE, LONG_STYLE)[int(rng.integers(3))]
    talk = Conversation(rng=rng, is_short=style == SHORT_STYLE)
    if style is not None:
        talk.messages.append({"role": "system", "content": style})
    for _ in range(int(rng.integers(2, 9))):
        possible = [act for act, is_possible in ACTIONS if is_possible(talk)]
        possible[int(rng.integers(len(possible)))](talk)
    return {"messages": talk.messages}


def demo_sessions(num_sessions: int, *, seed: int) -> Iterator[dict[str, list[Message]]]:
    """The corpus; the same for the same seed, and a longer one begins with the shorter one."""
    for index in range(num_sessions):
        yield demo_session(np.random.default_rng([seed, index]))
