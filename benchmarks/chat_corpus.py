"""Chat sessions for a benchmark: read or made up, of many turns, and as many as are wanted."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from megatron_multiturn.demo_corpus import demo_sessions

Messages = list[dict[str, str]]

_CLAUSE = re.compile(r"[^，。！？；,.!?;\n]*[，。！？；,.!?;\n\s]*")
_UNIT = re.compile(r"[\u4e00-\u9fff]|[A-Za-z]+")
# One exchanged word of so many is made up, so that words come in that were never seen before.
_WORDS_PER_NEW_WORD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Sessions on disk, in the two forms that the tools take."""

    sessions: Path  # JSONL of {"messages": [{"role", "content"}]}
    joined: Path  # JSONL of {"text"}: the texts of a session, joined by newlines
    text_bytes: tuple[int, ...]  # of the messages of each session, as UTF-8

    @property
    def num_bytes(self) -> int:
        return sum(self.text_bytes)


def generated_sessions(num_sessions: int) -> list[Messages]:
    """Made-up sessions of 2 to 8 turns."""
    return [session["messages"] for session in demo_sessions(num_sessions, seed=0)]


def read_sessions(paths: Iterable[str]) -> list[Messages]:
    """The sessions of JSONL files of {"messages"}: of each message its role and its text.

    Those with a message without text are left out.
    """
    sessions = []
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"]
            if all(message["content"].strip() for message in messages):
                sessions.append([{"role": m["role"], "content": m["content"]} for m in messages])
    return sessions


def join_sessions(sessions: Iterable[Messages], min_turns: int) -> list[Messages]:
    """Sessions of at least `min_turns` answers: shorter ones go on with those that follow.

    The system message of one that another goes on with is left out; what is too short at the
    very end too.
    """
    joined: list[Messages] = []
    begun: Messages = []
    for messages in sessions:
        begun = begun + [m for m in messages if not begun or m["role"] != "system"]
        if sum(message["role"] == "assistant" for message in begun) >= min_turns:
            joined.append(begun)
            begun = []
    return joined


def write_corpus(folder: Path, sessions: Sequence[Messages], num_bytes: int) -> Corpus:
    """The first sessions of `grow` that hold at least `num_bytes` of text; 0: these sessions."""
    folder.mkdir(parents=True)
    corpus_path, joined_path = folder / "sessions.jsonl", folder / "joined.jsonl"
    text_bytes: list[int] = []
    total = 0
    with (
        corpus_path.open("w", encoding="utf-8") as corpus_file,
        joined_path.open("w", encoding="utf-8") as joined_file,
    ):
        for number, messages in enumerate(grow(sessions)):
            if total >= num_bytes if num_bytes else number == len(sessions):
                break
            texts = [message["content"] for message in messages]
            text_bytes.append(sum(len(text.encode()) for text in texts))
            total += text_bytes[-1]
            corpus_file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            joined_file.write(json.dumps({"text": "\n".join(texts)}, ensure_ascii=False) + "\n")
    return Corpus(sessions=corpus_path, joined=joined_path, text_bytes=tuple(text_bytes))


def grow(sessions: Sequence[Messages]) -> Iterator[Messages]:
    """The sessions, and then changed copies of them without end.

    In a copy the clauses of a message are rotated, and one word or Chinese character of each is
    exchanged for one drawn from all of them, so that what a tokenizer keeps of the texts that it
    has seen helps it no more than it would in a corpus of that size.
    """
    yield from sessions
    clauses = [
        [[_cut(clause) for clause in _CLAUSE.findall(m["content"]) if clause] for m in messages]
        for messages in sessions
    ]
    units = [unit for message in clauses for text in message for _, unit, _ in text if unit]
    words = [unit for unit in units if unit.isascii()] or [""]
    characters = [unit for unit in units if not unit.isascii()] or [""]
    for copy in count(1):
        rng = random.Random(copy)
        drawn_words = rng.choices(words, k=len(words))
        for place in range(0, len(words) - 1, _WORDS_PER_NEW_WORD):
            first, second = drawn_words[place], drawn_words[place + 1]
            drawn_words[place] = first[: len(first) // 2 + 1] + second[len(second) // 2 :]
        next_word = iter(drawn_words)
        next_character = iter(rng.choices(characters, k=len(characters)))
        for messages, texts in zip(sessions, clauses, strict=True):
            changed = []
            for message, text in zip(messages, texts, strict=True):
                parts = [
                    before + next(next_word if unit.isascii() else next_character) + after
                    if unit
                    else before
                    for before, unit, after in text
                ]
                turn = copy % len(parts) if parts else 0
                content = "".join([*parts[turn:], *parts[:turn]])
                changed.append({"role": message["role"], "content": content})
            yield changed


def _cut(clause: str) -> tuple[str, str, str]:
    """(before, unit, after) around the word or character in the middle; (clause, "", "")."""
    units = list(_UNIT.finditer(clause))
    if not units:
        return clause, "", ""
    unit = units[len(units) // 2]
    return clause[: unit.start()], unit[0], clause[unit.end() :]
