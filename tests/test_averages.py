"""Each --loss-average against what it equals, on corpora that are cut and packed.

The oracle knows sessions and pieces only as text, and weights as exact fractions.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from drawn_sessions import (
    DrawnSession,
    Row,
    build_rows,
    draw,
    draw_random,
    plan_of,
    row_of_sessions,
)
from numpy.typing import NDArray

from megatron_multiturn.averages import fixed_point
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.modes import WEIGHT_SHIFT
from megatron_multiturn.packing import PackPlan
from megatron_multiturn.samples import LOSS_AVERAGES, RowFormat, largest_divisor_unit


@pytest.fixture(scope="module")
def corpus() -> list[DrawnSession]:
    rng = np.random.default_rng(5)
    return [draw_random(rng) for _ in range(400)]


def weights(row: Row) -> NDArray[np.float64]:
    """What each position's loss is multiplied by, before the divisor."""
    out = np.zeros(len(row["loss_mask"]))
    scored = row["loss_mask"] > 0
    out[scored] = 1 / row["loss_token_num"][scored].astype(np.float64)
    return out


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("session", [2 / 3, 1 / 6, 1 / 6]),
        ("prefix", [17 / 24, 5 / 24, 1 / 12]),
        ("turn", [2 / 4, 1 / 4, 1 / 4]),
    ],
)
def test_the_check_values(average: str, expected: list[float]) -> None:
    """Sessions {a} and {a, b, c} with answers of one token."""
    sessions = [draw("|uA"), draw("|uAuBuC")]
    row_format = RowFormat(
        sequence_length=8, max_pieces_per_row=2, pad_token=0, loss_average=average
    )
    row = row_of_sessions(
        sessions, np.array([[0, 0, 0, 2], [0, 0, 0, 6]], dtype=np.int32), row_format
    )
    w = weights(row) / row["turn_num"][0]
    a_alone, a, b, c = w[np.flatnonzero(w)]
    assert [a_alone + a, b, c] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("global_batch_size", "sequence_length", "unit"),
    [(8, 4096, 2**15), (1024, 4096, 256), (2**15, 2**15, 1), (2**7, 2**12, 2048), (1, 1, 2**16)],
)
def test_largest_divisor_unit(global_batch_size: int, sequence_length: int, unit: int) -> None:
    assert largest_divisor_unit("sqrt", global_batch_size, sequence_length) == unit
    assert unit * global_batch_size * sequence_length < 2**31
    assert unit == 2**16 or 2 * unit * global_batch_size * sequence_length >= 2**31


def test_units_of_the_averages() -> None:
    units = {average: largest_divisor_unit(average, 128, 4096) for average in LOSS_AVERAGES}
    fractions = {"session": 2048, "session-token": 2048, "sqrt": 2048, "prefix": 128}
    assert units == {"turn": 1, "token": 1} | fractions


@pytest.mark.parametrize("average", ["token", "prefix"])
def test_a_batch_too_large_for_the_divisor(average: str) -> None:
    with pytest.raises(ConfigError, match="make it smaller"):
        largest_divisor_unit(average, 2**16, 2**15)


@pytest.mark.parametrize(
    ("value", "unit", "count"),
    [(3.0, 1, 3), (3 * (1 - 1e-13), 16, 48), (0.0, 16, 0), (0.3, 16, 5), (1e-6, 16, 1)],
)
def test_fixed_point(value: float, unit: int, count: int) -> None:
    counted, factor = fixed_point(value, unit)
    assert counted == count
    assert value * unit * factor == pytest.approx(count, rel=1e-9)


def trained_offsets(session: DrawnSession, span: Sequence[int]) -> list[int]:
    _, start, target_start, stop = span
    return [i for i in range(max(start, target_start), stop) if session.turn_of_token[i]]


type Weights = dict[tuple[int, int], Fraction | float]  # (session, offset of the target) -> weight


