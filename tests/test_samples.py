"""Row arrays, against the definitions spelled out token by token."""

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from drawn_sessions import DrawnSession, draw, draw_random, segment_index, session_lengths
from numpy.typing import NDArray

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.packing import PackPlan, pack
from megatron_multiturn.samples import (
    LOSS_AVERAGES,
    RowFormat,
    build_row,
    row_turns,
    sqrt_divisor_unit,
)
from megatron_multiturn.windows import cut_sessions

Row = dict[str, NDArray[Any]]


def whole(*sessions: DrawnSession) -> NDArray[np.int32]:
    return np.array([[0, 0, 0, len(session.tokens)] for session in sessions], dtype=np.int32)


def row_of(*drawings: str, length: int, **options: Any) -> Row:
    """A row of whole sessions."""
    sessions = [draw(drawing) for drawing in drawings]
    row_format = RowFormat(
        **{"sequence_length": length, "max_pieces_per_row": 4, "pad_token": 0} | options
    )
    return build_row(sessions, whole(*sessions), row_format)


def test_the_worked_example() -> None:
    # labels                     . . A A A . B B . . C C C . .
    row = row_of("|" + "u" + "uuAAA" + "u" + "BB" + "uu" + "CCC" + "uu", length=15)
    assert row["loss_token_num"].tolist() == [0, 0, 3, 3, 3, 0, 2, 2, 0, 0, 3, 3, 3, 0, 0]
    assert row["loss_mask"].tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert row["turn_num"].tolist() == [3]
    assert row["labels"].tolist() == list(range(101, 116))
    assert row["tokens"].tolist() == list(range(100, 115))


def test_the_sample_contract() -> None:
    row = row_of("|uuAA", "|uA", length=8, pad_token=7)
    dtypes = {name: (array.dtype.name, array.shape) for name, array in row.items()}
    assert dtypes == {
        "tokens": ("int64", (8,)),
        "labels": ("int64", (8,)),
        "loss_mask": ("float32", (8,)),
        "loss_token_num": ("float32", (8,)),
        "turn_num": ("int64", (1,)),
        "position_ids": ("int64", (8,)),
        "cu_seqlens": ("int32", (6,)),
        "max_seqlen": ("int32", (1,)),
    }
    assert row["tokens"].tolist() == [100, 101, 102, 100, 7, 7, 7, 7]
    assert row["labels"].tolist() == [101, 102, 103, 101, 7, 7, 7, 7]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 8, 8, 8]
    assert row["max_seqlen"].tolist() == [4]


def test_pieces_are_rounded_up_inside_the_row() -> None:
    row = row_of("|uuAA", "|uA", length=12, pad_token=7, piece_multiple=4)
    assert row["tokens"].tolist() == [100, 101, 102, 7, 100, 7, 7, 7, 7, 7, 7, 7]
    assert row["labels"].tolist() == [101, 102, 103, 7, 101, 7, 7, 7, 7, 7, 7, 7]
    assert row["position_ids"].tolist() == [0, 1, 2, 3] * 3
    assert row["cu_seqlens"].tolist() == [0, 4, 8, 12, 12, 12]
    assert row["loss_token_num"].tolist() == [0, 2, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_full_row_has_no_padding_piece() -> None:
    row = row_of("|uuAA", "|uA", length=4)
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 4, 4, 4]


def test_a_session_that_opens_with_a_target_loses_its_first_token() -> None:
    row = row_of("AAA|uBB", length=6)
    assert row["loss_token_num"].tolist() == [2, 2, 0, 2, 2, 0]
    assert row["turn_num"].tolist() == [2]


@pytest.mark.parametrize("average", LOSS_AVERAGES)
def test_a_turn_without_a_target_does_not_count(average: str) -> None:
    with_it = row_of("A|uBB|uCC", length=8, loss_average=average)
    without = row_of("u|uBB|uCC", length=8, loss_average=average)
    for name in ("loss_mask", "loss_token_num", "turn_num"):
        np.testing.assert_array_equal(with_it[name], without[name])


