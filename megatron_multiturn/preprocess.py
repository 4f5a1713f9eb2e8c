"""megatron-multiturn-preprocess: raw sessions -> PREFIX.bin, PREFIX.idx, PREFIX.json."""

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, NoReturn

from megatron_multiturn.decoding import open_decoder
from megatron_multiturn.dry_run import show_sessions
from megatron_multiturn.encoding import SessionEncoder
from megatron_multiturn.encoding_pool import Work, sample_texts
from megatron_multiturn.engines import ENGINES, choose_engine
from megatron_multiturn.errors import ConfigError, MultiTurnError
from megatron_multiturn.input_files import expand_inputs
from megatron_multiturn.journal import is_placing
from megatron_multiturn.manifest import TemplateIdentity
from megatron_multiturn.pipeline import Job, check_outputs, preprocess_sessions
from megatron_multiturn.progress import format_bytes
from megatron_multiturn.prompt_variants import PromptVariants, read_phrasings
from megatron_multiturn.records import check_input_files
from megatron_multiturn.row_view import terminal_style, use_color
from megatron_multiturn.sessions import FORMATS
from megatron_multiturn.shards import Shard, cut_shard, parse_shard
from megatron_multiturn.supervision import DEFAULT_ROLES, TRAIN_ON, TRAIN_ROLES
from megatron_multiturn.tally import format_table
from megatron_multiturn.template_flags import add_template_flags, build_template
from megatron_multiturn.tokenizer_flags import add_tokenizer_flags, build_tokenizer
from megatron_multiturn.unfinished import UnfinishedRun, unfinished_folder
from megatron_multiturn.vocabulary import open_vocabulary, tokenizer_fingerprint

# A run that goes on may have others of these. Whether bad sessions are skipped is among them: up
# to the first of them the work is the same. The files of the tokenizer and of the template count
# by what is in them.
_FLAGS_THAT_DECIDE_NOTHING = (
    *("input", "output_prefix", "overwrite", "workers", "shard", "dry_run", "on_bad_session"),
    *("tokenizer_model", "vocab_file", "merge_file", "template", "jinja_template"),
    "template_date",
)
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
        "--train-roles",
        nargs="+",
        default=list(DEFAULT_ROLES),
        choices=TRAIN_ROLES,
        metavar="ROLE",
        help="the roles whose messages are answers (default: assistant); others than the "
        "assistant with --template chatml and llama3",
    )
    parser.add_argument(
        "--on-bad-session",
        default="error",
        choices=("error", "skip"),
        help="stop at the first bad session (default), or write it to PREFIX.rejected.jsonl",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace outputs that are there, and the unfinished ones of another run",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(len(os.sched_getaffinity(0)), _MAX_DEFAULT_WORKERS),
        metavar="N",
        help="processes that encode (default: one a core, at most "
        f"{_MAX_DEFAULT_WORKERS}); the output is the same for any number",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="only part I of N of the input, I from 0 as in SLURM_ARRAY_TASK_ID; join the parts "
        "with megatron-multiturn-merge",
    )
    parser.add_argument(
        "--dry-run",
        type=int,
        metavar="N",
        help="show the first N sessions, what is trained on in colour, and write nothing",
    )
    parser.add_argument(
        "--prompt-variants",
        type=_phrasings,
        metavar="FILE",
        help="phrasings, one a line, such as 'what is {query}?': in a session of one question "
        "that is a bare term, the question is put in one of them",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="of the draw of phrasings"
    )
    add_template_flags(parser)
    add_tokenizer_flags(parser, required=True)
    parser.add_argument(
        "--tokenizer-engine",
        choices=ENGINES,
        default="auto",
        help="what encodes: gigatoken, if it gives the ids of the tokenizer's own library on the "
        "user's data, else that library (auto, default); or one of the two",
    )
    return parser


def _phrasings(path: str) -> tuple[str, ...]:
    try:
        return read_phrasings(path)
    except ConfigError as error:
        message = str(error).removeprefix("--prompt-variants ")  # argparse names the flag
        raise argparse.ArgumentTypeError(message) from None


def main(argv: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """Run the command; 0, or 1 with one line on stderr, and another if work was kept.

    owns_process: whether nothing else will be done in this process.
    """
    args = build_parser().parse_args(argv)
    handler_before = signal.signal(signal.SIGTERM, _raise_exit)
    try:
        if args.dry_run is not None:
            _show(args, owns_process)
        else:
            _run(args, owns_process)
    except BrokenPipeError:  # a pager that was closed; Python would complain when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MultiTurnError, OSError) as error:
        message = _with_remedy(error, args.output_prefix)
        print(f"error: {message}", file=sys.stderr)
        _say_what_is_kept(args, message)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no dataset was written", file=sys.stderr)
        _say_what_is_kept(args)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler_before)
    return 0


