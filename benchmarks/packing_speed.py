"""How fast and how full pack plans are, beside the plans that are simplest to write.

    python benchmarks/packing_speed.py --sessions 10000000 --seq-length 4096

Session lengths are drawn from a log-normal distribution, by default with a median of 735 tokens
and a long tail that is clipped at a row. `next fit` takes the sessions in random order and opens
a row when one does not fit; `first fit decreasing` puts each, from the longest to the shortest,
into the first row that holds it, in quadratic time, so only on the first --naive-sessions of them.
The two that are compared always get the same lengths.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.packing import PieceTable, pack
from megatron_multiturn.windows import cut_sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--naive-sessions", type=int, default=20_000)
    parser.add_argument("--median", type=float, default=735.0, help="tokens a session")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the log of the length")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    lengths = rng.lognormal(np.log(args.median), args.sigma, args.sessions).astype(np.int64)
    lengths = lengths.clip(2, args.seq_length + 1)
    print(f"{platform.processor() or platform.machine()}, NumPy {np.__version__}, one process")
    print(f"{args.sessions:,} sessions, {args.seq_length:,} positions a row")
    print(f"{'':<36}{'seconds':>9}{'rows':>12}{'over bound':>12}{'fill':>9}")
    pieces = _report_cut(lengths, args.seq_length)
    positions = pieces.num_positions().astype(np.int64)

    def best_fit() -> int:
        plan = pack(pieces, sequence_length=args.seq_length, seed=args.seed, num_epochs=args.epochs)
        return plan.stats.num_rows

    ours = _report(f"best fit decreasing, {args.epochs} epoch(s)", best_fit, positions, args)
    simple = _report("next fit", lambda: next_fit(positions, args.seq_length), positions, args)
    _compare("next fit", simple, ours)

    part = positions[: args.naive_sessions]
    table = PieceTable(session=pieces.session[: len(part)], spans=pieces.spans[: len(part)])
    print(f"\nthe first {len(part):,} of them")
    ours = _report(
        "best fit decreasing",
        lambda: pack(table, sequence_length=args.seq_length, seed=0).stats.num_rows,
        part,
        args,
    )
    simple = _report(
        "first fit decreasing", lambda: first_fit_decreasing(part, args.seq_length), part, args
    )
    _compare("first fit decreasing", simple, ours)


def next_fit(positions: NDArray[np.int64], capacity: int) -> int:
    """Rows when every session goes into the last row opened, or opens the next."""
    rows, room = 0, 0
    for length in positions.tolist():
        if length > room:
            rows, room = rows + 1, capacity
        room -= length
    return rows


def first_fit_decreasing(positions: NDArray[np.int64], capacity: int) -> int:
    """Rows when every session, longest first, goes into the first row that holds it."""
    rooms = np.full(len(positions), capacity)
    num_rows = 0
    for length in np.sort(positions)[::-1].tolist():
        row = int(np.argmax(rooms >= length))
        rooms[row] -= length
        num_rows = max(num_rows, row + 1)
    return num_rows


def _report_cut(lengths: NDArray[np.int64], sequence_length: int) -> PieceTable:
    no_segments = (
        np.zeros(1, dtype=np.int64),
        np.zeros(0, dtype=np.int32),
        np.zeros(0, dtype=np.int8),
    )
    started = time.perf_counter()
    pieces, _ = cut_sessions(
        lengths, sequence_length=sequence_length, long_session="error", segment_index=no_segments
    )
    print(f"{'cut_sessions (all fit)':<36}{time.perf_counter() - started:>9.2f}")
    return pieces


def _report(
    name: str, count_rows: Callable[[], int], positions: NDArray[np.int64], args: argparse.Namespace
) -> tuple[int, float]:
    started = time.perf_counter()
    rows = count_rows()
    seconds = time.perf_counter() - started
    bound = -(-int(positions.sum()) // args.seq_length)
    fill = int(positions.sum()) / (rows * args.seq_length)
    print(f"{name:<36}{seconds:>9.2f}{rows:>12,}{rows / bound - 1:>12.4%}{fill:>9.2%}")
    return rows, seconds


def _compare(name: str, simple: tuple[int, float], ours: tuple[int, float]) -> None:
    print(
        f"{name} takes {simple[0] / ours[0]:.3f} times the rows and {simple[1] / ours[1]:.1f} "
        "times the time"
    )


if __name__ == "__main__":
    main()