def test_adjacent_turns_are_two() -> None:
    row = row_of("|uAABBB", length=6)
    assert row["loss_token_num"].tolist() == [2, 2, 3, 3, 3, 0]
    assert row["turn_num"].tolist() == [2]


def test_a_masked_gap_is_inside_one_turn() -> None:
    row = row_of("|uAA..BB".replace("B", "A"), length=8)
    assert row["loss_token_num"].tolist() == [4, 4, 0, 0, 4, 4, 0, 0]
    assert row["turn_num"].tolist() == [1]


@pytest.mark.parametrize("average", LOSS_AVERAGES)
def test_a_row_without_a_target(average: str) -> None:
    row = row_of("|uuuu", "|uu", length=6, loss_average=average)
    assert not row["loss_mask"].any()
    assert not row["loss_token_num"].any()
    assert row["turn_num"].tolist() == [0]
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 6, 6, 6]


def test_nothing_is_inferred_from_ids() -> None:
    """Padding with an id that is also a target's (pad == eos) changes nothing else."""
    rows = [row_of("|uuAA", "|uA", length=8, pad_token=pad) for pad in (0, 101, 103)]
    for row in rows[1:]:
        for name in set(row) - {"tokens", "labels"}:
            np.testing.assert_array_equal(row[name], rows[0][name])
        np.testing.assert_array_equal(row["labels"][:4], rows[0]["labels"][:4])


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
    row = row_of("|uA", "|uAuBuC", length=8, loss_average=average)
    w = weights(row) / row["turn_num"][0]
    a_alone, a, b, c = w[np.flatnonzero(w)]
    assert [a_alone + a, b, c] == pytest.approx(expected, rel=1e-6)


def test_turns_for_inspection() -> None:
    sessions = [draw("|uA"), draw("|uAAuBuC")]
    row_format = RowFormat(sequence_length=9, max_pieces_per_row=2, pad_token=0)
    turns = row_turns(sessions, np.array([[0, 0, 0, 2], [0, 1, 3, 6]], dtype=np.int32), row_format)
    assert turns.piece.tolist() == [0, 1, 1, 1]
    assert turns.turn_in_session.tolist() == [0, 0, 1, 2]
    assert turns.num_targets.tolist() == [1, 0, 1, 0]
    assert (turns.run_turn.tolist(), turns.run_begin.tolist()) == ([0, 2], [0, 3])


def test_truncated_sessions_can_count_what_is_trained() -> None:
    session = draw("|uAA|uBB|uCC")
    spans = np.array([[0, 0, 0, 6]], dtype=np.int32)
    row_format = RowFormat(
        sequence_length=6, max_pieces_per_row=1, pad_token=0, loss_average="session"
    )
    assert build_row([session], spans, row_format)["loss_token_num"].max() == 2 * 3
    kept_only = replace(row_format, sessions_end_with_piece=True)
    assert build_row([session], spans, kept_only)["loss_token_num"].max() == 2 * 2


@pytest.mark.parametrize(
    ("global_batch_size", "sequence_length", "unit"),
    [(8, 4096, 4096), (1024, 4096, 256), (2**15, 2**15, 1), (2**7, 2**12, 2048), (1, 1, 4096)],
)
def test_sqrt_divisor_unit(global_batch_size: int, sequence_length: int, unit: int) -> None:
    assert sqrt_divisor_unit(global_batch_size, sequence_length) == unit
    assert unit * global_batch_size * sequence_length < 2**31
    assert unit == 4096 or 2 * unit * global_batch_size * sequence_length >= 2**31


