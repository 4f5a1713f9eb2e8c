"""Preprocessing at speed, beside the tokenizer libraries by themselves and Megatron's own tools.

    python benchmarks/preprocess.py --bpe FOLDER --sentencepiece FILE.model --data A.jsonl \\
        --megatron-lm MEGATRON-LM --megatron-lm-fast A-NEWER-MEGATRON-LM

Sections:
    fast    the whole tool with gigatoken, beside gigatoken's own encode_batch on all messages at
            once (first and second call of a process), and Megatron's gigatoken tool
    slow    the whole tool with the tokenizer's own library, beside that library's batch encoder
            on all messages at once; with gigatoken, beside Megatron's preprocess_data.py
    memory  the most that all processes of the tool hold, for a small and a large input

A throughput is of the UTF-8 text of the messages, the same count for all. The variants take
turns; a ratio is of one round, the best of the rounds come after. Without --data the corpus is
made up; --megabytes and its like grow a corpus by changed copies of itself.
"""

import argparse
import os
import platform
import random
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import measuring
from chat_corpus import Corpus, generated_sessions, join_sessions, read_sessions, write_corpus
from preprocess_variants import (
    Measured,
    TokenizerChoice,
    Variant,
    our_tool,
    raw_library,
    stock_gigatoken_tool,
    stock_tool,
)

