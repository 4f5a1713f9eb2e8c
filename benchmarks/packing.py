"""Planning, reading and starting at scale, beside what a user would otherwise have.

    python benchmarks/packing.py                      # all sections, some ten minutes
    python benchmarks/packing.py --sections rows --seq-lengths 4096

Sections:
    plan    best-fit-decreasing with session assignment, beside a segment tree that takes the
            sessions one by one, and a packer that takes them in order
    long    the same with 5% of the sessions longer than a row, cut into windows
    rows    one row with all keys of the sample contract, beside Megatron's GPTDataset with
            inter-document masking on the same sessions, and its SFT dataset
    start   from the index on disk to the first row, without and with a plan on disk
    train   a few steps of real training on that corpus, on this machine's CPU

Every ratio is of two measurements of the same run on the same sessions. Lengths are log-normal.
"""

import argparse
import os
import platform
import tempfile
from pathlib import Path

import measuring
import numpy as np
from corpora import MODES, NUM_SEGMENTS, Lengths
from numpy.typing import NDArray
from peers import segment_tree_best_fit, sequential_packer
from reading import report_rows
from starting import report_start, report_training

from megatron_multiturn.packing import pack
from megatron_multiturn.windows import cut_sessions

SECTIONS = ("plan", "long", "rows", "start", "train")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--sessions", type=int, default=10_000_000)
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--median", type=float, default=700.0, help="tokens of a session")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the log of the length")
    parser.add_argument(
        "--disk-median", type=float, default=70.0, help="tokens of a session of the corpus on disk"
    )
    parser.add_argument("--row-sessions", type=int, default=200_000, help="sessions of `rows`")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing; the least counts")
    parser.add_argument("--folder", type=Path, help="for corpora (2.6 GB for 10^7 sessions)")
    args = parser.parse_args()
    print(f"{measuring.processor()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"NumPy {np.__version__}, {args.sessions:,} sessions, median {args.median:g} tokens")
    for sequence_length in args.seq_lengths:
        if "plan" in args.sections:
            report_plan(args, sequence_length)
        if "long" in args.sections:
            report_long(args, sequence_length)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if "rows" in args.sections:
            lengths = Lengths(
                median=args.median,
                sigma=args.sigma,
                shortest=NUM_SEGMENTS,
                longest=max(args.seq_lengths) + 1,
            ).draw(args.row_sessions, seed=0)
            report_rows(folder, lengths, args.seq_lengths, args.repeats)
        if {"start", "train"} & set(args.sections):
            prefix = report_start(folder, args.sessions, args.disk_median, args.sigma)
        if "train" in args.sections:
            report_training(folder, prefix)


def report_plan(args: argparse.Namespace, sequence_length: int) -> None:
    lengths = Lengths(
        median=args.median, sigma=args.sigma, shortest=2, longest=sequence_length + 1
    ).draw(args.sessions, seed=0)
    positions = lengths - np.int32(1)  # what a session fills; the peers are given this
    bound = -(-int(positions.sum(dtype=np.int64)) // sequence_length)

    def ours() -> int:
        return plan_rows(lengths, sequence_length)

    def tree() -> int:
        return len(segment_tree_best_fit(positions, sequence_length))

    def sequential() -> int:
        return len(sequential_packer(positions, sequence_length))

    print(f"\nplan at {sequence_length:,}: at least {bound:,} rows")
    print(f"{'':<28}{'seconds':>9}{'GiB':>7}{'rows':>12}{'/ bound':>10}{'time / ours':>13}")
    first = None
    for name, work, repeats in (
        ("ours", ours, args.repeats),
        ("segment tree, one by one", tree, 1),
        ("in order", sequential, 1),
    ):
        best = min((measuring.in_child(work) for _ in range(repeats)), key=lambda m: m.seconds)
        first = first or best
        print(
            f"{name:<28}{best.seconds:>9.2f}{best.gib:>7.2f}{best.value:>12,}"
            f"{best.value / bound:>10.5f}{best.seconds / first.seconds:>13.1f}",
            flush=True,
        )
        if name.startswith("segment"):
            assert best.value == first.value, "the plan is not best-fit-decreasing"


def plan_rows(lengths: NDArray[np.int32], sequence_length: int) -> int:
    """Cut and pack, as a start without a plan does after it has read the lengths."""
    no_segments = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int8))
    pieces, _ = cut_sessions(
        lengths, sequence_length=sequence_length, long_session="error", segment_index=no_segments
    )
    return pack(pieces, sequence_length=sequence_length, seed=0).stats.num_rows


def report_long(args: argparse.Namespace, sequence_length: int) -> None:
    """Sessions of NUM_SEGMENTS segments, one in twenty of 2 to 6 rows' length."""
    share = sequence_length // NUM_SEGMENTS
    rng = np.random.default_rng(0)
    segment_lengths = rng.integers(1, share // 2, (args.sessions, NUM_SEGMENTS), dtype=np.int32)
    is_long = rng.random(args.sessions) < 0.05
    more = rng.integers(2 * share, 6 * share, (int(is_long.sum()), NUM_SEGMENTS), dtype=np.int32)
    segment_lengths[is_long] = more
    lengths = segment_lengths.sum(axis=1, dtype=np.int64)
    index = (
        np.arange(args.sessions + 1, dtype=np.int64) * NUM_SEGMENTS,
        segment_lengths.ravel(),
        np.tile(MODES, args.sessions),
    )

    def ours() -> int:
        pieces, _ = cut_sessions(
            lengths, sequence_length=sequence_length, long_session="window", segment_index=index
        )
        return len(pieces)

    best = measuring.in_child(ours)
    print(
        f"\nlong sessions at {sequence_length:,}: {int(is_long.sum()):,} of {args.sessions:,} cut "
        f"into windows in {best.seconds:.2f} s, {best.gib:.2f} GiB, {best.value:,} pieces",
        flush=True,
    )


if __name__ == "__main__":
    main()
