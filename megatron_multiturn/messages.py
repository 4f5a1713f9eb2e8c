"""What a session is made of: messages, and the calls of tools in them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool that an assistant's message makes."""

    name: str
    arguments: str = "{}"  # JSON text of an object, its keys in the order given
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One entry of a session."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str  # may be empty in an answer that calls tools, and in what a tool says
    train: bool | None = None  # None: an assistant's message is trained on, no other is
    masked: tuple[tuple[int, int], ...] = ()  # (start, stop) in content, ordered: not trained on
    weight: float = 1.0  # of the turn, positive; read of an assistant's message only
    reasoning: str = ""  # what the assistant thinks before it answers
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None  # of the speaker, or of the tool that answers
    tool_call_id: str | None = None  # the call that a tool's message answers

    @property
    def is_answer(self) -> bool:
        """Whether something of this message is to be learnt."""
        return self.train is not False and (self.role == "assistant" or self.train is True)

    def runs(self) -> list[tuple[str, bool]]:
        """The content cut where training starts or stops: [(text, trained), ...], none empty."""
        if not self.is_answer:
            return [(self.content, False)]
        runs = []
        done = 0
        for start, stop in self.masked:
            runs += [(self.content[done:start], True), (self.content[start:stop], False)]
            done = stop
        runs.append((self.content[done:], True))
        return [(text, trained) for text, trained in runs if text]
