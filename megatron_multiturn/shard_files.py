"""PREFIX.shard-I-of-N.shard.json: what a shard is, so that it is merged with its like alone."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_multiturn._version import __version__
from megatron_multiturn.errors import DatasetError
from megatron_multiturn.manifest import FORMAT_VERSION, Counts, TemplateIdentity, file_hash
from megatron_multiturn.session_writer import SessionWriter
from megatron_multiturn.shards import Shard
from megatron_multiturn.tally import LengthHistogram, Tally
from megatron_multiturn.unfinished import unfinished_folder
from megatron_multiturn.vocabulary import TokenizerIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """What is known of a shard; written last, so where it lies the shard is complete."""

    format_version: int
    tool_version: str
    index: int
    count: int
    settings: dict[str, Any]  # equal for all shards of a run
    tokenizer: TokenizerIdentity
    template: TemplateIdentity
    counts: Counts
    tally: Tally
    lengths: list[list[int]]  # (tokens, sessions) pairs
    turn_weights: list[float]
    part_lines: dict[str, int]  # of files that are cut: the lines that this shard has
    bin_bytes: int
    idx_bytes: int
    idx_sha256: str
    rejected_bytes: int

    @classmethod
    def of_run(
        cls,
        writer: SessionWriter,
        shard: Shard,
        *,
        tally: Tally,
        settings: Mapping[str, Any],
        part_lines: Mapping[str, int],
        tokenizer: TokenizerIdentity,
        template: TemplateIdentity,
    ) -> "ShardFile":
        """Finish the index of a shard, and describe the shard."""
        idx_bytes, idx_sha256 = writer.finish_index()
        columns = writer.columns
        writer.describe(rejected=tally.rejected_counts(), inputs=[])
        histogram = LengthHistogram(columns.blocks("session_lengths", np.int32))
        return cls(
            format_version=FORMAT_VERSION,
            tool_version=__version__,
            index=shard.index,
            count=shard.count,
            settings=dict(settings),
            tokenizer=tokenizer,
            template=template,
            counts=writer.counts,
            tally=tally,
            lengths=histogram.pairs(),
            turn_weights=list(writer.state().turn_weights),
            part_lines=dict(part_lines),
            bin_bytes=os.path.getsize(columns.path("tokens")),
            idx_bytes=idx_bytes,
            idx_sha256=idx_sha256,
            rejected_bytes=os.path.getsize(columns.path("rejected")),
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n"


def read_shard(prefix: str) -> ShardFile:
    """The complete shard at a prefix; raises DatasetError if it is missing or not whole."""
    path = prefix + ".shard.json"
    try:
        value = json.loads(Path(path).read_bytes())
        if value["format_version"] != FORMAT_VERSION:
            raise DatasetError(
                f"{path}: format version {value['format_version']!r}, but this version of the "
                f"package reads {FORMAT_VERSION}; preprocess all shards again"
            )
        shard = ShardFile(
            **value
            | {
                "tokenizer": TokenizerIdentity(**value["tokenizer"]),
                "template": TemplateIdentity(**value["template"]),
                "counts": Counts(**value["counts"]),
                "tally": Tally.from_json(value["tally"]),
            }
        )
    except FileNotFoundError:
        state = "is not finished" if os.path.isdir(unfinished_folder(prefix)) else "is missing"
        raise DatasetError(f"{prefix}: the shard {state}; run its command (again)") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f"{path}: does not describe a shard ({error}); preprocess that shard again"
        ) from None
    _check_files(prefix, shard)
    return shard


def _check_files(prefix: str, shard: ShardFile) -> None:
    wanted = {".bin": shard.bin_bytes, ".idx": shard.idx_bytes}
    if shard.rejected_bytes:
        wanted[".rejected.jsonl"] = shard.rejected_bytes
    for suffix, num_bytes in wanted.items():
        path = prefix + suffix
        found = os.path.getsize(path) if os.path.exists(path) else None
        if found != num_bytes:
            has = "is missing" if found is None else f"has {found:,} bytes"
            raise DatasetError(
                f"{path}: {has}, but the shard was written with {num_bytes:,}; preprocess that "
                "shard again"
            )
    if file_hash(prefix + ".idx") != shard.idx_sha256:
        raise DatasetError(
            f"{prefix}.idx: is not the index that the shard was written with; preprocess that "
            "shard again"
        )
