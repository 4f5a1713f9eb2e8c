"""How fast packed rows train, beside stock Megatron and what people do without packing.

    python benchmarks/train_throughput.py --lengths smile --model 1.3b \\
        --megatron-script .../pretrain_gpt.py --seq-length 4096 16384 \\
        --micro-batch-size 4 1 --global-batch-size 32 8

Trains every variant one after the other on the same GPU, through the plugin's own runner, and
prints ratios first. Sessions longer than a row are cut in the same way (--long-session) in every
variant; where split samples are cut, each keeps its own turn. `stock` runs the script's own
datasets and forward step, with Transformer Engine unchanged, and without it (--transformer-impl
local, which has no attention that trains on a GPU) with this package's torch kernel over whole
rows, as packed rows then have unless --packed-attention says otherwise; without --megatron-script
it is left out. All variants get --no-check-for-nan-in-loss-and-grad,
a check that waits for the device in every micro-batch.

    python benchmarks/train_throughput.py --write-lengths PREFIX > FILE

writes the lengths of a preprocessed dataset's sessions, see `session_lengths.py`.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# This checkout's package, installed or not.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from session_lengths import (
    draw_sessions,
    format_lengths,
    known_lengths,
    read_lengths,
    sample_sessions,
)
from throughput_data import (
    Datasets,
    EpochCounts,
    epoch_counts,
    mean_session_positions,
    write_datasets,
)
from throughput_flags import MODELS, RowSizes, build_parser, check_flags, command_of, row_sizes
from throughput_jobs import JobError, run_in_turn
from throughput_table import (
    Bounds,
    Measures,
    bounds_of,
    legend_lines,
    measures_of,
    ratio_lines,
    ratios,
    table_lines,
)

from megatron_multiturn.encoding import EncodedSession
from megatron_multiturn.errors import MultiTurnError
from megatron_multiturn.store import SessionStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A variant that has been trained."""

    sequence_length: int
    variant: str
    command: list[str]
    record: dict[str, Any]  # see `measured_training.measure`
    measures: Measures


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the variants are compared at: rows of one length."""

    rows: RowSizes
    epochs: dict[str, EpochCounts]  # by variant; stock has none
    bounds: Bounds


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit code, 1 if a run failed or nothing could be measured."""
    arguments = sys.argv[1:] if argv is None else argv
    args = build_parser((__doc__ or "").split("\n")[0]).parse_args(arguments)
    try:
        if args.write_lengths:
            write_lengths(args.write_lengths, args.sessions, args.seed)
            return 0
        check_flags(args)
        with tempfile.TemporaryDirectory() as folder:
            return compare(args, Path(folder), shlex.join(arguments))
    except MultiTurnError as error:
        print(f"train_throughput: error: {error}", file=sys.stderr)
        return 1


def write_lengths(prefix: str, num_sessions: int, seed: int) -> None:
    """Print a lengths file of sessions drawn from a dataset."""
    store = SessionStore.open(prefix)
    counts, sources = store.manifest.counts, store.manifest.inputs
    names = ", ".join(f"{Path(source.path).parent.name}/messages" for source in sources)
    drawn = min(num_sessions, store.num_sessions)
    print(
        f"# Lengths of {drawn:,} sessions drawn from the {counts.sessions:,} of {names or prefix}"
    )
    print(
        f"# with the template {store.manifest.template.name} and a "
        f"{store.manifest.tokenizer.type} of {store.manifest.tokenizer.vocab_size:,} tokens."
    )
    print("# Context and target segments by turns, see benchmarks/session_lengths.py. Made by")
    print(
        f"# train_throughput.py --write-lengths {Path(prefix).name} --sessions {num_sessions} "
        f"--seed {seed}"
    )
    for session in sample_sessions(store, num_sessions, seed):
        print(format_lengths(session))


def compare(args: argparse.Namespace, folder: Path, command_line: str) -> int:
    """Train all variants, print and write the numbers; the exit code."""
    all_rows = row_sizes(args)
    sessions, vocab_size = _sessions(args)
    datasets = write_datasets(
        folder,
        sessions,
        vocab_size=vocab_size,
        stock_row_length=max(rows.sequence_length for rows in all_rows),
        num_stock_rows=(args.warmup_steps + args.steps)
        * max(rows.global_batch_size for rows in all_rows),
        seed=args.seed,
    )
    comparisons = {
        rows.sequence_length: _prepare(rows, datasets, args.long_session) for rows in all_rows
    }
    commands = {
        (rows.sequence_length, variant): command_of(
            variant,
            args,
            rows,
            datasets,
            vocab_size=vocab_size,
            cache_folder=folder / f"cache-{rows.sequence_length}-{variant}",
        )
        for rows in all_rows
        for variant in args.variants
        if variant != "stock" or args.megatron_script
    }
    if "stock" in args.variants and not args.megatron_script:
        print("stock is left out: it needs --megatron-script\n", flush=True)
    runs = train_all(commands, comparisons, args, folder)
    if runs:
        report(args, command_line, comparisons, runs)
    return 0 if len(runs) == len(commands) > 0 else 1


