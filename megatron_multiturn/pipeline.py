"""Input files -> dataset: read, encode in worker processes, write in order, go on after a kill.

The parent reads blocks of records and writes; workers parse, render and encode. Blocks come back
in order and what they become does not depend on where they were cut, so the output is the same
for any number of workers and however often the run was killed.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_multiturn._version import __version__
from megatron_multiturn.batch_checks import session_lengths
from megatron_multiturn.encoding import SessionEncoder
from megatron_multiturn.encoding_pool import EncodedBlock, Work, encode_blocks
from megatron_multiturn.errors import ConfigError, SessionError
from megatron_multiturn.input_hashes import InputHashes
from megatron_multiturn.journal import (
    ENCODING,
    PLACING,
    JournalKeeper,
    RunState,
    journal_of,
    journal_to_go_on_from,
)
from megatron_multiturn.manifest import Counts, TemplateIdentity
from megatron_multiturn.progress import Progress
from megatron_multiturn.record_blocks import Block, FilePart, FilePlace, LineBlock
from megatron_multiturn.records import read_blocks
from megatron_multiturn.session_writer import (
    SessionWriter,
    all_output_paths,
    place_files,
    state_from_json,
)
from megatron_multiturn.shard_files import ShardFile
from megatron_multiturn.shards import Shard, cut_shard
from megatron_multiturn.spooled_columns import column_blocks
from megatron_multiturn.tally import LengthHistogram, Pace, Tally
from megatron_multiturn.unfinished import UnfinishedRun, changed_settings
from megatron_multiturn.vocabulary import TokenizerIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to preprocess, and how."""

    inputs: tuple[str, ...]
    prefix: str  # of the outputs; of a shard its own
    shard: Shard | None
    form: str  # a key of sessions.FORMATS, or "auto"
    skip_bad_sessions: bool
    num_workers: int
    overwrite: bool
    flags: Mapping[str, Any]  # all that decide what is written, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came of it."""

    counts: Counts
    tally: Tally
    lengths: LengthHistogram
    pace: Pace | None  # None: an earlier run did it all
    rejected_path: str | None


def preprocess_sessions(
    job: Job,
    encoder: SessionEncoder,
    run: UnfinishedRun,
    *,
    tokenizer: TokenizerIdentity,
    template: TemplateIdentity,
) -> Summary:
    """Write the dataset, or the shard, and PREFIX.rejected.jsonl if sessions were left out.

    run: of the job's prefix, entered. Raises ConfigError for what makes the run impossible,
    SessionError for the first bad session unless they are skipped; no dataset appears then.
    """
    settings = _settings(job, tokenizer, template)
    journal = journal_to_go_on_from(run, settings, overwrite=job.overwrite)
    progress = RunState.from_json(journal["progress"]) if journal else RunState()
    if not job.skip_bad_sessions:
        # The run before may have skipped some.
        for reason, entry in progress.tally.rejected.items():
            raise SessionError(entry.message, reason=reason)
    if journal and journal["phase"] == PLACING:
        place_files(run.folder, job.prefix)
        summary = _summary_of_journal(job, journal, progress, run)
        run.forget()
        return summary
    state = state_from_json(journal["writer"]) if journal else None
    writer = SessionWriter(
        job.prefix, tokenizer=tokenizer, template=template, folder=run.folder, state=state
    )
    started = time.perf_counter()
    before = (writer.counts, progress.tally.num_rejected, progress.raw_bytes)
    with writer, contextlib.closing(InputHashes(job.inputs)) as hashes:
        attempt = _Attempt(
            job=job, run=run, writer=writer, progress=progress, settings=settings, hashes=hashes
        )
        _encode(attempt, encoder)
        _finish(attempt, tokenizer, template)
        lengths = LengthHistogram(writer.columns.blocks("session_lengths", np.int32))
        summary = Summary(
            counts=writer.counts,
            tally=progress.tally,
            lengths=lengths,
            pace=Pace(
                seconds=time.perf_counter() - started,
                sessions=writer.counts.sessions
                - before[0].sessions
                + progress.tally.num_rejected
                - before[1],
                input_bytes=progress.raw_bytes - before[2],
                tokens=writer.counts.tokens - before[0].tokens,
            ),
            rejected_path=job.prefix + ".rejected.jsonl" if progress.tally.rejected else None,
        )
        run.write(journal_of(PLACING, settings, writer, progress))
    place_files(run.folder, job.prefix)
    run.forget()
    return summary


def check_outputs(job: Job) -> None:
    """Raise ConfigError if an output is already there and may not be replaced."""
    if job.prefix.endswith(os.sep) or os.path.isdir(job.prefix):
        raise ConfigError(
            f"--output-prefix {job.prefix}: is a folder; name the files in it too, for example "
            f"{os.path.join(job.prefix, 'sessions')}"
        )
    if not os.path.basename(job.prefix):
        raise ConfigError("--output-prefix is empty; name the files, for example data/sessions")
    for path in all_output_paths(job.prefix):
        if os.path.isdir(path):
            raise ConfigError(f"{path}: is a folder; remove it, or choose another --output-prefix")
        if os.path.exists(path):
            if not job.overwrite:
                raise ConfigError(
                    f"{path}: is already there; choose another --output-prefix or pass --overwrite"
                )
            if any(os.path.samefile(path, source) for source in job.inputs):
                raise ConfigError(
                    f"{path}: is both input and output; choose another --output-prefix"
                )


