"""What the variants of `train_throughput.py` train on, in our disk format, and what is in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from session_lengths import split_by_turn

from megatron_multiturn.encoding import EncodedSession, join_encoded
from megatron_multiturn.manifest import TemplateIdentity
from megatron_multiturn.modes import CONTEXT
from megatron_multiturn.packing import pack
from megatron_multiturn.session_writer import SessionWriter
from megatron_multiturn.store import SessionStore
from megatron_multiturn.vocabulary import TokenizerIdentity, tokenizer_fingerprint
from megatron_multiturn.windows import cut_sessions

TOKENIZER_TYPE = "NullTokenizer"

_STOCK_ROWS_PER_DOCUMENT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasets:
    """Prefixes of the datasets on disk."""

    sessions: str
    split: str  # one session a turn
    stock: str  # documents longer than a row; to be read by Megatron's own datasets


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochCounts:
    """One epoch of a variant's rows."""

    rows: int
    positions: int  # rows * sequence length: what is computed
    targets: int


class NullTokenizer:
    """Stands for Megatron's tokenizer of this name, which has ids and no texts."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def null_identity(vocab_size: int) -> TokenizerIdentity:
    """What a training run with `--tokenizer-type NullTokenizer --vocab-size N` expects of data."""
    return tokenizer_fingerprint(NullTokenizer(vocab_size), TOKENIZER_TYPE)


def write_datasets(
    folder: Path,
    sessions: Iterable[EncodedSession],
    *,
    vocab_size: int,
    stock_row_length: int,
    num_stock_rows: int,
    seed: int,
) -> Datasets:
    """Write all three into `folder`; the stock one holds random tokens."""
    made = Datasets(
        sessions=str(folder / "sessions"), split=str(folder / "split"), stock=str(folder / "stock")
    )
    with _writer(made.sessions, vocab_size) as whole, _writer(made.split, vocab_size) as split:
        for session in sessions:
            whole.add(join_encoded([session]))
            split.add(join_encoded(list(split_by_turn(session))))
    rng = np.random.default_rng([seed, 1])
    length = _STOCK_ROWS_PER_DOCUMENT * stock_row_length
    with _writer(made.stock, vocab_size) as stock:
        for _ in range(-(-num_stock_rows // _STOCK_ROWS_PER_DOCUMENT) + 1):
            document = EncodedSession(
                tokens=rng.integers(0, vocab_size, length, dtype=np.int32),
                segment_lengths=np.array([length], dtype=np.int32),
                modes=np.array([CONTEXT], dtype=np.int8),
            )
            stock.add(join_encoded([document]))
    return made


def epoch_counts(
    prefix: str, *, sequence_length: int, long_session: str, one_piece_a_row: bool
) -> EpochCounts:
    """The rows that training makes of a dataset in one epoch."""
    store = SessionStore.open(prefix)
    pieces, report = cut_sessions(
        store.session_lengths(),
        sequence_length=sequence_length,
        long_session=long_session,
        segment_index=store.segment_index(),
    )
    plan = pack(
        pieces,
        sequence_length=sequence_length,
        piece_multiple=sequence_length if one_piece_a_row else 1,
        seed=0,
    )
    return EpochCounts(
        rows=plan.num_rows,
        positions=plan.num_rows * sequence_length,
        targets=store.manifest.counts.target_tokens - report.num_targets_lost,
    )


def mean_session_positions(prefix: str) -> float:
    """Positions that a session fills in the mean, uncut: one fewer than its tokens."""
    return float(SessionStore.open(prefix).session_lengths().mean()) - 1


def _writer(prefix: str, vocab_size: int) -> SessionWriter:
    return SessionWriter(
        prefix,
        tokenizer=null_identity(vocab_size),
        template=TemplateIdentity(name="benchmark", content_hash=""),
    )
