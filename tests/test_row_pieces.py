"""The tokens of a row's pieces, however they are read."""

from pathlib import Path

import numpy as np
import pytest
from drawn_sessions import DrawnSession
from hypothesis import given, settings
from hypothesis import strategies as st
from session_strategies import corpora

from megatron_multiturn import token_reader
from megatron_multiturn.row_pieces import indices_of_runs, join_sessions, token_runs
from megatron_multiturn.token_reader import FileTokens, MappedTokens


def test_indices_of_runs() -> None:
    assert indices_of_runs(np.array([7, 2, 9]), np.array([2, 0, 3])).tolist() == [7, 8, 9, 10, 11]
    assert indices_of_runs(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_a_piece_with_the_system_message_is_two_runs() -> None:
    spans = np.array([[0, 0, 0, 4], [2, 5, 7, 9], [3, 3, 0, 6]], dtype=np.int32)
    starts, lengths = token_runs(np.array([100, 200, 300]), spans)
    assert starts.tolist() == [100, 200, 205, 300, 303]
    assert lengths.tolist() == [4, 2, 4, 3, 3]


@pytest.mark.parametrize("gather_below", [0, 3, 10**9])
def test_every_reader_gives_the_same_tokens(
    gather_below: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_reader, "_GATHER_BELOW", gather_below)
    dtype = np.dtype(np.uint16)
    pieces_read = two_runs = 0

    @settings(max_examples=150, deadline=None)
    @given(corpora(max_sessions=6), st.data())
    def check(corpus: list[DrawnSession], data: st.DataObject) -> None:
        nonlocal pieces_read, two_runs
        corpus = [session for session in corpus if len(session.tokens) > 1]
        if not corpus:
            return
        path = tmp_path / "tokens.bin"
        path.write_bytes(np.concatenate([s.tokens for s in corpus]).astype(dtype).tobytes())
        lengths = np.array([len(session.tokens) for session in corpus])
        first_tokens = np.cumsum(lengths) - lengths
        numbers = data.draw(st.lists(st.integers(0, len(corpus) - 1), min_size=1, max_size=5))
        spans = []
        for number in numbers:
            length = int(lengths[number])
            system_stop = data.draw(st.sampled_from([0, 0, length // 3]))
            start = data.draw(st.integers(system_stop, length - 1))
            spans.append((system_stop, start, start, data.draw(st.integers(start + 1, length))))
        table = np.array(spans, dtype=np.int32)
        expected = join_sessions([corpus[number] for number in numbers], table)
        runs = token_runs(first_tokens[numbers], table)
        for reader in (MappedTokens(str(path), dtype), FileTokens(str(path), dtype)):
            assert reader.read(*runs).tolist() == expected.tokens.tolist()
        pieces_read += len(numbers)
        two_runs += len(runs[0]) > len(numbers)

    check()
    assert pieces_read > 100
    assert two_runs > 20
