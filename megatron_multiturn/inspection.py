"""megatron-multiturn-inspect: what a dataset looks like to the model, and what the loss weighs."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.averages import LOSS_AVERAGES
from megatron_multiturn.dataset_statistics import format_statistics
from megatron_multiturn.decoding import RunDecoder, open_decoder
from megatron_multiturn.errors import ConfigError, DatasetError, MultiTurnError
from megatron_multiturn.packing import PackPlan, pack
from megatron_multiturn.row_view import (
    ShownPiece,
    Style,
    format_pieces,
    terminal_style,
    use_color,
)
from megatron_multiturn.samples import RowFormat
from megatron_multiturn.store import SessionStore
from megatron_multiturn.tokenizer_flags import add_tokenizer_flags, build_tokenizer
from megatron_multiturn.vocabulary import tokenizer_fingerprint
from megatron_multiturn.windows import LONG_SESSION_POLICIES, CutReport, PieceTable, cut_sessions

_DEFAULT_SEQUENCE_LENGTH = 4096
_MEGATRON_SEED = 1234  # the default of Megatron's --seed


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags that training has too have the same names."""
    parser = argparse.ArgumentParser(
        prog="megatron-multiturn-inspect",
        description="Show a packed row, a session or the statistics of a preprocessed dataset.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="as in --data-path")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--row", type=int, default=0, metavar="N", help="show this row (default: 0)")
    what.add_argument("--session", type=int, metavar="N", help="show this session")
    what.add_argument("--stats", action="store_true", help="show statistics; no tokenizer needed")
    parser.add_argument("--loss-average", choices=LOSS_AVERAGES, default="turn")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: if the output is a terminal and NO_COLOR is not set (default)",
    )
    group = parser.add_argument_group(
        "packing", "as for training, to see its rows (of the whole dataset as one split)"
    )
    group.add_argument(
        "--seq-length",
        type=int,
        metavar="S",
        help=f"default: {_DEFAULT_SEQUENCE_LENGTH}; with --session: the session is not cut",
    )
    group.add_argument("--seed", type=int, default=_MEGATRON_SEED, metavar="N")
    group.add_argument("--long-session", choices=LONG_SESSION_POLICIES, default="window")
    group.add_argument("--session-window", type=int, metavar="TOKENS")
    group.add_argument("--window-context", type=float, default=0.25, metavar="FRACTION")
    add_tokenizer_flags(parser, required=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
        print(_run(args, use_color(args.color, is_terminal=sys.stdout.isatty())), flush=True)
    except MultiTurnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # a pager that was closed; Python would complain when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(args: argparse.Namespace, color: bool) -> str:
    if not args.stats and args.tokenizer_model is None:
        raise ConfigError(
            "text needs the tokenizer of the dataset: pass --tokenizer-model, or --stats for "
            "what can be said without one"
        )
    if args.seq_length is not None and args.seq_length < 1:
        raise ConfigError(f"--seq-length is {args.seq_length}; a row has at least 1 token")
    store = SessionStore.open(args.prefix)
    if args.stats:
        sequence_length = args.seq_length or _DEFAULT_SEQUENCE_LENGTH
        plan, report = _plan(store, args, range(store.num_sessions), sequence_length)
        return format_statistics(store, sequence_length, report, plan.stats)
    style = terminal_style(color)
    if args.session is None:
        return _show_row(store, args, style)
    return _show_session(store, args, style)


def _show_row(store: SessionStore, args: argparse.Namespace, style: Style) -> str:
    sequence_length = args.seq_length or _DEFAULT_SEQUENCE_LENGTH
    plan, _ = _plan(store, args, range(store.num_sessions), sequence_length)
    _check_number("--row", args.row, plan.num_rows, "rows of the first epoch")
    pieces = _shown_pieces(store, plan.pieces, plan.pieces_of_row(args.row))
    num_positions = sum(piece.num_positions for piece in pieces)
    heading = (
        f"row {args.row:,} of {plan.num_rows:,}: {num_positions:,} of {sequence_length:,} "
        f"positions filled, --loss-average {args.loss_average}"
    )
    return _show(store, args, style, heading, pieces)


def _show_session(store: SessionStore, args: argparse.Namespace, style: Style) -> str:
    _check_number("--session", args.session, store.num_sessions, "sessions")
    length = int(store.session_lengths()[args.session])
    sessions = range(args.session, args.session + 1)
    plan, report = _plan(store, args, sessions, args.seq_length or max(1, length - 1))
    if not len(plan.pieces):
        raise DatasetError(f"no piece comes of session {args.session}: {report}")
    pieces = _shown_pieces(store, plan.pieces, np.arange(len(plan.pieces), dtype=np.int32))
    heading = (
        f"session {args.session:,} of {store.num_sessions:,}: {length:,} tokens, "
        f"--loss-average {args.loss_average}"
    )
    return _show(store, args, style, heading, pieces)


def _show(
    store: SessionStore,
    args: argparse.Namespace,
    style: Style,
    heading: str,
    pieces: list[ShownPiece],
) -> str:
    row_format = RowFormat(
        turn_weights=store.manifest.turn_weights,
        sequence_length=max(1, sum(piece.num_positions for piece in pieces)),
        max_pieces_per_row=len(pieces),
        pad_token=0,
        loss_average=args.loss_average,
        sessions_end_with_piece=args.long_session == "truncate",
    )
    decoder = _open_decoder(store, args)
    return style.heading(heading) + "\n" + format_pieces(pieces, row_format, decoder, style)


def _plan(
    store: SessionStore, args: argparse.Namespace, sessions: range, sequence_length: int
) -> tuple[PackPlan, CutReport]:
    first_segments, segment_lengths, modes = store.segment_index()
    window = args.session_window or sequence_length
    pieces, report = cut_sessions(
        store.session_lengths()[sessions.start : sessions.stop],
        sequence_length=sequence_length,
        long_session=args.long_session,
        segment_index=(
            first_segments[sessions.start : sessions.stop + 1],
            segment_lengths,
            modes,
        ),
        window_context=int(window * args.window_context),
        session_window=args.session_window,
    )
    pieces = replace(pieces, session=pieces.session + sessions.start)
    return pack(pieces, sequence_length=sequence_length, seed=args.seed), report


def _shown_pieces(
    store: SessionStore, table: PieceTable, indices: NDArray[np.int32]
) -> list[ShownPiece]:
    sessions = table.session[indices].tolist()
    spans = table.spans_of(indices).tolist()
    return [
        ShownPiece(session_index=number, session=store.session(number), span=tuple(span))
        for number, span in zip(sessions, spans, strict=True)
    ]


def _check_number(flag: str, number: int, count: int, what: str) -> None:
    if not 0 <= number < count:
        raise ConfigError(
            f"{flag} is {number}, and there are {count:,} {what}; pass 0 to {count - 1}"
        )


def _open_decoder(store: SessionStore, args: argparse.Namespace) -> RunDecoder:
    """The decoder of the dataset's own tokenizer; DatasetError if the flags say another one."""
    expected = store.manifest.tokenizer
    args.tokenizer_type = args.tokenizer_type or expected.type
    tokenizer = build_tokenizer(args)
    found = tokenizer_fingerprint(tokenizer, args.tokenizer_type)
    if found.content_hash != expected.content_hash:
        raise DatasetError(
            f"{store.prefix} was made with another tokenizer ({expected.type}, "
            f"{expected.vocab_size:,} tokens) than {args.tokenizer_model} "
            f"({found.vocab_size:,} tokens); pass that one as --tokenizer-model"
        )
    return open_decoder(tokenizer)


if __name__ == "__main__":
    sys.exit(main())