def test_a_batch_too_large_for_the_divisor() -> None:
    with pytest.raises(ConfigError, match="make it smaller"):
        sqrt_divisor_unit(2**16, 2**15)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_average": "turns"}, "--loss-average is 'turns'.*turn, token"),
        ({"piece_multiple": 5}, "--seq-length 8 is no multiple of 5"),
        ({"divisor_unit": 3}, "not a power of two"),
    ],
)
def test_a_bad_row_format(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RowFormat(**{"sequence_length": 8, "max_pieces_per_row": 1, "pad_token": 0} | options)


# Random corpora, cut and packed, against an oracle that knows sessions and pieces only as text.


@pytest.fixture(scope="module")
def corpus() -> list[DrawnSession]:
    rng = np.random.default_rng(5)
    return [draw_random(rng) for _ in range(400)]


def plan_of(corpus: list[DrawnSession], length: int, multiple: int) -> PackPlan:
    pieces, report = cut_sessions(
        session_lengths(corpus),
        sequence_length=length,
        long_session="window",
        segment_index=segment_index(corpus),
    )
    assert report.num_sessions_cut > 50
    assert report.num_turns_cut > 10
    return pack(pieces, sequence_length=length, piece_multiple=multiple, seed=0)


def rows_of(corpus: list[DrawnSession], plan: PackPlan, row_format: RowFormat) -> list[Row]:
    return [
        build_row(
            [corpus[session] for session in plan.pieces.session[pieces]],
            plan.pieces.spans[pieces],
            row_format,
        )
        for pieces in map(plan.pieces_of_row, range(plan.num_rows))
    ]


def trained_offsets(session: DrawnSession, span: list[int]) -> list[int]:
    _, start, target_start, stop = span
    return [i for i in range(max(start, target_start), stop) if session.turn_of_token[i]]


def oracle_weights(
    corpus: list[DrawnSession], plan: PackPlan, average: str
) -> tuple[dict[tuple[int, int], Fraction | float], float]:
    """((session, offset) -> weight of that target, divisor), from what each average equals."""
    pieces: dict[int, list[list[int]]] = defaultdict(list)
    for session, span in zip(plan.pieces.session.tolist(), plan.pieces.spans.tolist(), strict=True):
        pieces[session].append(span)
    out: dict[tuple[int, int], Fraction | float] = defaultdict(Fraction)
    divisor: float = 0
    for number, session in enumerate(corpus):
        targets = [i for i, turn in enumerate(session.turn_of_token) if turn]
        by_turn: dict[str, list[int]] = defaultdict(list)
        for i in targets:
            by_turn[str(session.turn_of_token[i])].append(i)
        if average in ("turn", "sqrt"):  # every part of a turn that was cut is a turn of its own
            for span in pieces[number]:
                parts: dict[str, list[int]] = defaultdict(list)
                for i in trained_offsets(session, span):
                    parts[str(session.turn_of_token[i])].append(i)
                for part in parts.values():
                    share = Fraction(1, len(part)) if average == "turn" else len(part) ** -0.5
                    out.update({(number, i): share for i in part})
                    divisor += 1 if average == "turn" else len(part) ** 0.5
            continue
        if average == "token":
            out.update({(number, i): Fraction(1) for i in targets})
            divisor += len(targets)
        elif average == "session-token":
            out.update({(number, i): Fraction(1, len(targets)) for i in targets})
            divisor += bool(targets)
        elif average == "session":
            for turn in by_turn.values():
                out.update({(number, i): Fraction(1, len(turn) * len(by_turn)) for i in turn})
            divisor += bool(targets)
        elif average == "prefix":  # one sample for each prefix, all of its answers scored alike
            for last in range(1, len(by_turn) + 1):
                for turn in list(by_turn.values())[:last]:
                    for i in turn:
                        out[number, i] += Fraction(1, len(turn) * last)
            divisor += len(by_turn)
    return out, divisor


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("average", LOSS_AVERAGES)
def test_each_average_is_what_it_equals(
    corpus: list[DrawnSession], average: str, multiple: int
) -> None:
    plan = plan_of(corpus, 16, multiple)
    unit = 4096 if average == "sqrt" else 1
    row_format = RowFormat(
        sequence_length=16,
        max_pieces_per_row=plan.stats.max_pieces_per_row,
        piece_multiple=multiple,
        pad_token=0,
        loss_average=average,
        divisor_unit=unit,
    )
    expected, expected_divisor = oracle_weights(corpus, plan, average)
    rows = rows_of(corpus, plan, row_format)
    got: dict[tuple[int, int], float] = {}
    for row, pieces in zip(rows, map(plan.pieces_of_row, range(plan.num_rows)), strict=True):
        row_weights = weights(row) / unit
        for piece, row_begin in zip(pieces.tolist(), row["cu_seqlens"].tolist(), strict=False):
            session = int(plan.pieces.session[piece])
            system_stop, start, *_ = span = plan.pieces.spans[piece].tolist()
            for offset in trained_offsets(corpus[session], span):
                position = row_begin + system_stop + offset - start - 1
                assert (session, offset) not in got
                assert row["labels"][position] == corpus[session].tokens[offset]
                got[session, offset] = row_weights[position]
                row_weights[position] = 0
        assert not row_weights.any()  # nothing else is scored
    assert got.keys() == expected.keys()
    assert len(got) > 2000
    for target, weight in expected.items():
        assert got[target] == pytest.approx(float(weight), rel=1e-6)
    divisor = sum(int(row["turn_num"][0]) for row in rows)
    rounding = len(rows) / 2 if average == "sqrt" else 0
    assert divisor == pytest.approx(expected_divisor * unit, abs=rounding)


@pytest.mark.parametrize("average", ["session", "session-token", "prefix"])
def test_a_cut_session_weighs_as_much_as_a_whole_one(
    corpus: list[DrawnSession], average: str
) -> None:
    """The sum of weights equals the divisor, cut or not, even when turns are cut inside."""
    plan = plan_of(corpus, 16, 1)
    row_format = RowFormat(
        sequence_length=16, max_pieces_per_row=16, pad_token=0, loss_average=average
    )
    rows = rows_of(corpus, plan, row_format)
    total = sum(weights(row).sum() for row in rows)
    assert total == pytest.approx(sum(int(row["turn_num"][0]) for row in rows), rel=1e-6)


@pytest.mark.parametrize("multiple", [1, 8])
def test_rows_token_by_token(corpus: list[DrawnSession], multiple: int) -> None:
    length, pad = 16, 9
    plan = plan_of(corpus, length, multiple)
    row_format = RowFormat(
        sequence_length=length,
        max_pieces_per_row=plan.stats.max_pieces_per_row,
        piece_multiple=multiple,
        pad_token=pad,
    )
    rows = rows_of(corpus, plan, row_format)
    for row, pieces in zip(rows, map(plan.pieces_of_row, range(plan.num_rows)), strict=True):
        tokens: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        boundaries = [0]
        for piece in pieces.tolist():
            session = corpus[int(plan.pieces.session[piece])]
            system_stop, start, _, stop = plan.pieces.spans[piece].tolist()
            shown = [*session.tokens[:system_stop].tolist(), *session.tokens[start:stop].tolist()]
            filler = [pad] * (-(len(shown) - 1) % multiple)
            tokens += shown[:-1] + filler
            labels += shown[1:] + filler
            positions += range(len(shown) - 1 + len(filler))
            boundaries.append(len(tokens))
        missing = length - len(tokens)
        assert row["tokens"].tolist() == tokens + [pad] * missing
        assert row["labels"].tolist() == labels + [pad] * missing
        assert row["position_ids"].tolist() == positions + list(range(missing))
        longest = max(b - a for a, b in zip(boundaries, [*boundaries[1:], length], strict=True))
        boundaries += [length] * (row_format.max_pieces_per_row + 2 - len(boundaries))
        assert row["cu_seqlens"].tolist() == boundaries
        assert row["max_seqlen"].tolist() == [longest]
        assert set(row["loss_mask"].tolist()) <= {0.0, 1.0}
        np.testing.assert_array_equal(row["loss_mask"] > 0, row["loss_token_num"] > 0)


def test_two_pieces_of_a_session_can_share_a_row() -> None:
    session = draw("|uAA|uBB")
    spans = np.array([[0, 0, 0, 3], [0, 3, 4, 6]], dtype=np.int32)
    row_format = RowFormat(
        sequence_length=4, max_pieces_per_row=2, pad_token=0, loss_average="session"
    )
    row = build_row([session, session], spans, row_format)
    assert row["loss_token_num"].tolist() == [4, 4, 4, 4]
    assert row["turn_num"].tolist() == [1]
