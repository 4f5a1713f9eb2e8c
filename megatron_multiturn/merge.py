"""megatron-multiturn-merge: the shards of a run -> PREFIX.bin, PREFIX.idx, PREFIX.json.

The files are byte for byte those of a run without shards. Lines of a file that is cut over shards
are counted in each shard from where it begins; here they get their numbers in the file.
"""

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_multiturn.errors import ConfigError, DatasetError, MultiTurnError
from megatron_multiturn.index_file import index_blocks
from megatron_multiturn.input_hashes import describe_inputs
from megatron_multiturn.pipeline import all_rejected
from megatron_multiturn.session_writer import (
    SessionWriter,
    WriterState,
    all_output_paths,
    place_files,
)
from megatron_multiturn.shard_files import ShardFile, read_shard
from megatron_multiturn.shards import Shard
from megatron_multiturn.spooled_columns import SpooledColumns
from megatron_multiturn.tally import LengthHistogram, Rejection, Tally, format_table
from megatron_multiturn.turn_weights import TurnWeights
from megatron_multiturn.unfinished import UnfinishedRun, changed_settings

_COPY_BYTES = 1 << 24
_SHARD_NAME = re.compile(r"\.shard-(\d{5})-of-(\d{5})\.")
_PLACE_IN_PART = re.compile(r"(.*):(\d+) \(from byte \d+\)", re.DOTALL)

