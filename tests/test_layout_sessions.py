"""The data of the layout tests hold the hard cases, in the rows that the jobs really take."""

from typing import Any

import numpy as np
import pytest
from layout_sessions import (
    NUM_ROWS,
    SEQUENCE_LENGTH,
    build_layout_dataset,
    write_layout_sessions,
)
from layouts import QUICK_LAYOUTS, SLOW_LAYOUTS, STEPS
from numpy.typing import NDArray
from oracle import Session, read_sessions

LAYOUTS = [*QUICK_LAYOUTS, *SLOW_LAYOUTS]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_layout_sessions(tmp_path_factory.mktemp("data"))[-1]


@pytest.fixture(scope="module")
def sessions(prefix: str) -> list[Session]:
    return read_sessions(prefix)


@pytest.fixture(scope="module")
def rows(prefix: str) -> list[dict[str, NDArray[Any]]]:
    """What the jobs train on, a step after the other."""
    train = build_layout_dataset(prefix, STEPS * NUM_ROWS)
    return [train[index] for index in range(len(train))]


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_every_step_is_the_whole_data_set(prefix: str, multiple: int) -> None:
    train = build_layout_dataset(prefix, STEPS * NUM_ROWS, piece_multiple=multiple)
    assert train.plan.num_rows == STEPS * NUM_ROWS
    for step in range(STEPS):
        pieces = map(train.plan.pieces_of_row, range(step * NUM_ROWS, (step + 1) * NUM_ROWS))
        taken = train.plan.pieces.session[np.concatenate(list(pieces))]
        assert sorted(taken) == list(range(train.dataset.num_sessions))


def test_turns_are_short_and_long(sessions: list[Session]) -> None:
    lengths = [len(turn) for session in sessions for turn in session.turns]
    assert min(lengths) == 1
    assert max(lengths) > 100
    in_pieces = [turn for s in sessions for turn in s.turns if turn[-1] - turn[0] >= len(turn)]
    assert in_pieces, "no turn has a masked gap"


def test_micro_batches_have_no_target(rows: list[dict[str, NDArray[Any]]]) -> None:
    empty = np.array([not row["loss_mask"].any() for row in rows])
    for size in {layout.size("mb") for layout in LAYOUTS}:
        assert empty.reshape(-1, size).all(axis=1).any()


def test_data_parallel_ranks_have_no_target(rows: list[dict[str, NDArray[Any]]]) -> None:
    """In some step, on some layouts of either list."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    for layouts in (QUICK_LAYOUTS, SLOW_LAYOUTS):
        found = set()
        for layout in layouts:
            ranks, micro_batch_size = layout.size("DP"), layout.size("mb")
            for rank in range(ranks):
                sampler = MegatronPretrainingSampler(len(rows), 0, micro_batch_size, rank, ranks)
                taken = np.concatenate(list(sampler)).reshape(STEPS, -1)
                targets = [sum(rows[row]["turn_num"][0] for row in step) for step in taken]
                if not all(targets):
                    found.add(str(layout))
        assert found


def test_context_parallelism_cuts_turns_and_leaves_ranks_without_a_target(
    rows: list[dict[str, NDArray[Any]]],
) -> None:
    for size in {layout.size("CP") for layout in LAYOUTS} - {1}:
        # Rank r holds chunks r and 2 * size - 1 - r of a row's 2 * size.
        chunk_rank = np.minimum(np.arange(2 * size), np.arange(2 * size)[::-1])
        rank = chunk_rank.repeat(SEQUENCE_LENGTH // (2 * size))
        num_cut, num_missing = 0, 0
        for row in rows:
            targets = row["loss_mask"] > 0
            num_missing += bool(targets.any()) and len(set(rank[targets])) < size
            # A run of target tokens of one turn is a run of equal numbers.
            runs = np.flatnonzero(np.diff(row["loss_token_num"])) + 1
            for turn, owners in zip(np.split(targets, runs), np.split(rank, runs), strict=True):
                num_cut += bool(turn[0]) and len(set(owners)) > 1
        assert num_cut
        assert num_missing


def test_rows_are_unlike(prefix: str, sessions: list[Session]) -> None:
    """So that a mean of means shows, and padding would."""
    train = build_layout_dataset(prefix, NUM_ROWS)
    num_turns, padding, unlike_neighbours = [], [], 0
    for row in range(NUM_ROWS):
        pieces = train.plan.pieces_of_row(row)
        here = [sessions[index] for index in train.plan.pieces.session[pieces]]
        turns = [len(session.turns) for session in here]
        num_turns.append(sum(turns))
        padding.append(SEQUENCE_LENGTH - sum(len(session.tokens) - 1 for session in here))
        unlike_neighbours += max(turns) >= 5 * min(turns) > 0
    assert max(num_turns) > 10 * min(filter(None, num_turns))
    assert unlike_neighbours >= 3
    assert max(padding) > 128
    assert min(padding) == 0
