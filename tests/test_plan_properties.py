"""What holds of every plan, whatever the sessions."""

from collections import Counter

import numpy as np
from drawn_sessions import DrawnSession, segment_index, session_lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from session_strategies import corpora
from test_cutting import EMPTY_INDEX

from megatron_multiturn.packing import PackPlan, pack
from megatron_multiturn.windows import PieceTable, cut_sessions

LEAST_SEEN = 15


def test_every_plan() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=500, deadline=None)
    @given(
        corpus=corpora(),
        units=st.integers(1, 12),
        multiple=st.sampled_from([1, 2, 4, 6]),
        how=st.sampled_from(["window", "window", "truncate", "drop"]),
        seed=st.integers(0, 2**32),
        num_epochs=st.integers(1, 3),
    )
    def check(
        corpus: list[DrawnSession], units: int, multiple: int, how: str, seed: int, num_epochs: int
    ) -> None:
        length = units * multiple
        lengths = session_lengths(corpus)
        pieces, report = cut_sessions(
            lengths,
            sequence_length=length,
            long_session=how,
            segment_index=segment_index(corpus) if corpus else EMPTY_INDEX,
        )
        plans = [
            pack(
                pieces,
                sequence_length=length,
                piece_multiple=multiple,
                seed=seed,
                num_epochs=num_epochs,
            )
            for _ in range(2)
        ]
        _same(*plans)
        filled = _filled(pieces, multiple)
        _check_rows(plans[0], filled, length, num_epochs)
        if how == "window":
            assert _targets(corpus, pieces) == _all_targets(corpus)
        else:
            assert set(_targets(corpus, pieces)) <= set(_all_targets(corpus))
        seen["over-long"] += report.num_sessions_cut > 0
        seen["single token"] += report.num_sessions_too_short > 0
        seen["all equal"] += len(lengths) > 1 and len(set(lengths.tolist())) == 1
        seen["one session"] += len(corpus) == 1
        seen["empty"] += not corpus
        seen["no piece"] += not len(pieces)
        seen["rounded"] += bool((filled > pieces.num_positions()).any())
        seen["shared row"] += plans[0].stats.max_pieces_per_row > 1
        seen["epochs"] += num_epochs > 1 and len(pieces) > 0

    check()
    assert all(count >= LEAST_SEEN for count in seen.values()), seen
    assert len(seen) == 9


def _filled(pieces: PieceTable, multiple: int) -> NDArray[np.int64]:
    """Positions that each piece takes."""
    return np.array([-(-n // multiple) * multiple for n in pieces.num_positions().tolist()], int)


def _same(first: PackPlan, second: PackPlan) -> None:
    np.testing.assert_array_equal(first.row_offsets, second.row_offsets)
    np.testing.assert_array_equal(first.row_pieces, second.row_pieces)
    assert first.stats == second.stats


def _check_rows(plan: PackPlan, filled: NDArray[np.int64], length: int, num_epochs: int) -> None:
    """Every piece once an epoch, no row over its length or empty."""
    num_pieces, num_rows = len(filled), plan.stats.num_rows
    assert plan.num_rows == num_epochs * num_rows
    assert len(plan.row_pieces) == num_epochs * num_pieces == plan.row_offsets[-1]
    assert num_rows >= plan.stats.min_num_rows == -(-int(filled.sum()) // length)
    for epoch in range(num_epochs):
        rows = [plan.pieces_of_row(epoch * num_rows + row).tolist() for row in range(num_rows)]
        assert sorted(piece for row in rows for piece in row) == list(range(num_pieces))
        assert all(0 < filled[row].sum() <= length for row in rows)
        assert max(map(len, rows), default=0) <= plan.stats.max_pieces_per_row


def _targets(corpus: list[DrawnSession], pieces: PieceTable) -> list[tuple[int, int]]:
    """(session, offset) of every target that some piece trains, as often as one does."""
    found: list[tuple[int, int]] = []
    spans = pieces.spans_of(np.arange(len(pieces))).tolist()
    for number, (system_stop, start, target_start, stop) in zip(
        pieces.session.tolist(), spans, strict=True
    ):
        first = max(target_start, start + (system_stop == 0))
        turns = corpus[number].turn_of_token
        found += [(number, offset) for offset in range(first, stop) if turns[offset]]
    return sorted(found)


def _all_targets(corpus: list[DrawnSession]) -> list[tuple[int, int]]:
    return [
        (number, offset)
        for number, session in enumerate(corpus)
        for offset, turn in enumerate(session.turn_of_token)
        if turn
    ]
