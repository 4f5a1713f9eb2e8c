"""Input files -> dataset: read, encode in worker processes, write in order.

The parent reads raw records and writes; workers parse, render and encode. Chunks are cut by their
bytes and come back in order, so the output does not depend on the number of workers.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

from megatron_multiturn.encoding import EncodedBatch, SessionEncoder
from megatron_multiturn.errors import ConfigError, MultiTurnError, SessionError
from megatron_multiturn.input_files import decoded_bytes
from megatron_multiturn.manifest import Counts, TemplateIdentity, describe_input
from megatron_multiturn.records import RawRecord, check_input_files, read_records
from megatron_multiturn.session_writer import SessionWriter, output_paths
from megatron_multiturn.sessions import parse_session
from megatron_multiturn.supervision import select_answers
from megatron_multiturn.templates import ChatTemplate
from megatron_multiturn.vocabulary import TokenizerIdentity

_CHUNK_BYTES = 1 << 18
_CHUNKS_PER_WORKER = 4
_PARENT_CHECK_SECONDS = 1.0
_TOTALS = (
    "num_unknown_tokens",
    "num_lossy_sessions",
    "num_recut_sessions",
    "num_open_turns",
    "num_rewritten_sessions",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to preprocess, and how."""

    inputs: tuple[str, ...]
    prefix: str
    form: str  # a key of sessions.FORMATS, or "auto"
    train_on: str  # a key of supervision.TRAIN_ON
    skip_bad_sessions: bool
    num_workers: int
    overwrite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came of it."""

    counts: Counts
    num_unknown_tokens: int
    num_lossy_sessions: int
    num_recut_sessions: int
    num_open_turns: int
    num_rewritten_sessions: int
    omits_bos: bool
    seconds: float
    rejected_path: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    records: list[RawRecord]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rejected:
    record: RawRecord
    error: SessionError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """A chunk, encoded."""

    batch: EncodedBatch
    locations: list[str]  # of the sessions of the batch
    rejected: list[_Rejected]  # in input order
    num_bytes: int


def rejected_path(prefix: str) -> str:
    return prefix + ".rejected.jsonl"


def preprocess_sessions(
    job: Job, encoder: SessionEncoder, *, tokenizer: TokenizerIdentity, template: ChatTemplate
) -> Summary:
    """Write the dataset, and PREFIX.rejected.jsonl if sessions were left out.

    Raises ConfigError for what makes the run impossible, SessionError for the first bad session
    unless they are skipped; nothing is written then.
    """
    check_input_files(list(job.inputs))
    check_outputs(job)
    started = time.perf_counter()
    identity = TemplateIdentity(name=template.name, content_hash=template.content_hash)
    writer = SessionWriter(job.prefix, tokenizer=tokenizer, template=identity)
    rejected: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    first_error: SessionError | None = None
    with (
        writer,
        _rejected_file(job) as rejected_file,
        contextlib.closing(_encode_all(job, encoder)) as chunks,
    ):
        for chunk in chunks:
            for bad in chunk.rejected:
                if not job.skip_bad_sessions:
                    raise bad.error
                first_error = first_error or bad.error
                rejected[bad.error.reason] += 1
                rejected_file.write(_rejected_line(bad))
            writer.add(chunk.batch, chunk.locations)
            totals.update(chunk.batch.totals)
        if not writer.counts.sessions:
            raise ConfigError(
                f"all {rejected.total():,} sessions were rejected, so there is nothing to write; "
                f"the first: {first_error}"
            )
        writer.describe(rejected=rejected, inputs=[describe_input(path) for path in job.inputs])
    return Summary(
        counts=writer.counts,
        **{name: totals[name] for name in _TOTALS},
        omits_bos=encoder.omits_bos,
        seconds=time.perf_counter() - started,
        rejected_path=rejected_path(job.prefix) if rejected else None,
    )


def check_outputs(job: Job) -> None:
    """Raise ConfigError if an output is already there and may not be replaced."""
    if job.prefix.endswith(os.sep) or os.path.isdir(job.prefix):
        raise ConfigError(
            f"--output-prefix {job.prefix}: is a folder; name the files in it too, for example "
            f"{os.path.join(job.prefix, 'sessions')}"
        )
    for path in (*output_paths(job.prefix), rejected_path(job.prefix)):
        if os.path.exists(path):
            if not job.overwrite:
                raise ConfigError(
                    f"{path}: is already there; choose another --output-prefix or pass --overwrite"
                )
            if any(os.path.samefile(path, source) for source in job.inputs):
                raise ConfigError(
                    f"{path}: is both input and output; choose another --output-prefix"
                )


@contextlib.contextmanager
def _rejected_file(job: Job) -> Iterator[TextIO]:
    """The file of rejected sessions; it appears if the block ends well and wrote to it."""
    path = rejected_path(job.prefix)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            num_bytes = stream.tell()
        if num_bytes:
            os.replace(temporary, path)
        elif job.overwrite:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _rejected_line(bad: _Rejected) -> str:
    entry = {
        "location": bad.record.location,
        "reason": bad.error.reason,
        "message": str(bad.error),
        "record": bad.record.data.decode("utf-8", "backslashreplace"),
    }
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _encode_all(job: Job, encoder: SessionEncoder) -> Generator[_Encoded]:
    """The encoded chunks of all files, in order, with a progress bar on a terminal."""
    work = _Work(encoder=encoder, form=job.form, train_on=job.train_on)
    with contextlib.ExitStack() as stack:
        # The pool forks first: the bar starts a thread.
        encoded = stack.enter_context(contextlib.closing(_map_in_order(work, job)))
        bar = stack.enter_context(
            tqdm(
                total=decoded_bytes(job.inputs),
                unit="B",
                unit_scale=True,
                disable=None,
                desc="preprocess",
            )
        )
        num_sessions = 0
        for chunk in encoded:
            yield chunk
            num_sessions += chunk.batch.num_sessions
            bar.set_postfix_str(f"{num_sessions:,} sessions", refresh=False)
            bar.update(chunk.num_bytes)


def _map_in_order(work: "_Work", job: Job) -> Generator[_Encoded]:
    chunks = _cut_chunks(record for path in job.inputs for record in read_records(path))
    if job.num_workers == 1:
        yield from map(work.encode_chunk, chunks)
        return
    pool = ProcessPoolExecutor(
        job.num_workers,
        # A forked worker has the tokenizer already; Megatron runs where there is fork.
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(work, os.getpid()),
    )
    try:
        pending: deque[Future[_Encoded]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) >= job.num_workers * _CHUNKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise MultiTurnError(
            "a worker process was killed, perhaps for want of memory; nothing was written: try "
            f"again with fewer --workers than {job.num_workers}, or, if a stack that ends in "
            "<template> stands above, with another chat template"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cut_chunks(records: Iterable[RawRecord]) -> Iterator[_Chunk]:
    held: list[RawRecord] = []
    num_bytes = 0
    for record in records:
        held.append(record)
        num_bytes += len(record.data) + 1
        if num_bytes >= _CHUNK_BYTES:
            yield _Chunk(records=held, num_bytes=num_bytes)
            held, num_bytes = [], 0
    if held:
        yield _Chunk(records=held, num_bytes=num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a worker does with a chunk."""

    encoder: SessionEncoder
    form: str
    train_on: str

    def encode_chunk(self, chunk: _Chunk) -> _Encoded:
        sessions = []
        errors: dict[int, SessionError] = {}  # by number of the record
        parsed: list[int] = []
        for number, record in enumerate(chunk.records):
            try:
                session = parse_session(record, form=self.form)
                sessions.append(select_answers(session, self.train_on))
                parsed.append(number)
            except SessionError as error:
                errors[number] = error
        batch = self.encoder.encode(sessions)
        errors |= {parsed[source]: error for source, error in batch.errors}
        return _Encoded(
            batch=batch,
            locations=[sessions[source].location for source in batch.sources.tolist()],
            rejected=[
                _Rejected(record=chunk.records[number], error=errors[number])
                for number in sorted(errors)
            ],
            num_bytes=chunk.num_bytes,
        )


_worker_work: _Work | None = None


def _start_worker(work: _Work, parent: int) -> None:
    global _worker_work
    _worker_work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent cleans up on either signal, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot end its workers, which would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def _encode_in_worker(chunk: _Chunk) -> _Encoded:
    assert _worker_work is not None
    return _worker_work.encode_chunk(chunk)
