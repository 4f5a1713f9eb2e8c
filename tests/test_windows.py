"""How long sessions are cut into pieces."""

from typing import Any

import numpy as np
import pytest
from drawn_sessions import DrawnSession, draw, draw_random, segment_index, session_lengths

from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.windows import CutReport, PieceTable, cut_sessions


def cut(
    sessions: list[DrawnSession], window: int, long_session: str = "window", **options: Any
) -> tuple[PieceTable, CutReport]:
    return cut_sessions(
        session_lengths(sessions),
        sequence_length=window,
        long_session=long_session,
        segment_index=segment_index(sessions),
        **options,
    )


def all_spans(pieces: PieceTable) -> list[list[int]]:
    spans: list[list[int]] = pieces.spans_of(np.arange(len(pieces))).tolist()
    return spans


def pieces_as_text(session: DrawnSession, pieces: PieceTable) -> list[str]:
    """The pieces; targets that the piece must not train are shown in lower case."""
    texts = []
    for system_stop, start, target_start, stop in all_spans(pieces):
        replayed = session.drawing[start:target_start].lower()
        texts.append(
            session.drawing[:system_stop]
            + replayed
            + session.drawing[max(start, target_start) : stop]
        )
    return texts


def cut_text(drawing: str, window: int, **options: Any) -> list[str]:
    session = draw(drawing)
    return pieces_as_text(session, cut([session], window, **options)[0])


class TestWindow:
    def test_a_session_that_just_fits_is_one_piece(self) -> None:
        assert cut_text("|uuAA|uuBB", window=7) == ["uuAAuuBB"]

    def test_one_token_more_is_cut_between_turns(self) -> None:
        assert cut_text("|uuAA|uuBBB", window=7, window_context=0) == ["uuAA", "uuBBB"]

    def test_later_pieces_open_with_the_system_message_and_whole_messages(self) -> None:
        pieces = cut_text("|ss|aA|bB|cC|dD", window=7, window_context=2)
        assert pieces == ["ssaAbBcC", "sscCdD".replace("cC", "cc")]

    def test_as_many_new_turns_as_fit(self) -> None:
        pieces = cut_text("|xA|xB|xC|xD|xE|xF|xG", window=7, window_context=2)
        assert pieces == ["xAxBxCxD", "xdxExFxG"]

    def test_replay_never_exceeds_the_window_context(self) -> None:
        # Both earlier exchanges would fit beside the last turn; the budget holds one, of 3.
        assert cut_text("|uuA|uuB|uuuC", window=8, window_context=3) == ["uuAuuB", "uubuuuC"]
        assert cut_text("|uuA|uuB|uuuC", window=8, window_context=2) == ["uuAuuB", "uuuC"]

    def test_the_context_is_a_quarter_of_the_window_unless_said_otherwise(self) -> None:
        assert cut_text("|uA|uB|uuuuuC", window=8) == ["uAuB", "ubuuuuuC"]

    def test_whole_system_and_start_again_is_one_plain_run(self) -> None:
        session = draw("|ss|uA|uuuuuB")
        pieces, _ = cut([session], 8, window_context=4)
        assert all_spans(pieces) == [[0, 0, 0, 4], [2, 4, 9, 10]]
        session = draw("|ss|uA|uuuuB|vvvvvC")
        pieces, report = cut([session], 9, window_context=2)
        assert pieces_as_text(session, pieces) == ["ssuAuuuuB", "ssvvvvvC"]
        assert report.num_tokens_replayed == 2

    def test_adjacent_turns_are_predicted_from_the_token_before(self) -> None:
        assert cut_text("|uuuAAABBB", window=5, window_context=0) == ["uuuAAA", "aBBB"]

    def test_a_masked_gap_is_inside_its_turn(self) -> None:
        assert cut_text("|uuA|vvB.B", window=6, window_context=0) == ["uuA", "vvB.B"]

    def test_trailing_context_gets_no_piece(self) -> None:
        session = draw("|uuAA|uuuuuuuuuu")
        pieces, report = cut([session], 7)
        assert pieces_as_text(session, pieces) == ["uuAA"]
        assert report.num_context_tokens_lost == 10

    def test_a_prompt_that_does_not_fit_is_cut_at_a_message(self) -> None:
        assert cut_text("|uuuuuuuuu|vvvAAA", window=7) == ["vvvAAA"]

    def test_or_inside_one_rather_than_lose_most_of_it(self) -> None:
        session = draw("|uuuuuuuuu|hAAA")
        pieces, report = cut([session], 7)
        assert pieces_as_text(session, pieces) == ["uuuhAAA".rjust(8, "u")]
        assert report.num_pieces_opened_inside_message == 1
        assert report.num_context_tokens_lost == 5

    def test_a_turn_that_alone_does_not_fit_is_cut_inside(self) -> None:
        session = draw("|uuA|vv" + "B" * 14 + "|wC")
        pieces, report = cut([session], 7, window_context=2)
        texts = pieces_as_text(session, pieces)
        assert texts == ["uuA", "vvBBBBBB", "bbBBBBBB", "bbBBwC"]
        assert report.num_turns_cut == 1
        assert report.num_pieces_opened_inside_message == 2

    def test_a_system_message_too_long_to_repeat_is_left_out_of_later_pieces(self) -> None:
        session = draw("|sssss|uA|uuuBBB")
        pieces, report = cut([session], 7)
        assert pieces_as_text(session, pieces) == ["sssssuA", "uuuBBB"]
        assert report.num_pieces_without_system == 1

    def test_a_system_message_longer_than_the_window(self) -> None:
        session = draw("|ssssssssssss|uA")
        pieces, report = cut([session], 7)
        assert pieces_as_text(session, pieces) == ["ssssssuA"]  # cut at the front
        assert report.num_context_tokens_lost == 6

    def test_plain_text_is_cut_every_window_with_replay(self) -> None:
        assert cut_text("A" * 12, window=4, window_context=1) == ["AAAAA", "aAAAA", "aAAA"]

    def test_a_session_without_target_is_dropped(self) -> None:
        pieces, report = cut([draw("|uuuuuuuuuu")], 4)
        assert len(pieces) == 0
        assert report.num_sessions_dropped == 1

    def test_shorter_windows_than_a_row(self) -> None:
        session = draw("|uuAA|uuBB")
        pieces, report = cut([session], 100, session_window=4, window_context=0)
        assert pieces_as_text(session, pieces) == ["uuAA", "uuBB"]
        assert report.num_long_sessions == 1