SECTIONS = ("fast", "slow", "memory")
_LIBRARIES = ("gigatoken", "tokenizers", "sentencepiece", "megatron-core", "torch", "numpy")
OURS, OURS_REFERENCE = "ours, gigatoken", "ours, reference"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--bpe", metavar="FOLDER", help="with the tokenizer.json of a BPE")
    parser.add_argument("--bpe-template", default="chatml")
    parser.add_argument("--sentencepiece", metavar="FILE", help="a SentencePiece .model")
    parser.add_argument("--sentencepiece-template", default="firefly")
    parser.add_argument("--data", nargs="+", metavar="FILE", help='JSONL of {"messages": [...]}')
    parser.add_argument("--sessions", type=int, default=400, help="made up, without --data")
    parser.add_argument("--min-turns", type=int, default=10, help="shorter sessions are joined")
    parser.add_argument(
        "--megabytes",
        type=float,
        nargs="+",
        default=[0.0],
        help="of text, for `fast`; 0: the corpus as it is (default)",
    )
    parser.add_argument("--slow-megabytes", type=float, default=0.0, help="the same for `slow`")
    parser.add_argument(
        "--memory-megabytes", type=float, nargs=2, default=[1.0, 4.0], help="for `memory`"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, help="let all use so many (default: all there are)")
    parser.add_argument(
        "--megatron-lm",
        type=Path,
        metavar="PATH",
        default=os.environ.get("MEGATRON_LM_PATH"),
        help="a Megatron-LM checkout, for its preprocess_data.py (default: MEGATRON_LM_PATH)",
    )
    parser.add_argument(
        "--megatron-lm-fast",
        type=Path,
        metavar="PATH",
        help="one that has preprocess_data_fast.py, if the other has not",
    )
    parser.add_argument("--folder", type=Path, help="for corpora and what is made of them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    choices = {}
    if args.bpe:
        choices["BPE"] = TokenizerChoice(model=args.bpe, template=args.bpe_template)
    if args.sentencepiece:
        choices["SentencePiece"] = TokenizerChoice(
            model=args.sentencepiece, template=args.sentencepiece_template
        )
    if not choices:
        parser.error("pass --bpe or --sentencepiece: what is to be encoded with?")
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    os.environ["HF_HUB_OFFLINE"] = "1"
    _say_where()
    sessions = read_sessions(args.data) if args.data else generated_sessions(args.sessions)
    sessions = join_sessions(sessions, args.min_turns)
    random.Random(0).shuffle(sessions)  # the head of it shall be like all of it
    if not sessions:
        parser.error(f"there are not --min-turns {args.min_turns} answers in all sessions")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        for section in SECTIONS:
            if section not in args.sections:
                continue
            sizes = {
                "fast": args.megabytes,
                "slow": [args.slow_megabytes],
                "memory": args.memory_megabytes,
            }[section]
            for size in sizes:
                corpus = write_corpus(folder / f"{section}-{size:g}", sessions, int(size * 1e6))
                for kind, choice in choices.items():
                    report(section, kind, choice, corpus, args, folder)
                corpus.sessions.unlink()
                corpus.joined.unlink()


def report(
    section: str,
    kind: str,
    choice: TokenizerChoice,
    corpus: Corpus,
    args: argparse.Namespace,
    folder: Path,
) -> None:
    """Measure and print a section for a tokenizer."""
    print(
        f"\n{section}, {kind}, {choice.template}: {len(corpus.text_bytes):,} sessions, "
        f"{corpus.num_bytes / 1e6:,.1f} MB of text; load {os.getloadavg()[0]:.1f}\n"
    )
    if section == "memory":
        report_memory(corpus, choice, folder)
        return
    fast = section == "fast"
    rounds = measure(
        (fast_variants if fast else slow_variants)(corpus, choice, args, folder), args.rounds
    )
    if fast:
        pairs = [
            (OURS, peer) for peer in ("gigatoken, cold", "gigatoken, warm", "megatron, gigatoken")
        ]
    else:
        pairs = [(OURS_REFERENCE, choice.library), (OURS, "megatron")]
    print("\n".join([*ratio_lines(pairs, rounds), "", *best_lines(rounds)]), flush=True)


def fast_variants(
    corpus: Corpus, choice: TokenizerChoice, args: argparse.Namespace, folder: Path
) -> list[Variant]:
    variants: list[Variant] = [
        lambda: raw_library(corpus, choice, "gigatoken"),
        lambda: {OURS: our_tool(corpus, choice, "gigatoken", folder)[0]},
    ]
    checkout = checkout_with("preprocess_data_fast.py", args.megatron_lm_fast, args.megatron_lm)
    # Its reading of whole files is made for no other kind of tokenizer.
    if checkout is not None and not choice.is_sentencepiece:
        variants.append(lambda: stock_gigatoken_tool(corpus, choice, checkout, folder))
    return variants


def slow_variants(
    corpus: Corpus, choice: TokenizerChoice, args: argparse.Namespace, folder: Path
) -> list[Variant]:
    variants: list[Variant] = [
        lambda: raw_library(corpus, choice, choice.library),
        lambda: {OURS_REFERENCE: our_tool(corpus, choice, "reference", folder)[0]},
    ]
    checkout = checkout_with("preprocess_data.py", args.megatron_lm)
    if checkout is not None:
        variants += [
            lambda: stock_tool(corpus, choice, checkout, folder),
            lambda: {OURS: our_tool(corpus, choice, "gigatoken", folder)[0]},
        ]
    return variants


def checkout_with(tool: str, *checkouts: Path | None) -> Path | None:
    """The first of the checkouts that has the tool; says so if none has."""
    for checkout in checkouts:
        if checkout is not None and (Path(checkout) / "tools" / tool).is_file():
            return Path(checkout).resolve()
    print(f"(no checkout of Megatron-LM with tools/{tool} was passed)")
    return None


def measure(variants: Sequence[Variant], num_rounds: int) -> list[dict[str, Measured]]:
    """What the variants did in each round, by name; they take turns at being the first."""
    rounds = []
    for number in range(num_rounds):
        first = number % len(variants)
        measured: dict[str, Measured] = {}
        for variant in [*variants[first:], *variants[:first]]:
            measured |= variant()
        rounds.append(measured)
    return rounds


def ratio_lines(
    pairs: Sequence[tuple[str, str]], rounds: Sequence[Mapping[str, Measured]]
) -> list[str]:
    """A table of throughput against throughput, of each pair whose variants both ran."""
    lines = ["| throughput of | against | best / best | each round | start-up included, best |"]
    lines += ["|---|---|---|---|---|"]
    for one, other in pairs:
        if other not in rounds[0]:
            continue
        each = [r[one].mb_per_second / r[other].mb_per_second for r in rounds]
        best = _most(rounds, one) / _most(rounds, other)
        walls = [[r[name].wall_seconds for r in rounds] for name in (one, other)]
        ours, theirs = ([wall for wall in side if wall is not None] for side in walls)
        whole = f"{min(theirs) / min(ours):.2f}" if ours and theirs else ""
        in_rounds = ", ".join(f"{ratio:.2f}" for ratio in each)
        lines.append(f"| {one} | {other} | **{best:.2f}** | {in_rounds} | {whole} |")
    return lines


def best_lines(rounds: Sequence[Mapping[str, Measured]]) -> list[str]:
    """A table of the best that each variant reached, each figure for itself."""
    lines = ["| | MB/s | work, s | start-up, s | whole, s | first line on stderr, s |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in rounds[0]:
        cells = [f"{_most(rounds, name):.1f}"]
        for field in ("work_seconds", "start_seconds", "wall_seconds", "first_line_seconds"):
            values = [getattr(measured[name], field) for measured in rounds]
            cells.append("" if values[0] is None else f"{min(values):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _most(rounds: Sequence[Mapping[str, Measured]], name: str) -> float:
    return max(measured[name].mb_per_second for measured in rounds)


def report_memory(corpus: Corpus, choice: TokenizerChoice, folder: Path) -> None:
    measured, ran = our_tool(corpus, choice, "gigatoken", folder, memory=True)
    print(
        f"{corpus.sessions.stat().st_size / 1e6:,.1f} MB of input: peak "
        f"{ran.peak_bytes / 1e6:,.0f} MB in all processes together, {ran.peak_rss / 1e6:,.0f} MB "
        f"with shared pages counted in each, {measured.mb_per_second:.1f} MB/s while watched",
        flush=True,
    )


def _say_where() -> None:
    print(f"{measuring.processor()}, {len(os.sched_getaffinity(0))} cores,", end=" ")
    print(f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    versions = []
    for library in _LIBRARIES:
        try:
            versions.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            versions.append(f"no {library}")
    print(", ".join(versions))


if __name__ == "__main__":
    main()
