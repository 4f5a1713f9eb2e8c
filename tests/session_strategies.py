"""Hypothesis strategies for sessions of every shape; see `drawn_sessions` for the drawings."""

from drawn_sessions import DrawnSession, draw
from hypothesis import strategies as st


@st.composite
def drawings(draw_value: st.DrawFn, max_turns: int = 6, max_run: int = 9) -> str:
    """System or not, adjacent turns, masked gaps, no turn at all, a target first."""

    def run(character: str) -> str:
        return character * draw_value(st.integers(1, max_run))

    parts = ["|" + run("s")] if draw_value(st.booleans()) else []
    for turn in range(draw_value(st.integers(0, max_turns))):
        letter = chr(ord("A") + turn)
        for _ in range(draw_value(st.integers(0, 2))):
            parts.append("|" + run("u"))
        if draw_value(st.booleans()):
            parts.append("|" + run("h"))
        parts.append(run(letter))
        if draw_value(st.booleans()):
            parts += [run("."), run(letter)]
    if not parts or draw_value(st.booleans()):
        parts.append("|" + run("u"))
    return "".join(parts)


def sessions(max_turns: int = 6, max_run: int = 9) -> st.SearchStrategy[DrawnSession]:
    return drawings(max_turns, max_run).map(draw)


def corpora(max_sessions: int = 12) -> st.SearchStrategy[list[DrawnSession]]:
    """Of mixed sessions, of one, of equal ones, and with sessions of a single token."""
    return st.one_of(
        st.lists(sessions(), max_size=max_sessions),
        sessions().map(lambda session: [session]),
        st.tuples(sessions(), st.integers(2, max_sessions)).map(lambda pair: [pair[0]] * pair[1]),
        st.lists(st.one_of(sessions(), st.sampled_from([draw("A"), draw("|u")])), max_size=8),
    )
