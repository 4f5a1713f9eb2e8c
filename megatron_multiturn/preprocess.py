"""megatron-multiturn-preprocess: raw sessions -> PREFIX.bin, PREFIX.idx, PREFIX.json."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_multiturn.errors import ConfigError, MultiTurnError
from megatron_multiturn.records import check_input_files
from megatron_multiturn.sessions import FORMATS
from megatron_multiturn.templates import TEMPLATES

TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
)
_MAX_DEFAULT_WORKERS = 16


def build_parser() -> argparse.ArgumentParser:
    """The command line; the tokenizer flags have Megatron's names."""
    parser = argparse.ArgumentParser(
        prog="megatron-multiturn-preprocess",
        description="Turn files of chat sessions into a dataset for megatron-multiturn.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--template", required=True, choices=sorted(TEMPLATES))
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", *FORMATS),
        help="format of the records; auto looks at each (default)",
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
    group = parser.add_argument_group("tokenizer", "as for training; see Megatron's own flags")
    group.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    group.add_argument("--tokenizer-model", required=True, metavar="PATH")
    group.add_argument("--tokenizer-metadata", dest="metadata_path", metavar="FILE")
    group.add_argument("--vocab-file", metavar="FILE")
    group.add_argument("--merge-file", metavar="FILE")
    group.add_argument(
        "--tokenizer-special-tokens", dest="special_tokens", nargs="*", metavar="TOKEN"
    )
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true")
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        _run(args)
    except MultiTurnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    """End by an exception, so that temporary files and workers go too."""
    sys.exit(128 + number)


def _run(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one process must encode; pass 1")
    check_input_files(args.input)
    # What follows takes seconds to import: not for --help or a mistyped file name.
    from megatron_multiturn.encoding import SessionEncoder
    from megatron_multiturn.pipeline import Job, check_outputs, format_summary, preprocess_sessions
    from megatron_multiturn.vocabulary import open_vocabulary, tokenizer_fingerprint

    job = Job(
        inputs=tuple(args.input),
        prefix=args.output_prefix,
        form=args.format,
        skip_bad_sessions=args.on_bad_session == "skip",
        num_workers=args.workers,
        overwrite=args.overwrite,
    )
    check_outputs(job)
    tokenizer = _build_tokenizer(args)
    template = TEMPLATES[args.template]
    encoder = SessionEncoder(template, open_vocabulary(tokenizer))
    identity = tokenizer_fingerprint(tokenizer, args.tokenizer_type)
    summary = preprocess_sessions(job, encoder, tokenizer=identity, template=template)
    print(format_summary(summary, args.output_prefix))


def _build_tokenizer(args: argparse.Namespace) -> object:
    if not os.path.exists(args.tokenizer_model) and args.tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(f"--tokenizer-model {args.tokenizer_model}: no such file; correct it")
    from megatron_multiturn.megatron_compat import build_megatron_tokenizer

    # What else Megatron reads: only of use to training, or to other tokenizer types.
    settings = argparse.Namespace(
        **vars(args),
        chat_template=None,
        vocab_size=None,
        pad_vocab_size=False,
        padded_vocab_size=None,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        rank=0,
    )
    try:
        return build_megatron_tokenizer(settings)
    except Exception as error:  # Megatron and the tokenizer libraries raise of every kind
        raise ConfigError(
            f"Megatron cannot build the {args.tokenizer_type} of --tokenizer-model "
            f"{args.tokenizer_model}: {str(error).strip() or type(error).__name__}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