def oracle(corpus: list[DrawnSession], plan: PackPlan, average: str) -> tuple[Weights, float]:
    """The weight of every target and the divisor, from what each average equals."""
    weights: Weights = {}
    divisor: float = 0
    for number, session in enumerate(corpus):
        whole = (0, 0, 0, len(session.drawing))
        parts = [turns_in(session, whole)]
        if average in ("turn", "sqrt"):  # every part of a turn that was cut is a turn of its own
            pieces = np.flatnonzero(plan.pieces.session == number)
            parts = [
                turns_in(session, plan.pieces.spans_of(np.array([piece]))[0].tolist())
                for piece in pieces
            ]
        for turns in parts:
            of_offset, count = ORACLES[average](turns)
            weights |= {(number, offset): weight for offset, weight in of_offset.items()}
            divisor += count
    return weights, divisor


def turns_in(session: DrawnSession, span: Sequence[int]) -> list[list[int]]:
    """The offsets of the targets that the piece trains, turn by turn."""
    turns: dict[str | None, list[int]] = defaultdict(list)
    for offset in trained_offsets(session, span):
        turns[session.turn_of_token[offset]].append(offset)
    return list(turns.values())


type Oracle = Callable[[list[list[int]]], tuple[dict[int, Fraction | float], float]]


def _turn(turns: list[list[int]]) -> tuple[dict[int, Fraction | float], float]:
    return {i: Fraction(1, len(turn)) for turn in turns for i in turn}, len(turns)


def _token(turns: list[list[int]]) -> tuple[dict[int, Fraction | float], float]:
    return {i: Fraction(1) for turn in turns for i in turn}, sum(map(len, turns))


def _session(turns: list[list[int]]) -> tuple[dict[int, Fraction | float], float]:
    return {i: Fraction(1, len(turn) * len(turns)) for turn in turns for i in turn}, bool(turns)


def _session_token(turns: list[list[int]]) -> tuple[dict[int, Fraction | float], float]:
    num_targets = sum(map(len, turns))
    return {i: Fraction(1, num_targets) for turn in turns for i in turn}, bool(turns)


def _prefix(turns: list[list[int]]) -> tuple[dict[int, Fraction | float], float]:
    """One sample for each prefix of the session, all of its answers scored alike."""
    weights: dict[int, Fraction | float] = defaultdict(Fraction)
    for last in range(1, len(turns) + 1):
        for turn in turns[:last]:
            for i in turn:
                weights[i] += Fraction(1, len(turn) * last)
    return weights, len(turns)


def _sqrt(turns: list[list[int]]) -> tuple[dict[int, Fraction | float], float]:
    weights: dict[int, Fraction | float] = {i: len(t) ** -0.5 for t in turns for i in t}
    return weights, sum(len(turn) ** 0.5 for turn in turns)


ORACLES: dict[str, Oracle] = {
    "turn": _turn,
    "token": _token,
    "session": _session,
    "session-token": _session_token,
    "prefix": _prefix,
    "sqrt": _sqrt,
}


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("average", LOSS_AVERAGES)
def test_each_average_is_what_it_equals(
    corpus: list[DrawnSession], average: str, multiple: int
) -> None:
    plan = plan_of(corpus, 16, multiple)
    unit = 1 if average in ("turn", "token") else 2**24
    row_format = RowFormat(
        sequence_length=16,
        max_pieces_per_row=plan.stats.max_pieces_per_row,
        piece_multiple=multiple,
        pad_token=0,
        loss_average=average,
        divisor_unit=unit,
    )
    expected, expected_divisor = oracle(corpus, plan, average)
    rows = build_rows(corpus, plan, row_format)
    got: dict[tuple[int, int], float] = {}
    for row, pieces in zip(rows, map(plan.pieces_of_row, range(plan.num_rows)), strict=True):
        row_weights = weights(row) / unit
        for piece, row_begin in zip(pieces.tolist(), row["cu_seqlens"].tolist(), strict=False):
            session = int(plan.pieces.session[piece])
            system_stop, start, *_ = span = plan.pieces.spans_of(np.array([piece]))[0].tolist()
            for offset in trained_offsets(corpus[session], span):
                position = row_begin + system_stop + offset - start - 1
                assert (session, offset) not in got
                assert row["labels"][position] == corpus[session].tokens[offset]
                got[session, offset] = row_weights[position]
                row_weights[position] = 0
        assert not row_weights.any()  # nothing else is scored
    assert got.keys() == expected.keys()
    assert len(got) > 2000
    np.testing.assert_allclose(
        [got[target] for target in expected], [float(w) for w in expected.values()], rtol=2e-6
    )
    divisor = sum(int(row["turn_num"][0]) for row in rows)
    rounding = 0 if unit == 1 else len(rows) / 2
    assert divisor == pytest.approx(expected_divisor * unit, abs=rounding)


