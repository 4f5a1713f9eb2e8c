"""What the closing table is made of."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_multiturn.encoding import EncodedSession, join_encoded
from megatron_multiturn.errors import SessionError
from megatron_multiturn.manifest import Counts
from megatron_multiturn.tally import LengthHistogram, Pace, Tally, format_table


def counted(lengths: list[int], place: int, errors: tuple[tuple[str, str], ...] = ()) -> Tally:
    """The tally of a batch whose sessions come from in:PLACE, in:PLACE + 1, ..."""
    sessions = [
        EncodedSession(
            tokens=np.zeros(length, np.int32),
            segment_lengths=np.array([length], np.int32),
            modes=np.ones(1, np.int8),
        )
        for length in lengths
    ]
    tally = Tally()
    batch = join_encoded(sessions, totals={"num_open_turns": len(lengths)})
    locations = [f"in:{place + number}" for number in range(len(lengths))]
    tally.add_batch(batch, np.array(lengths, dtype=np.int64), locations)
    tally.add_rejected(
        (where, SessionError(f"{where}: {reason}", reason=reason)) for where, reason in errors
    )
    return tally


def test_the_first_of_a_kind_is_kept_in_whatever_pieces_it_is_counted() -> None:
    first = counted([3, 9, 9], 1, (("in:4", "b"), ("in:5", "a"), ("in:6", "b")))
    later = counted([9, 2], 7, (("in:9", "c"), ("in:10", "a")))
    first.add(later)
    assert (first.longest_tokens, first.longest_location) == (9, "in:2")
    assert {key: (one.count, one.location) for key, one in first.rejected.items()} == {
        "b": (2, "in:4"),
        "a": (2, "in:5"),
        "c": (1, "in:9"),
    }
    assert first.rejected_counts() == {"a": 2, "b": 2, "c": 1}
    assert list(first.rejected_counts()) == ["a", "b", "c"]
    assert (first.num_rejected, first.first_message) == (5, "in:4: b")
    assert first.totals == {"num_open_turns": 5}
    first.add(counted([10], 20))
    assert (first.longest_tokens, first.longest_location) == (10, "in:20")


@given(
    blocks=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=1, max_size=9)
)
def test_percentiles_are_exact(blocks: list[list[int]]) -> None:
    histogram = LengthHistogram(np.array(block, dtype=np.int32) for block in blocks)
    lengths = np.array([one for block in blocks for one in block])
    for percent in (1, 50, 90, 99, 100):
        wanted = np.percentile(lengths, percent, method="inverted_cdf")
        assert histogram.percentile(percent) == wanted
    joined = LengthHistogram()
    joined.add_pairs([])
    for block in blocks:
        pairs = json.loads(json.dumps(LengthHistogram([np.array(block)]).pairs()))
        joined.add_pairs(pairs)
    assert joined.pairs() == histogram.pairs()


@pytest.mark.parametrize("kept", [0, 2])
def test_the_table(kept: int) -> None:
    tally = counted([3, 9][:kept], 1, (("in:4", "b"), ("in:5", "long-a"), ("in:6", "long-a")))
    counts = Counts(
        sessions=kept, segments=kept, turns=kept, tokens=12, target_tokens=9, rejected={}
    )
    lengths = LengthHistogram([np.array([3, 9])] if kept else [])
    pace = Pace(seconds=2.0, sessions=4000, input_bytes=10**7, tokens=12)
    lines = format_table("out", counts, tally, lengths, pace=pace, omits_bos=True).splitlines()
    end = [
        "  rejected  3 sessions",
        "          2 long-a  first: in:5",
        "          1 b       first: in:4",
        "  speed     2.0 s, 2,000 sessions/s, 5.0 MB/s, 6 tokens/s",
        "  note: the tokenizer has no BOS token; the template's <s> is left out",
    ]
    if kept:
        end.insert(4, next(line for line in lines if "2 turns do not end with a control" in line))
        assert lines[1:4] == [
            "  kept      2 sessions, 2 turns",
            "  tokens    12, targets 9 (75.0%)",
            "  length    p50 3 p90 9 p99 9 max 9 tokens a session; the longest is in:2",
        ]
    assert lines[0] == "out"
    assert lines[4 if kept else 2 :] == end