class TestOtherPolicies:
    def test_truncate_keeps_whole_turns(self) -> None:
        session = draw("|uuAA|uuB|uuuCC")
        pieces, report = cut([session], 8, "truncate")
        assert pieces_as_text(session, pieces) == ["uuAAuuB"]
        assert report.num_targets_lost == 2
        assert report.num_context_tokens_lost == 3

    def test_truncate_cuts_a_first_turn_that_alone_does_not_fit(self) -> None:
        session = draw("|uu" + "A" * 9)
        pieces, report = cut([session], 7, "truncate")
        assert pieces_as_text(session, pieces) == ["uuAAAAAA"]
        assert (report.num_turns_cut, report.num_targets_lost) == (1, 3)

    def test_truncate_drops_a_session_whose_prompt_leaves_no_room(self) -> None:
        pieces, report = cut([draw("|uuuuuuAAAA")], 7, "truncate")
        assert len(pieces) == 0
        assert (report.num_sessions_dropped, report.num_targets_lost) == (1, 4)

    def test_drop(self) -> None:
        sessions = [draw("|uA"), draw("|uuuuAAAA|uBB"), draw("|uuB")]
        pieces, report = cut(sessions, 4, "drop")
        assert pieces.session.tolist() == [0, 2]
        assert all_spans(pieces) == [[0, 0, 0, 2], [0, 0, 0, 3]]
        assert (report.num_sessions_dropped, report.num_targets_lost) == (1, 6)

    def test_error_names_session_length_and_remedy(self) -> None:
        with pytest.raises(DatasetError, match=r"session 1 has 9 tokens.* 5.*--seq-length"):
            cut([draw("|uA"), draw("|uuuuAAAA|u")], 4, "error")

    def test_error_passes_when_all_fit(self) -> None:
        pieces, _ = cut([draw("|uA"), draw("|uuuA")], 4, "error")
        assert len(pieces) == 2

    def test_unknown_policy(self) -> None:
        with pytest.raises(ConfigError, match=r"'split'.*window, truncate, drop, error"):
            cut([draw("|uA")], 4, "split")

    @pytest.mark.parametrize("session_window", [0, 5])
    def test_window_outside_a_row(self, session_window: int) -> None:
        with pytest.raises(ConfigError, match="--session-window"):
            cut([draw("|uA")], 4, session_window=session_window)

    @pytest.mark.parametrize("context", [-1, 4, 5])
    def test_window_context_must_leave_room(self, context: int) -> None:
        with pytest.raises(ConfigError, match="--window-context"):
            cut([draw("|uA")], 4, window_context=context)


def test_sessions_of_fewer_than_two_tokens_have_no_piece() -> None:
    sessions = [draw("A"), draw("|uA"), draw("u")]
    pieces, report = cut(sessions, 4)
    assert pieces.session.tolist() == [1]
    assert report.num_sessions_too_short == 2