def train_all(
    commands: dict[tuple[int, str], list[str]],
    comparisons: dict[int, Comparison],
    args: argparse.Namespace,
    folder: Path,
) -> list[Run]:
    """The runs that ended well; of the others, the end of the log on stderr.

    commands: by sequence length and variant.
    """
    log_folder = args.log_folder or folder / "logs"
    log_folder.mkdir(parents=True, exist_ok=True)
    outcomes = run_in_turn(
        {f"{length}-{variant}": command for (length, variant), command in commands.items()},
        work_folder=folder,
        log_folder=log_folder,
        warmup_steps=args.warmup_steps,
        timeout=args.timeout,
    )
    runs: list[Run] = []
    for (length, variant), (_, outcome) in zip(commands, outcomes, strict=True):
        if isinstance(outcome, JobError):
            print(f"{variant} at {length:,} FAILED: {outcome}\n", file=sys.stderr, flush=True)
            continue
        record = json.loads(outcome.read_text(encoding="utf-8"))
        runs.append(
            Run(
                sequence_length=length,
                variant=variant,
                command=commands[length, variant],
                record=record,
                measures=measures_of(record, comparisons[length].epochs.get(variant)),
            )
        )
        print(f"trained {variant} at {length:,}", file=sys.stderr, flush=True)
    return runs


def report(
    args: argparse.Namespace,
    command_line: str,
    comparisons: dict[int, Comparison],
    runs: list[Run],
) -> None:
    """Print the numbers, ratios first, and write them to --json."""
    rates = [run.record["matmul_flops_per_second"] for run in runs]
    matmul = max(filter(None, rates), default=None)
    found = {
        length: ratios(
            {run.variant: run.measures for run in runs if run.sequence_length == length},
            comparison.bounds,
        )
        for length, comparison in comparisons.items()
    }
    first = runs[0].record
    print(f"train_throughput.py {command_line}")
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    print(f"{first['device']}; {versions}; {first['num_parameters'] / 1e6:,.1f}M parameters")
    if matmul is not None:
        print(f"matrix products, the fastest measured after a run: {matmul / 1e12:.4g} TFLOP/s")
    print()
    for length, comparison in comparisons.items():
        print("\n".join(ratio_lines(length, found[length], comparison.bounds)))
    print()
    rows = [(run.sequence_length, run.variant, run.measures) for run in runs]
    print("\n".join([*table_lines(rows, matmul), "", *legend_lines()]))
    if args.json:
        content = {
            "command": command_line,
            "matmul_flops_per_second": matmul,
            "comparisons": [
                asdict(comparison) | {"ratios": found[length]}
                for length, comparison in comparisons.items()
            ],
            "runs": [asdict(run) for run in runs],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sessions(args: argparse.Namespace) -> tuple[Iterable[EncodedSession], int]:
    """The sessions to train on, and the size of their vocabulary."""
    if args.lengths:
        vocab_size = MODELS[args.model].vocab_size
        path = known_lengths().get(args.lengths, Path(args.lengths))
        drawn = draw_sessions(read_lengths(path), vocab_size=vocab_size, seed=args.seed)
        return drawn, vocab_size
    store = SessionStore.open(args.data_path)
    drawn = sample_sessions(store, args.sessions, args.seed)
    return drawn, store.manifest.tokenizer.vocab_size


def _prepare(rows: RowSizes, datasets: Datasets, long_session: str) -> Comparison:
    epochs = {
        variant: epoch_counts(
            datasets.split if variant == "split" else datasets.sessions,
            sequence_length=rows.sequence_length,
            long_session=long_session,
            one_piece_a_row=variant != "packed",
        )
        for variant in ("packed", "padded", "split")
    }
    bounds = bounds_of(
        sequence_length=rows.sequence_length,
        mean_session_positions=mean_session_positions(datasets.sessions),
        packed=epochs["packed"],
        split=epochs["split"],
    )
    return Comparison(rows=rows, epochs=epochs, bounds=bounds)


if __name__ == "__main__":
    sys.exit(main())
