"""--shard I/N: which part of the input a run reads, and what its output is called.

    --shard 0/4, --shard 1/4, ...     as SLURM_ARRAY_TASK_ID counts

The input is one run of bytes, file after file, cut into N equal parts. A plain JSONL file is cut
at the end of a line near there, a Parquet file between row groups; any other file belongs as a
whole to the shard in which it begins.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.input_files import is_parquet
from megatron_multiturn.parquet_records import num_row_groups
from megatron_multiturn.record_blocks import FilePart
from megatron_multiturn.records import is_cuttable

_MAX_SHARDS = 99_999


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One of `count` parts of a run, numbered from 0."""

    index: int
    count: int

    def prefix_of(self, prefix: str) -> str:
        """What the outputs of this shard of PREFIX are called."""
        return f"{prefix}.shard-{self.index:05}-of-{self.count:05}"


def parse_shard(text: str) -> Shard:
    """The shard that --shard I/N names; ConfigError if there is no such shard."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None:
        raise ConfigError(f"--shard {text}: must be I/N, for example 0/4 for the first of four")
    index, count = int(found[1]), int(found[2])
    if not 1 <= count <= _MAX_SHARDS:
        raise ConfigError(f"--shard {text}: there are 1 to {_MAX_SHARDS:,} shards")
    if index >= count:
        raise ConfigError(
            f"--shard {text}: shards count from 0, so the last is {count - 1}/{count}"
        )
    return Shard(index=index, count=count)


def cut_shard(paths: Sequence[str], shard: Shard | None) -> list[FilePart]:
    """The parts of the files that a shard reads, in order; without a shard, all files.

    The parts of all shards, in order, hold every record once.
    """
    if shard is None:
        return [FilePart.whole(path) for path in paths]
    sizes = [os.path.getsize(path) for path in paths]
    total = sum(sizes)
    begin = total * shard.index // shard.count
    end = total * (shard.index + 1) // shard.count
    parts: list[FilePart] = []
    offset = 0
    for path, size in zip(paths, sizes, strict=True):
        low, high = begin - offset, end - offset  # of the shard, in this file
        offset += size
        if high <= 0 or low >= size:
            continue
        part = _cut_file(path, size, max(0, low), min(size, high))
        if part is not None:
            parts.append(part)
    return parts


def _cut_file(path: str, size: int, low: int, high: int) -> FilePart | None:
    """What of a file belongs to its bytes low to high - 1."""
    if low == 0 and high == size:
        return FilePart.whole(path)
    if is_parquet(path):
        count = num_row_groups(path)
        # Group g of G begins at about size * g // G: low <= size * g // G < high.
        first, stop = -(-low * count // size), -(-high * count // size)
        if first == stop:
            return None
        return FilePart(path=path, begin=first, end=stop, raw_begin=low, raw_end=high)
    if is_cuttable(path):
        end = None if high == size else high
        return FilePart(path=path, begin=low, end=end, raw_begin=low, raw_end=high)
    return FilePart.whole(path) if low == 0 else None
