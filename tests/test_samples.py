"""Row arrays, against the definitions spelled out token by token."""

from dataclasses import replace
from typing import Any

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

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.row_pieces import join_sessions
from megatron_multiturn.samples import LOSS_AVERAGES, RowFormat, row_turns


def whole(*sessions: DrawnSession) -> NDArray[np.int32]:
    return np.array([[0, 0, 0, len(session.tokens)] for session in sessions], dtype=np.int32)


def row_of(*drawings: str, length: int, **options: Any) -> Row:
    """A row of whole sessions."""
    sessions = [draw(drawing) for drawing in drawings]
    row_format = RowFormat(
        **{"sequence_length": length, "max_pieces_per_row": 4, "pad_token": 0} | options
    )
    return row_of_sessions(sessions, whole(*sessions), row_format)


def test_the_worked_example() -> None:
    # labels                     . . A A A . B B . . C C C . .
    row = row_of("|" + "u" + "uuAAA" + "u" + "BB" + "uu" + "CCC" + "uu", length=15)
    assert row["loss_token_num"].tolist() == [0, 0, 3, 3, 3, 0, 2, 2, 0, 0, 3, 3, 3, 0, 0]
    assert row["loss_mask"].tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert row["turn_num"].tolist() == [3]
    assert row["turn_index"].tolist() == [0, 0, 1, 1, 1, 0, 2, 2, 0, 0, 3, 3, 3, 0, 0]
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
        "turn_index": ("int64", (8,)),
        "turn_token_num": ("float32", (8,)),
        "position_ids": ("int64", (8,)),
        "padding_mask": ("bool", (8,)),
        "cu_seqlens": ("int32", (6,)),
        "max_seqlen": ("int32", (1,)),
    }
    assert row["tokens"].tolist() == [100, 101, 102, 100, 7, 7, 7, 7]
    assert row["labels"].tolist() == [101, 102, 103, 101, 7, 7, 7, 7]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 8, 8, 8]
    assert row["max_seqlen"].tolist() == [4]
    assert row["padding_mask"].tolist() == [False] * 4 + [True] * 4


def test_pieces_are_rounded_up_inside_the_row() -> None:
    row = row_of("|uuAA", "|uA", length=12, pad_token=7, piece_multiple=4)
    assert row["tokens"].tolist() == [100, 101, 102, 7, 100, 7, 7, 7, 7, 7, 7, 7]
    assert row["labels"].tolist() == [101, 102, 103, 7, 101, 7, 7, 7, 7, 7, 7, 7]
    assert row["position_ids"].tolist() == [0, 1, 2, 3] * 3
    assert row["cu_seqlens"].tolist() == [0, 4, 8, 12, 12, 12]
    assert row["loss_token_num"].tolist() == [0, 2, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(~row["padding_mask"]).tolist() == [0, 1, 2, 4]


def test_a_full_row_has_no_padding_piece() -> None:
    row = row_of("|uuAA", "|uA", length=4)
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 4, 4, 4]


def test_a_session_that_opens_with_a_target_loses_its_first_token() -> None:
    row = row_of("AAA|uBB", length=6)
    assert row["loss_token_num"].tolist() == [2, 2, 0, 2, 2, 0]
    assert row["turn_num"].tolist() == [2]


def test_a_target_that_opens_a_later_piece_is_predicted_by_nothing() -> None:
    row_format = RowFormat(sequence_length=4, max_pieces_per_row=1, pad_token=0)
    row = row_of_sessions([draw("|uAAA")], np.array([[0, 1, 1, 4]], dtype=np.int32), row_format)
    assert row["loss_token_num"].tolist() == [2, 2, 0, 0]


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
def test_turns_are_told_apart_under_every_average(average: str) -> None:
    """A later window knows the place of its turns in the session, and how long they are."""
    sessions = [draw("|uAA"), draw("|uAA|uBBB|uC")]
    spans = np.array([[0, 0, 0, 3], [0, 3, 3, 9]], dtype=np.int32)
    row_format = RowFormat(
        sequence_length=8, max_pieces_per_row=2, pad_token=0, loss_average=average
    )
    row = row_of_sessions(sessions, spans, row_format)
    assert row["turn_index"].tolist() == [1, 1, 2, 2, 2, 0, 3, 0]
    assert row["turn_token_num"].tolist() == [2, 2, 3, 3, 3, 0, 1, 0]


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


def test_turns_for_inspection() -> None:
    sessions = [draw("|uA"), draw("|uAAuBuC")]
    row_format = RowFormat(sequence_length=9, max_pieces_per_row=2, pad_token=0)
    spans = np.array([[0, 0, 0, 2], [0, 1, 3, 6]], dtype=np.int32)
    turns = row_turns(join_sessions(sessions, spans), spans, row_format)
    assert turns.piece.tolist() == [0, 1, 1, 1]
    assert turns.turn_in_session.tolist() == [0, 0, 1, 2]
    assert turns.num_targets.tolist() == [1, 0, 1, 0]
    assert (turns.run_turn.tolist(), turns.run_begin.tolist()) == ([0, 2], [0, 3])


def test_truncated_sessions_can_count_what_is_trained() -> None:
    session = draw("|uAA|uBB|uCC")
    spans = np.array([[0, 0, 0, 6]], dtype=np.int32)
    unit = 2**20
    row_format = RowFormat(
        sequence_length=6,
        max_pieces_per_row=1,
        pad_token=0,
        loss_average="session",
        divisor_unit=unit,
    )
    row = row_of_sessions([session], spans, row_format)
    assert row["loss_token_num"].max() * unit == pytest.approx(2 * 3, rel=1e-5)
    assert row["turn_num"][0] == round(unit * 2 / 3)
    kept_only = row_of_sessions([session], spans, replace(row_format, sessions_end_with_piece=True))
    assert kept_only["loss_token_num"].max() * unit == 2 * 2
    assert kept_only["turn_num"][0] == unit


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


@pytest.mark.parametrize("multiple", [1, 8])
def test_rows_token_by_token(multiple: int) -> None:
    rng = np.random.default_rng(6)
    corpus = [draw_random(rng) for _ in range(400)]
    length, pad = 16, 9
    plan = plan_of(corpus, length, multiple)
    row_format = RowFormat(
        sequence_length=length,
        max_pieces_per_row=plan.stats.max_pieces_per_row,
        piece_multiple=multiple,
        pad_token=pad,
    )
    rows = build_rows(corpus, plan, row_format)
    for row, pieces in zip(rows, map(plan.pieces_of_row, range(plan.num_rows)), strict=True):
        tokens: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        boundaries = [0]
        for piece in pieces.tolist():
            session = corpus[int(plan.pieces.session[piece])]
            system_stop, start, _, stop = plan.pieces.spans_of(np.array([piece]))[0].tolist()
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
    row = row_of_sessions([session, session], spans, row_format)
    assert row["loss_token_num"].tolist() == [4, 4, 4, 4]
    assert row["turn_num"].tolist() == [1]
