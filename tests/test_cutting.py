"""All long sessions are cut at once as each would be cut by itself."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from cutting_reference import Cut, Reference
from drawn_sessions import DrawnSession, draw, segment_index, session_lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from session_strategies import corpora

from megatron_multiturn import cutting
from megatron_multiturn.cutting import CutTally, Window, cut_windows, read_long_sessions
from megatron_multiturn.windows import CutReport, PieceTable, cut_sessions

COUNTS = [entry.name for entry in fields(CutTally)]


def expected_cuts(corpus: list[DrawnSession], window: int, context: int, how: str) -> list[Cut]:
    """Of the sessions that do not fit, in their order."""
    return [
        getattr(Reference(session, window + 1, context), how)()
        for session in corpus
        if len(session.tokens) > window + 1
    ]


def cut(
    corpus: list[DrawnSession], window: int, context: int, how: str
) -> tuple[PieceTable, CutReport]:
    return cut_sessions(
        session_lengths(corpus),
        sequence_length=window,
        long_session=how,
        segment_index=segment_index(corpus) if corpus else EMPTY_INDEX,
        window_context=context,
    )


EMPTY_INDEX = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int8))


@pytest.mark.parametrize("how", ["window", "truncate", "drop"])
def test_it_cuts_as_one_by_one(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None)
    @given(corpora(), st.integers(1, 40), st.floats(0, 1), st.integers(1, 60))
    def check(
        corpus: list[DrawnSession], window: int, share: float, segments_at_a_time: int
    ) -> None:
        monkeypatch.setattr(cutting, "_SEGMENTS_AT_A_TIME", segments_at_a_time)
        context = int(share * (window - 1))
        cuts = expected_cuts(corpus, window, context, how)
        pieces, report = cut(corpus, window, context, how)
        spans = [span for one in cuts for span in one.spans]
        assert [tuple(span) for span in pieces.cut_spans.tolist()] == spans
        for name in COUNTS:
            assert getattr(report, name) == sum(getattr(one, name) for one in cuts), name
            seen[name] += getattr(report, name) > 0
        numbers = np.flatnonzero(session_lengths(corpus) > window + 1)
        owners = [n for n, one in zip(numbers, cuts, strict=True) for _ in one.spans]
        assert pieces.session[len(pieces) - len(spans) :].tolist() == owners
        assert report.num_sessions_cut == sum(bool(one.spans) for one in cuts)
        assert report.num_sessions_dropped == sum(not one.spans for one in cuts)
        seen["several"] += len(cuts) > 1
        seen["without a piece"] += any(not one.spans for one in cuts)
        seen["cut and whole"] += 0 < len(spans) < len(pieces)

    check()
    least = {"window": 5, "truncate": 4, "drop": 2}[how]
    assert sum(seen[name] > 10 for name in COUNTS) >= least, seen
    assert seen["several"] > 10
    assert seen["without a piece"] > 10
    assert how == "drop" or seen["cut and whole"] > 10


def test_a_window_that_ends_elsewhere_is_noticed() -> None:
    """The comparison can fail: one token less room gives other pieces."""
    session = draw("|uuAA|uuBB|uuCC")
    batch = read_long_sessions(segment_index([session]), np.array([0]))
    pieces, _ = cut_windows(batch, Window(capacity=7, context=2))
    assert pieces.spans.tolist() != [list(s) for s in Reference(session, 8, 2).window().spans]


@pytest.mark.parametrize("segments_at_a_time", [1, 3, 7, 1000])
def test_sessions_are_read_in_batches(
    segments_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "_SEGMENTS_AT_A_TIME", segments_at_a_time)
    corpus = [draw("|uA" * count) for count in (1, 4, 2, 9, 1, 1, 3)]
    numbers = np.array([1, 2, 3, 6])
    batches = list(cutting.batches_of_sessions(segment_index(corpus), numbers))
    assert [length for _, batch in batches for length in batch.length.tolist()] == [8, 4, 18, 6]
    assert batches[0][0] == 0
    stops = np.cumsum([len(batch.length) for _, batch in batches])
    assert [first for first, _ in batches[1:]] == stops[:-1].tolist()
    assert (len(batches) == 1) == (segments_at_a_time == 1000)