WEIGHTS = (1.0, 0.3, 2.0, 0.001)


def weighted(session: DrawnSession) -> DrawnSession:
    """Turn A weighs 1, B 0.3, C 2, D 0.001, E 1, ..."""
    modes = session.modes.copy()
    begin = 0
    for index, length in enumerate(session.segment_lengths.tolist()):
        letter = session.drawing[begin]
        if letter.isupper():
            modes[index] |= (ord(letter) - ord("A")) % len(WEIGHTS) << WEIGHT_SHIFT
        begin += length
    return replace(session, modes=modes)


@pytest.mark.parametrize("average", LOSS_AVERAGES)
def test_weights_of_turns_are_in_numerator_and_divisor(
    corpus: list[DrawnSession], average: str
) -> None:
    plan = plan_of(corpus, 16, 1)
    unit = largest_divisor_unit(average, 1, 16, WEIGHTS)
    assert unit > 1
    row_format = RowFormat(
        sequence_length=16,
        max_pieces_per_row=plan.stats.max_pieces_per_row,
        pad_token=0,
        loss_average=average,
        divisor_unit=unit,
    )
    plain = build_rows(corpus, plan, row_format)
    row_format = replace(row_format, turn_weights=WEIGHTS)
    rows = build_rows([weighted(session) for session in corpus], plan, row_format)
    for row, before, pieces in zip(
        rows, plain, map(plan.pieces_of_row, range(plan.num_rows)), strict=True
    ):
        expected = np.zeros(16)
        for piece, row_begin in zip(pieces.tolist(), row["cu_seqlens"].tolist(), strict=False):
            session = corpus[int(plan.pieces.session[piece])]
            system_stop, start, *_ = span = plan.pieces.spans_of(np.array([piece]))[0].tolist()
            for offset in trained_offsets(session, span):
                number = (ord(session.turn_of_token[offset] or "") - ord("A")) % len(WEIGHTS)
                expected[row_begin + system_stop + offset - start - 1] = WEIGHTS[number]
        expected *= weights(before) / unit
        divisor = int(row["turn_num"][0]) / unit
        np.testing.assert_allclose(weights(row).sum() / unit, divisor, rtol=1e-6)
        # Both rows are rounded to the unit, which is more of a row of nothing but light turns.
        assert divisor == pytest.approx(expected.sum(), abs=2 / unit)
        counts = [max(1, int(one["turn_num"][0])) for one in (row, before)]
        rounding = sum(1 / count for count in counts)
        np.testing.assert_allclose(weights(row) / unit, expected, rtol=2e-6 + rounding)


def test_units_of_weights() -> None:
    assert largest_divisor_unit("turn", 8, 4096, (1.0, 3.0)) == 1
    assert largest_divisor_unit("turn", 8, 4096, (1.0, 0.5)) == 2**15
    assert largest_divisor_unit("turn", 8, 4096, (1.0, 2.5)) == 2**14
    with pytest.raises(ConfigError, match="make it smaller"):
        largest_divisor_unit("turn", 2**12, 2**12, (1.0, 1000.0))


@pytest.mark.parametrize("average", LOSS_AVERAGES)
def test_the_weights_of_every_row_add_up_to_what_it_counts(
    corpus: list[DrawnSession], average: str
) -> None:
    """So any batch of rows has a mean, also one of the later pieces of cut sessions alone."""
    plan = plan_of(corpus, 16, 1)
    row_format = RowFormat(
        sequence_length=16,
        max_pieces_per_row=16,
        pad_token=0,
        loss_average=average,
        divisor_unit=1 if average in ("turn", "token") else 64,
    )
    rows = build_rows(corpus, plan, row_format)
    assert np.unique(plan.pieces.session, return_counts=True)[1].max() > 2
    for row in rows:
        assert weights(row).sum() == pytest.approx(int(row["turn_num"][0]), rel=1e-6)
