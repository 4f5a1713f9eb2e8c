"""The quickstart's own steps: `python -m megatron_multiturn.demo STEP ...`.

corpus      write the demo corpus
tokenizer   train a SentencePiece tokenizer on any session files
progress    show Megatron's log as it is written, a line per logged iteration
summary     what the training reached
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_multiturn.demo_corpus import demo_sessions
from megatron_multiturn.demo_report import progress_lines, summarize
from megatron_multiturn.errors import MultiTurnError, SessionError
from megatron_multiturn.sessions import read_sessions

# Symbols of the templates, so that the tokenizer serves each of them.
CONTROL_SYMBOLS = ("<|im_start|>", "<|im_end|>")

_NUM_RESERVED_PIECES = 3 + len(CONTROL_SYMBOLS) + 256  # unknown, bos, eos; a piece a byte
_MAX_LINE_CHARACTERS = 1000  # SentencePiece leaves out lines of more than about 4,000 bytes
_MAX_TEXT_CHARACTERS = 1_000_000  # enough for a demo, and some seconds of work
_MAX_DISTINCT_CHARACTERS = 4000  # rarer ones are written as bytes


def write_corpus(path: Path, num_sessions: int, *, seed: int) -> None:
    """Write the demo corpus as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for session in demo_sessions(num_sessions, seed=seed):
            file.write(json.dumps(session, ensure_ascii=False) + "\n")


def train_tokenizer(paths: Sequence[str], prefix: str, *, max_vocab_size: int) -> int:
    """Train PREFIX.model on the text of session files; returns its vocabulary size.

    The vocabulary is as large as the text can fill, at most `max_vocab_size`, and larger only
    where the characters alone need it. Bytes stand in for what it lacks, so every text can be
    written with it, and no text is changed. Raises the first error if no session is good.
    """
    import sentencepiece

    lines = _lines_of(paths)
    counts = Counter(character for line in lines for character in line)
    num_characters = min(len(counts), _MAX_DISTINCT_CHARACTERS)
    kept = sum(count for _, count in counts.most_common(num_characters)) / counts.total()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=prefix,
        vocab_size=max(max_vocab_size, _NUM_RESERVED_PIECES + 2 * num_characters),
        hard_vocab_limit=False,
        character_coverage=kept,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        control_symbols=list(CONTROL_SYMBOLS),
        num_threads=2,  # fixed, since the result may depend on it
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    return int(processor.vocab_size())


def _lines_of(paths: Sequence[str]) -> list[str]:
    """The lines of the first messages, long ones cut; raises the first error if all are bad."""
    lines = []
    num_characters = 0
    first_error = None
    for session in read_sessions(paths):
        if isinstance(session, SessionError):
            first_error = first_error or session
            continue
        for message in session.messages:
            num_characters += len(message.content)
            for line in message.content.splitlines():
                for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                    lines.append(line[start : start + _MAX_LINE_CHARACTERS])
        if num_characters >= _MAX_TEXT_CHARACTERS:
            break
    if not lines and first_error is not None:
        raise first_error
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_multiturn.demo")
    steps = parser.add_subparsers(dest="step", required=True)

    corpus = steps.add_parser("corpus", help="write the demo corpus")
    corpus.add_argument("--output", type=Path, required=True, metavar="JSONL")
    corpus.add_argument("--sessions", type=int, default=6000, metavar="N")
    corpus.add_argument("--seed", type=int, default=0)

    tokenizer = steps.add_parser("tokenizer", help="train a SentencePiece tokenizer")
    tokenizer.add_argument("--input", nargs="+", required=True, metavar="FILE")
    tokenizer.add_argument("--output-prefix", required=True, metavar="PREFIX")
    tokenizer.add_argument("--max-vocab-size", type=int, default=2000, metavar="N")

    steps.add_parser("progress", help="read Megatron's log from stdin, show the iterations")

    summary = steps.add_parser("summary", help="what the training reached")
    summary.add_argument("--log", type=Path, required=True, metavar="FILE")
    summary.add_argument("--data-prefix", required=True, metavar="PREFIX")
    summary.add_argument("--cache", type=Path, required=True, metavar="FOLDER")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one step; exits with status 1 and a message on an error the user can put right."""
    args = _parser().parse_args(argv)
    try:
        if args.step == "corpus":
            write_corpus(args.output, args.sessions, seed=args.seed)
            print(f"{args.sessions:,} sessions in {args.output}")
        elif args.step == "tokenizer":
            size = train_tokenizer(
                args.input, args.output_prefix, max_vocab_size=args.max_vocab_size
            )
            print(f"{size:,} pieces in {args.output_prefix}.model")
        elif args.step == "progress":
            for line in progress_lines(sys.stdin):
                print(line, flush=True)
        else:
            print(summarize(args.log, data_prefix=args.data_prefix, cache=args.cache))
    except MultiTurnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