Relocate = Callable[[str], str]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-multiturn-merge",
        description="Join the shards that megatron-multiturn-preprocess --shard I/N has written.",
    )
    parser.add_argument(
        "prefix", metavar="PREFIX", help="the --output-prefix of the shards; also of the result"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
        print(merge_shards(args.prefix, overwrite=args.overwrite))
    except (MultiTurnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def merge_shards(prefix: str, *, overwrite: bool) -> str:
    """Write the dataset; returns the closing table.

    Raises DatasetError if a shard is missing, not finished or of another run, ConfigError if the
    outputs are there or the input is not as the shards found it.
    """
    shards = find_shards(prefix)
    for path in all_output_paths(prefix):
        if os.path.exists(path) and not overwrite:
            raise ConfigError(f"{path}: is already there; pass --overwrite to replace it")
    inputs = [path for path, *_ in shards[0].settings["--input"]]
    for path, num_bytes, _ in shards[0].settings["--input"]:
        if not os.path.exists(path) or os.path.getsize(path) != num_bytes:
            raise ConfigError(
                f"{path}: is missing or not the file that the shards were made of, whose hash the "
                "manifest needs; run this in the folder that the shards were made in"
            )
    with UnfinishedRun(prefix) as run:
        if not overwrite and run.read() is not None:
            raise ConfigError(
                f"{run.folder}: is of a run without shards that was not finished; remove it, or "
                "pass --overwrite"
            )
        run.forget()
        columns = SpooledColumns(run.folder)
        tally = Tally()
        histogram = LengthHistogram()
        weights = TurnWeights()
        lines: dict[str, int] = {}  # of the files that are cut, in the shards before
        for shard in shards:
            relocate = _relocation(lines)
            _append(columns, _prefix_of(prefix, shard), shard, weights, relocate)
            tally.add(_relocated(shard.tally, relocate))
            histogram.add_pairs(shard.lengths)
            for path, num_lines in shard.part_lines.items():
                lines[path] = lines.get(path, 0) + num_lines
        state = WriterState(
            column_bytes=columns.sizes(),
            turns=sum(shard.counts.turns for shard in shards),
            target_tokens=sum(shard.counts.target_tokens for shard in shards),
            turn_weights=weights.values,
        )
        columns.close()
        if not state.column_bytes["session_ends"]:
            raise ConfigError(all_rejected(tally))
        writer = SessionWriter(
            prefix,
            tokenizer=shards[0].tokenizer,
            template=shards[0].template,
            folder=run.folder,
            state=state,
        )
        with writer:
            writer.describe(rejected=tally.rejected_counts(), inputs=describe_inputs(inputs))
            writer.finish()
        place_files(run.folder, prefix)
    rejected_path = prefix + ".rejected.jsonl" if tally.rejected else None
    title = f"{prefix}: {len(shards)} shards, which can be removed now"
    return format_table(title, writer.counts, tally, histogram, rejected_path=rejected_path)


def find_shards(prefix: str) -> list[ShardFile]:
    """The shards at a prefix, in order; raises DatasetError unless they are whole and alike."""
    found = set()
    for path in glob.glob(glob.escape(prefix) + ".shard-*"):
        match = _SHARD_NAME.match(path[len(prefix) :])
        if match:
            found.add(int(match[2]))
    if not found:
        raise DatasetError(
            f"{prefix}: there is no {prefix}.shard-00000-of-....; pass the --output-prefix of the "
            "shards"
        )
    if len(found) > 1:
        counts = " and of ".join(f"{count:,}" for count in sorted(found))
        raise DatasetError(
            f"{prefix}: there are shards of {counts}; remove those of the run that is not meant"
        )
    (count,) = found
    shards = []
    errors = []
    for index in range(count):
        try:
            shards.append(read_shard(Shard(index=index, count=count).prefix_of(prefix)))
        except DatasetError as error:
            errors.append(str(error))
    if errors:
        more = f" (and {len(errors) - 1:,} more shards)" if len(errors) > 1 else ""
        raise DatasetError(errors[0] + more)
    for shard in shards[1:]:
        changes = changed_settings(shards[0].settings, shard.settings)
        if changes:
            raise DatasetError(
                f"{_prefix_of(prefix, shard)}: is of another run than shard 0: "
                f"{'; '.join(changes)}; preprocess it again with the flags and files of the others"
            )
    return shards


def _prefix_of(prefix: str, shard: ShardFile) -> str:
    return Shard(index=shard.index, count=shard.count).prefix_of(prefix)


def _append(
    columns: SpooledColumns,
    prefix: str,
    shard: ShardFile,
    weights: TurnWeights,
    relocate: Relocate,
) -> None:
    """Put a shard behind those before it."""
    num_segments = columns.sizes()["modes"]
    with Path(prefix + ".bin").open("rb") as stream:
        while data := stream.read(_COPY_BYTES):
            columns.append("tokens", data)
    path = prefix + ".idx"
    for lengths in index_blocks(path, "segment_lengths"):
        columns.append("segment_lengths", lengths)
    for modes in index_blocks(path, "modes"):
        columns.append("modes", weights.renumber(modes, shard.turn_weights))
    begun = False
    for firsts in index_blocks(path, "first_segments"):
        ends = firsts if begun else firsts[1:]
        begun = True
        columns.append("session_ends", ends.astype(np.int64) + num_segments)
    if shard.rejected_bytes:
        with Path(prefix + ".rejected.jsonl").open("rb") as stream:
            for line in stream:
                columns.append("rejected", _relocated_line(line, relocate))


def _relocation(lines: dict[str, int]) -> Relocate:
    """Turns a place in a part of a file into the place in the file."""
    before = dict(lines)

    def relocate(location: str) -> str:
        match = _PLACE_IN_PART.fullmatch(location)
        if match is None:
            return location
        return f"{match[1]}:{int(match[2]) + before.get(match[1], 0)}"

    return relocate


def _relocated_line(line: bytes, relocate: Relocate) -> bytes:
    entry = json.loads(line)
    location = entry["location"]
    place = relocate(location)
    if place == location:
        return line
    entry |= {"location": place, "message": entry["message"].replace(location, place)}
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _relocated(tally: Tally, relocate: Relocate) -> Tally:
    return Tally(
        rejected={
            reason: Rejection(
                count=entry.count,
                location=relocate(entry.location),
                message=entry.message.replace(entry.location, relocate(entry.location)),
            )
            for reason, entry in tally.rejected.items()
        },
        totals=tally.totals,
        longest_tokens=tally.longest_tokens,
        longest_location=relocate(tally.longest_location),
    )


if __name__ == "__main__":
    sys.exit(main())