def _with_remedy(error: Exception, prefix: str) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{prefix}: {error.strerror}; make room there and give the same command again"
    return str(error)


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    """End by an exception, so that workers go too."""
    sys.exit(128 + number)


def _say_what_is_kept(args: argparse.Namespace, message: str = "") -> None:
    """Unless the message that ends the run speaks of it."""
    with contextlib.suppress(MultiTurnError):
        folder = unfinished_folder(_shard_and_prefix(args)[1])
        if args.dry_run is None and os.path.isdir(folder) and folder not in message:
            print(
                f"note: {folder} holds what is done so far; the same command goes on with it",
                file=sys.stderr,
            )


def _run(args: argparse.Namespace, owns_process: bool) -> None:
    job = _job_of(args)
    with UnfinishedRun(job.prefix) as run:
        if not is_placing(run):
            check_outputs(job)
        _announce(job)
        tokenizer = build_tokenizer(args, hides_torch=owns_process)
        with ThreadPoolExecutor(1) as thread:  # it is gone before processes are forked
            identity = thread.submit(tokenizer_fingerprint, tokenizer, args.tokenizer_type)
            encoder = _build_encoder(args, job, tokenizer)
        template = encoder.template
        summary = preprocess_sessions(
            job,
            encoder,
            run,
            tokenizer=identity.result(),
            template=TemplateIdentity(name=template.name, content_hash=template.content_hash),
        )
    table = format_table(
        job.prefix,
        summary.counts,
        summary.tally,
        summary.lengths,
        pace=summary.pace,
        rejected_path=summary.rejected_path,
        omits_bos=encoder.omits_bos,
    )
    print(table)


def _show(args: argparse.Namespace, owns_process: bool) -> None:
    """--dry-run."""
    if args.dry_run < 1:
        raise ConfigError(f"--dry-run {args.dry_run}: show at least 1 session")
    job = _job_of(args)
    _announce(job)
    tokenizer = build_tokenizer(args, hides_torch=owns_process)
    encoder = _build_encoder(args, job, tokenizer)
    blocks = show_sessions(
        cut_shard(job.inputs, job.shard),
        args.dry_run,
        Work(encoder=encoder, form=job.form),
        open_decoder(tokenizer),
        terminal_style(use_color("auto", is_terminal=sys.stdout.isatty())),
        skip_bad_sessions=job.skip_bad_sessions,
        omits_bos=encoder.omits_bos,
    )
    for block in blocks:
        print(block, end="\n\n", flush=True)


def _shard_and_prefix(args: argparse.Namespace) -> tuple[Shard | None, str]:
    """The shard, if there is one, and the prefix of its outputs."""
    if args.shard is None:
        return None, args.output_prefix
    shard = parse_shard(args.shard)
    return shard, shard.prefix_of(args.output_prefix)


def _job_of(args: argparse.Namespace) -> Job:
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one process must encode; pass 1")
    shard, prefix = _shard_and_prefix(args)
    inputs = expand_inputs(args.input)
    check_input_files(inputs)
    return Job(
        inputs=tuple(inputs),
        prefix=prefix,
        shard=shard,
        form=args.format,
        skip_bad_sessions=args.on_bad_session == "skip",
        num_workers=args.workers,
        overwrite=args.overwrite,
        flags={
            "--" + name.replace("_", "-"): value
            for name, value in vars(args).items()
            if name not in _FLAGS_THAT_DECIDE_NOTHING
        },
    )


def _announce(job: Job) -> None:
    """The first line of progress: Megatron's tokenizer takes seconds to import."""
    total = sum(map(os.path.getsize, job.inputs))
    what = f"{len(job.inputs):,} file{'s' if len(job.inputs) > 1 else ''}, {format_bytes(total)}"
    if job.shard is not None:
        what += f", shard {job.shard.index} of {job.shard.count}"
    print(f"preprocess: {what}; loading the tokenizer", file=sys.stderr, flush=True)


def _build_encoder(args: argparse.Namespace, job: Job, tokenizer: Any) -> SessionEncoder:
    vocabulary = open_vocabulary(tokenizer)
    template = build_template(args, vocabulary, tokenizer)
    engine, note = choose_engine(
        args.tokenizer_engine, vocabulary, sample_texts(job.inputs, job.form)
    )
    if note:
        print(f"preprocess: {note}", file=sys.stderr, flush=True)
    return SessionEncoder(
        template,
        vocabulary,
        engine=engine,
        train_on=args.train_on,
        train_roles=args.train_roles,
        prompt_variants=args.prompt_variants and PromptVariants(args.prompt_variants, args.seed),
        literal_control_tokens=args.literal_control_tokens,
    )


def run_command() -> NoReturn:
    """The command by itself: ends at once, where Python would take seconds to tear itself down."""
    code = main(owns_process=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_command()