def input_stamps(inputs: Sequence[str]) -> list[list[Any]]:
    """(path, bytes, time of the last change in nanoseconds) of each file."""
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in inputs]


def _settings(job: Job, tokenizer: TokenizerIdentity, template: TemplateIdentity) -> dict[str, Any]:
    """All that decides what is written; the values as JSON would give them back."""
    return {
        **json.loads(json.dumps(job.flags)),  # a tuple comes back as a list
        "--input": input_stamps(job.inputs),
        "--shard": f"{job.shard.index}/{job.shard.count}" if job.shard else None,
        "the tokenizer": list(dataclasses.astuple(tokenizer)),
        "the template": list(dataclasses.astuple(template)),
        "the version of this package": __version__,
    }


def _summary_of_journal(
    job: Job, journal: dict[str, Any], progress: RunState, run: UnfinishedRun
) -> Summary:
    lengths = LengthHistogram(column_blocks(run.folder, "session_lengths", np.int32))
    return Summary(
        counts=Counts(**journal["counts"]),
        tally=progress.tally,
        lengths=lengths,
        pace=None,
        rejected_path=job.prefix + ".rejected.jsonl" if progress.tally.rejected else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """A run that has something left to do."""

    job: Job
    run: UnfinishedRun
    writer: SessionWriter
    progress: RunState
    settings: dict[str, Any]
    hashes: InputHashes


def _encode(attempt: _Attempt, encoder: SessionEncoder) -> None:
    """Read, encode and write the rest of the input; `progress` moves on."""
    job, writer, progress = attempt.job, attempt.writer, attempt.progress
    parts = cut_shard(job.inputs, job.shard)
    sizes = [part.raw_end - part.raw_begin for part in parts]
    work = Work(encoder=encoder, form=job.form, stops_at_error=not job.skip_bad_sessions)
    blocks = _blocks(parts, progress.part, progress.place)
    with contextlib.ExitStack() as stack:
        # The pool forks first: the bar and the journal start threads.
        encoded = stack.enter_context(
            contextlib.closing(encode_blocks(work, blocks, job.num_workers))
        )
        bar = stack.enter_context(contextlib.closing(Progress(sum(sizes), progress.raw_bytes)))
        journal = stack.enter_context(contextlib.closing(JournalKeeper(attempt.run, writer)))
        for part, block, result in encoded:
            if job.shard is None:
                attempt.hashes.start()
            if result.rejected and not job.skip_bad_sessions:
                raise result.rejected[0][1]
            _write(writer, progress.tally, result)
            progress.part, progress.place = part, block.end
            done = min(max(0, block.raw_position - parts[part].raw_begin), sizes[part])
            progress.raw_bytes = sum(sizes[:part]) + done
            if isinstance(block, LineBlock) and not parts[part].is_whole:
                progress.part_lines[block.path] = block.end.line - 1
            bar.update(progress.raw_bytes, result.batch.num_sessions + len(result.rejected))
            journal.keep(lambda: journal_of(ENCODING, attempt.settings, writer, progress))
        progress.raw_bytes = sum(sizes)


def _write(writer: SessionWriter, tally: Tally, result: EncodedBlock) -> None:
    tally.add_rejected(result.rejected)
    writer.add_rejected(result.rejected_lines)
    writer.add(result.batch, result.locations)
    tally.add_batch(result.batch, session_lengths(result.batch), result.locations)


def _blocks(
    parts: Sequence[FilePart], first: int, place: FilePlace | None
) -> Iterator[tuple[int, Block]]:
    """(number of the part, block) of the input from a place on."""
    for number in range(first, len(parts)):
        for block in read_blocks(parts[number], place):
            yield number, block
        place = None


def _finish(attempt: _Attempt, tokenizer: TokenizerIdentity, template: TemplateIdentity) -> None:
    """Make the files whole in the folder."""
    job, writer, settings = attempt.job, attempt.writer, attempt.settings
    changed = changed_settings(
        {path: stamp for path, *stamp in settings["--input"]},
        {path: stamp for path, *stamp in input_stamps(job.inputs)},
    )
    if changed:
        raise ConfigError(f"{changed[0]} file than it was when the run began; begin again")
    tally = attempt.progress.tally
    if job.shard is not None:
        shard = ShardFile.of_run(
            writer,
            job.shard,
            tally=tally,
            settings={**settings, "--shard": job.shard.count},
            part_lines=attempt.progress.part_lines,
            tokenizer=tokenizer,
            template=template,
        )
        writer.write_last("shard", shard.to_json())
        return
    if not writer.counts.sessions:
        raise ConfigError(all_rejected(tally))
    writer.describe(rejected=tally.rejected_counts(), inputs=attempt.hashes.result())
    writer.finish()


def all_rejected(tally: Tally) -> str:
    return (
        f"all {tally.num_rejected:,} sessions were rejected, so there is nothing to write; "
        f"the first: {tally.first_message}"
    )