def test_whole_sessions_come_first_each_in_the_order_of_their_sessions() -> None:
    sessions = [draw("|uA"), draw("|uuA|uuB|uuC"), draw("A"), draw("|uC"), draw("|uuuuuuuuA|uuB")]
    pieces, report = cut(sessions, 3, window_context=0)
    assert pieces.session.tolist() == [0, 3, 1, 1, 1, 4, 4]
    assert pieces.num_positions().tolist() == [1, 1, 2, 2, 2, 3, 2]
    assert report.num_pieces_made == 5
    assert report.num_sessions_cut == 2


def test_the_report_says_everything_that_happened() -> None:
    _, report = cut([draw("|uuA|vv" + "B" * 14 + "|wC"), draw("A")], 7)
    for part in ("2 sessions", "1 longer", "1 turns cut inside", "replayed", "fewer than 2"):
        assert part in str(report)


def _spans_of_turns(session: DrawnSession) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    for offset, turn in enumerate(session.turn_of_token):
        if turn:
            spans[turn] = (spans.get(turn, (offset, 0))[0], offset + 1)
    return spans


def test_random_sessions_are_cut_by_the_rules() -> None:
    """Each rule, checked from the spans alone on some thousand sessions of all shapes."""
    rng = np.random.default_rng(1)
    seen = dict.fromkeys(("cut", "inside", "mid_message", "no_system", "replay", "gap", "fit"), 0)
    for _ in range(1500):
        session = draw_random(rng, max_turns=8)
        window = int(rng.integers(1, 50))
        context = int(rng.integers(0, window))
        pieces, report = cut([session], window, window_context=context)
        spans = all_spans(pieces)
        if report.num_long_sessions == 0:
            assert spans == [[0, 0, 0, len(session.drawing)]] * (len(session.drawing) > 1)
            seen["fit"] += 1
            continue
        _check_targets_exactly_once(session, spans)
        shown = [
            [*range(system_stop), *range(start, stop)] for system_stop, start, _, stop in spans
        ]
        assert all(2 <= len(tokens) == len(set(tokens)) <= window + 1 for tokens in shown)
        distinct = len(set().union(*shown))
        if spans:
            assert report.num_tokens_replayed == sum(map(len, shown)) - distinct
            assert report.num_context_tokens_lost == len(session.drawing) - distinct
        turns = _spans_of_turns(session)
        cut_inside = {
            turn
            for turn, (begin, end) in turns.items()
            if any(begin < stop < end for *_, stop in spans)
        }
        assert all(turns[turn][1] - turns[turn][0] > window for turn in cut_inside)
        assert report.num_turns_cut == len(cut_inside)
        for system_stop, start, _, stop in spans:  # no room was left for another turn
            room_end = start + window + 1 - system_stop
            assert not any(stop < end <= room_end for _, end in turns.values())
        assert report.num_targets_lost == 0
        _check_openings(session, spans, context, report)
        seen["cut"] += len(spans) > 1
        seen["inside"] += bool(cut_inside)
        seen["mid_message"] += report.num_pieces_opened_inside_message > 0
        seen["no_system"] += report.num_pieces_without_system > 0
        seen["replay"] += any(start < target < stop for _, start, target, stop in spans)
        seen["gap"] += "." in session.drawing
    assert all(count > 50 for count in seen.values()), seen


def _check_targets_exactly_once(session: DrawnSession, spans: list[list[int]]) -> None:
    trained: list[int] = []
    for system_stop, start, target_start, stop in spans:
        assert 0 <= system_stop <= start <= max(start, target_start) < stop
        for offset in range(max(start, target_start), stop):
            if session.turn_of_token[offset]:
                # What predicts a target is the token before it.
                assert offset > start or offset == system_stop > 0
                trained.append(offset)
    assert trained == [i for i, turn in enumerate(session.turn_of_token) if turn]


def _check_openings(
    session: DrawnSession, spans: list[list[int]], context: int, report: CutReport
) -> None:
    ends = np.cumsum(session.segment_lengths)
    starts = set((ends - session.segment_lengths)[(session.modes & 7) == 4].tolist())
    system_length = session.drawing.count("s")
    inside = without_system = 0
    covered = 0
    for system_stop, start, target_start, stop in spans:
        assert system_stop in (0, system_length)
        inside += start not in starts | {0, system_length}
        without_system += start > 0 and system_stop < system_length
        if covered:
            assert covered - start <= max(context, 1)
        assert target_start >= covered
        covered = stop
    assert report.num_pieces_opened_inside_message == inside
    assert report.num_pieces_without_system == without_system
