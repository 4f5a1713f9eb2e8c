"""megatron-multiturn-preprocess: raw sessions -> PREFIX.bin, PREFIX.idx, PREFIX.json."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_multiturn.encoding import SessionEncoder
from megatron_multiturn.errors import ConfigError, MultiTurnError
from megatron_multiturn.input_files import expand_inputs
from megatron_multiturn.pipeline import Job, Summary, check_outputs, preprocess_sessions
from megatron_multiturn.records import check_input_files
from megatron_multiturn.sessions import FORMATS
from megatron_multiturn.supervision import TRAIN_ON
from megatron_multiturn.template_flags import add_template_flags, build_template
from megatron_multiturn.tokenizer_flags import add_tokenizer_flags, build_tokenizer
from megatron_multiturn.vocabulary import open_vocabulary, tokenizer_fingerprint

_MAX_DEFAULT_WORKERS = 16


def build_parser() -> argparse.ArgumentParser:
    """The command line; the tokenizer flags have Megatron's names."""
    parser = argparse.ArgumentParser(
        prog="megatron-multiturn-preprocess",
        description="Turn files of chat sessions into a dataset for megatron-multiturn.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, patterns in quotes, or folders, whose files are taken in the order of their "
        "names: JSONL, JSON lists, Parquet; the first two also packed by gzip or zstd",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", *FORMATS),
        help="format of the records; auto looks at each (default)",
    )
    parser.add_argument(
        "--train-on",
        default="all",
        choices=tuple(TRAIN_ON),
        help="all answers (default), the last one, those of the last exchange (behind the user's "
        "last message), or the assistant's words alone, without calls of tools; an answer that "
        "its record leaves out stays out",
    )
    parser.add_argument(
        "--on-bad-session",
        default="error",
        choices=("error", "skip"),
        help="stop at the first bad session (default), or write it to PREFIX.rejected.jsonl",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(len(os.sched_getaffinity(0)), _MAX_DEFAULT_WORKERS),
        metavar="N",
        help="processes that encode (default: one a core, at most "
        f"{_MAX_DEFAULT_WORKERS}); the output is the same for any number",
    )
    add_template_flags(parser)
    add_tokenizer_flags(parser, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    args = build_parser().parse_args(argv)
    handler_before = signal.signal(signal.SIGTERM, _raise_exit)
    try:
        _run(args)
    except (MultiTurnError, OSError) as error:  # OSError: the disk is full, say
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler_before)
    return 0


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    """End by an exception, so that temporary files and workers go too."""
    sys.exit(128 + number)


def _run(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one process must encode; pass 1")
    inputs = expand_inputs(args.input)
    check_input_files(inputs)
    job = Job(
        inputs=tuple(inputs),
        prefix=args.output_prefix,
        form=args.format,
        train_on=args.train_on,
        skip_bad_sessions=args.on_bad_session == "skip",
        num_workers=args.workers,
        overwrite=args.overwrite,
    )
    check_outputs(job)
    tokenizer = build_tokenizer(args)
    vocabulary = open_vocabulary(tokenizer)
    template = build_template(args, vocabulary, tokenizer)
    encoder = SessionEncoder(
        template, vocabulary, literal_control_tokens=args.literal_control_tokens
    )
    identity = tokenizer_fingerprint(tokenizer, args.tokenizer_type)
    summary = preprocess_sessions(job, encoder, tokenizer=identity, template=template)
    print(_format_summary(summary, args.output_prefix))


def _format_summary(summary: Summary, prefix: str) -> str:
    """The closing tally."""
    counts = summary.counts
    num_rejected = sum(counts.rejected.values())
    seconds = max(summary.seconds, 1e-9)
    lines = [
        f"{prefix}: {counts.sessions:,} sessions, {counts.turns:,} turns, {counts.tokens:,} "
        f"tokens, {counts.target_tokens:,} target tokens "
        f"({counts.target_tokens / counts.tokens:.1%})",
        f"  {summary.seconds:.1f} s, {(counts.sessions + num_rejected) / seconds:,.0f} sessions/s, "
        f"{counts.tokens / seconds:,.0f} tokens/s",
        f"  rejected: {num_rejected:,} sessions"
        + (f", see {summary.rejected_path}" if summary.rejected_path else ""),
    ]
    lines += [f"    {reason}: {number:,}" for reason, number in counts.rejected.items()]
    for number, what in (
        (summary.num_unknown_tokens, "tokens are unknown to the vocabulary"),
        (summary.num_lossy_sessions, "sessions do not decode to exactly their text"),
        (summary.num_recut_sessions, "sessions have a token across the edge of an answer"),
        (
            summary.num_rewritten_sessions,
            "sessions have a history that the template rewrites, see --history-rewriting",
        ),
        (
            summary.num_open_turns,
            "turns do not end with a control token, so that the model does not learn to stop; put "
            "the template's closing token into its {% generation %} block",
        ),
    ):
        if number:
            lines.append(f"  note: {number:,} {what}")
    if summary.omits_bos:
        lines.append("  note: the tokenizer has no BOS token; the template's <s> is left out")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
