"""Blocks of records -> encoded batches, in worker processes, in the order of the input."""

import gc
import json
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import numpy as np

from megatron_multiturn.encoding import EncodedBatch, SessionEncoder
from megatron_multiturn.errors import MultiTurnError, SessionError
from megatron_multiturn.held_signals import HeldSignals
from megatron_multiturn.plain_chats import PlainChat, read_plain_chat
from megatron_multiturn.record_blocks import Block, RawRecord
from megatron_multiturn.records import read_records
from megatron_multiturn.renewed_process import RenewedProcess, watch_parent
from megatron_multiturn.sessions import Session, parse_session

_BLOCKS_PER_WORKER = 4
_SIGNAL_SECONDS = 0.2  # after which one acts
_SAMPLED_FILES = 16
_SAMPLED_BYTES = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBlock:
    """What became of the records of a block."""

    batch: EncodedBatch
    locations: list[str]  # of the sessions of the batch
    rejected: list[tuple[str, SessionError]]  # (location, why), in input order
    rejected_lines: bytes  # for the file of rejected sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is done with a block."""

    encoder: SessionEncoder
    form: str
    stops_at_error: bool = False  # if a bad session ends the run, none behind it matters

    def encode_block(self, block: Block) -> EncodedBlock:
        sessions: list[Session | PlainChat] = []
        records: list[RawRecord] = []  # of the sessions
        bad: list[tuple[int, RawRecord, SessionError]] = []  # with the number of the record
        numbers: list[int] = []
        for number, record in enumerate(block.records()):
            try:
                sessions.append(
                    read_plain_chat(record, self.form) or parse_session(record, form=self.form)
                )
            except SessionError as error:
                bad.append((number, record, error))
            else:
                records.append(record)
                numbers.append(number)
        batch = self.encoder.encode(sessions, stops_at_error=self.stops_at_error)
        bad += [(numbers[source], records[source], error) for source, error in batch.errors]
        bad.sort(key=lambda entry: entry[0])
        return EncodedBlock(
            batch=_narrowed(batch),
            locations=[records[source].location for source in batch.sources.tolist()],
            rejected=[(record.location, error) for _, record, error in bad],
            rejected_lines=b"".join(rejected_line(record, error) for _, record, error in bad),
        )


def sample_texts(inputs: Sequence[str], form: str) -> list[str]:
    """Some texts of the input, from the heads of some files."""
    texts: list[str] = []
    step = -(-len(inputs) // _SAMPLED_FILES)
    chosen = inputs[::step]
    for path in chosen:
        num_bytes = 0
        for record in read_records(path):
            num_bytes += len(record.data)
            try:
                session = parse_session(record, form=form)
            except SessionError:
                continue
            texts += [message.content for message in session.messages]
            if num_bytes > _SAMPLED_BYTES // len(chosen):
                break
    return texts


def rejected_line(record: RawRecord, error: SessionError) -> bytes:
    """The line of a rejected session: why, and the record as it was read."""
    entry = {
        "location": record.location,
        "reason": error.reason,
        "message": str(error),
        "record": record.data.decode("utf-8", "backslashreplace"),
    }
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def encode_blocks[Tag](
    work: Work, blocks: Iterator[tuple[Tag, Block]], num_workers: int
) -> Generator[tuple[Tag, Block, EncodedBlock]]:
    """Every block with what became of it, in order, whatever the number of workers.

    Raises MultiTurnError if a worker is killed.
    """
    if num_workers == 1:
        for tag, block in blocks:
            yield tag, block, work.encode_block(block)
        return
    # What is there already is not looked through in the workers, which would copy its pages.
    gc.freeze()
    with HeldSignals() as signals:
        pool = ProcessPoolExecutor(
            num_workers,
            # A forked worker has the tokenizer already; Megatron runs where there is fork.
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start_worker,
            initargs=(work, os.getpid()),
        )
        try:
            pending: deque[tuple[Tag, Block, Future[bytes]]] = deque()
            for tag, block in blocks:
                pending.append((tag, block, pool.submit(_encode_in_worker, block)))
                if len(pending) >= num_workers * _BLOCKS_PER_WORKER:
                    yield _take(pending, signals)
            while pending:
                yield _take(pending, signals)
        except BrokenProcessPool:
            raise MultiTurnError(
                "a worker process was killed, perhaps for want of memory; try again with fewer "
                f"--workers than {num_workers}, or, if a stack that ends in <template> stands "
                "above, with another chat template"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            gc.unfreeze()


def _take[Tag](
    pending: deque[tuple[Tag, Block, Future[bytes]]], signals: HeldSignals
) -> tuple[Tag, Block, EncodedBlock]:
    tag, block, future = pending.popleft()
    signals.release()
    while not future.done():
        wait([future], timeout=_SIGNAL_SECONDS)
        signals.release()
    return tag, block, pickle.loads(future.result())


_worker: RenewedProcess | None = None


def _start_worker(work: Work, parent: int) -> None:
    global _worker
    engine = work.encoder.engine
    engine.renews = False
    _worker = RenewedProcess(work.encode_block, engine.has_grown)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent cleans up on either signal, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    watch_parent(parent)


def _encode_in_worker(block: Block) -> bytes:
    """The EncodedBlock, pickled."""
    assert _worker is not None
    return _worker.call(block)


def _narrowed(batch: EncodedBatch) -> EncodedBatch:
    """The batch in half as many bytes, if its ids allow it: it may have to be sent."""
    tokens = batch.tokens
    if not len(tokens) or tokens.min() < 0 or tokens.max() > np.iinfo(np.uint16).max:
        return batch
    return replace(batch, tokens=tokens.astype(np.uint16))
