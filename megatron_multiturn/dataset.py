"""`MultiTurnDataset`: packed rows of sessions under Megatron's blended dataset builder.

One of these is one split of one dataset on disk. It holds as many epochs as the run asks for;
each epoch packs every session once, with other neighbours.
"""

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from numpy.typing import NDArray

from megatron_multiturn.errors import DatasetError
from megatron_multiturn.packing import PackPlan, pack
from megatron_multiturn.plan_cache import PlanKey, cached_plan
from megatron_multiturn.samples import RowFormat, build_row
from megatron_multiturn.store import SessionStore
from megatron_multiturn.vocabulary import TokenizerIdentity
from megatron_multiturn.windows import CutReport, PieceTable, cut_sessions

# Masks and boundaries come from the data, never from ids, so any id serves as padding.
_PAD_TOKEN = 0


@dataclass
class MultiTurnDatasetConfig(BlendedMegatronDatasetConfig):
    """What Megatron's builder needs, and what decides the rows."""

    loss_average: str = "turn"
    """What the loss is the mean of; see `samples.LOSS_AVERAGES`."""

    divisor_unit: int = 1
    """What `turn_num` counts in; see `samples.largest_divisor_unit`."""

    long_session: str = "window"
    """What becomes of a session longer than a row; see `windows.cut_sessions`."""

    session_window: int | None = None
    """Longest piece of a session in positions; None: a row."""

    window_context: float = 0.25
    """Fraction of a later window that may repeat earlier messages."""

    piece_multiple: int = 1
    """Positions of a piece are rounded up to a multiple of this."""

    object_storage_cache_path: str | None = None
    """Folder on this node for the indices of datasets in object storage."""

    tokenizer_identity: TokenizerIdentity | None = None
    """The training tokenizer; a dataset made with another one is refused. None: no check."""


class MultiTurnDataset(MegatronDataset):
    """Rows of `sequence_length` tokens, at least `num_samples` of them (None: one epoch)."""

    config: MultiTurnDatasetConfig
    dataset: SessionStore
    sessions: range  # of the dataset on disk

    def __init__(
        self,
        dataset: SessionStore,
        dataset_path: str,
        indices: NDArray[np.int32],
        num_samples: int | None,
        index_split: Any,
        config: MultiTurnDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        first = int(indices[0]) if len(indices) else 0
        sessions = range(first, first + len(indices))
        if not sessions and num_samples != 0:
            raise DatasetError(
                f"the {index_split.name} split of {dataset_path} holds none of its "
                f"{dataset.num_sessions:,} sessions; change --split, or pass --eval-iters 0 to "
                "train without evaluation"
            )
        # Megatron made an array of all numbers from first to last, for every rank.
        self.indices = np.zeros(0, dtype=np.int32)
        self.sessions = sessions
        self.plan = _plan(dataset, sessions, num_samples, index_split.name, config)
        self._row_format = RowFormat(
            sequence_length=config.sequence_length,
            max_pieces_per_row=max(1, self.plan.stats.max_pieces_per_row),
            piece_multiple=config.piece_multiple,
            pad_token=_PAD_TOKEN,
            loss_average=config.loss_average,
            divisor_unit=config.divisor_unit,
            sessions_end_with_piece=config.long_session == "truncate",
            turn_weights=dataset.manifest.turn_weights,
        )

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: SessionStore) -> int:
        """Sessions: what `--split` divides."""
        return low_level_dataset.num_sessions

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: MultiTurnDatasetConfig) -> SessionStore:
        """Open the dataset on disk; DatasetError if incomplete or of another tokenizer."""
        store = SessionStore.open(
            dataset_path,
            mmap=config.mmap_bin_files,
            index_cache=config.object_storage_cache_path,
        )
        if config.tokenizer_identity is not None:
            _check_tokenizer(store, config.tokenizer_identity)
        return store

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # Blends are cached under a hash of these.
        return [
            "random_seed",
            "sequence_length",
            "split",
            "split_matrix",
            "long_session",
            "session_window",
            "window_context",
            "piece_multiple",
        ]

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, idx: int) -> dict[str, NDArray[Any]]:
        """Row `idx`: the arrays of the sample contract, see `samples.build_row`."""
        row_pieces = self.plan.pieces_of_row(idx)
        spans = self.plan.pieces.spans_of(row_pieces)
        pieces = self.dataset.read_pieces(self.plan.pieces.session[row_pieces], spans)
        return build_row(pieces, spans, self._row_format)

    def set_num_boundaries(self, num_boundaries: int) -> None:
        """Lengthen `cu_seqlens` to what the largest dataset of the run needs."""
        extra = num_boundaries - len(self[0]["cu_seqlens"])
        self._row_format = replace(
            self._row_format, max_pieces_per_row=self._row_format.max_pieces_per_row + extra
        )


def _check_tokenizer(store: SessionStore, training: TokenizerIdentity) -> None:
    made_with = store.manifest.tokenizer
    # Other types of Megatron's may wrap one vocabulary; only the ids matter.
    if (made_with.vocab_size, made_with.content_hash) != (
        training.vocab_size,
        training.content_hash,
    ):
        raise DatasetError(
            f"{store.prefix} was made with another tokenizer: {made_with.type} of "
            f"{made_with.vocab_size:,} tokens (content {made_with.content_hash[:12]}), and "
            f"this run has {training.type} of {training.vocab_size:,} tokens (content "
            f"{training.content_hash[:12]}); preprocess the sessions with this run's tokenizer, "
            "or pass the tokenizer that the dataset was made with"
        )


def _plan(
    store: SessionStore,
    sessions: range,
    num_samples: int | None,
    split_name: str,
    config: MultiTurnDatasetConfig,
) -> PackPlan:
    """The cached plan of at least `num_samples` rows over `sessions`, or a new one."""
    key = _plan_key(store, sessions, num_samples, config)
    folder = config.path_to_cache or f"{store.local_prefix}.plans"
    split = f"{split_name} split of {store.prefix}"
    doing = f"plan the {split}, {len(sessions):,} sessions"
    start_time = time.perf_counter()

    def build() -> tuple[PackPlan, CutReport]:
        print(f"> {doing[0].upper()}{doing[1:]}; all ranks of this node wait for it", flush=True)
        return _build_plan(store, sessions, key, split_name)

    found = cached_plan(folder, key, build, doing=doing)
    if found.built_here or _speaks():
        num_epochs = found.plan.num_rows // max(1, found.plan.stats.num_rows)
        seconds = time.perf_counter() - start_time
        print(
            f"> {split}: {found.report}; {found.plan.stats}; {num_epochs:,} "
            f"epoch{'s' * (num_epochs != 1)}; "
            f"{'planned' if found.built_here else 'plan read'} in {seconds:.1f} s",
            flush=True,
        )
    return found.plan


def check_sessions(
    store: SessionStore, sessions: range, split_name: str, config: MultiTurnDatasetConfig
) -> None:
    """Raise DatasetError if none of the sessions of a split fits a row, or one that must does not.

    What is raised when the rows are planned, without planning them.
    """
    _cut(store, sessions, _plan_key(store, sessions, None, config), split_name)


def _plan_key(
    store: SessionStore, sessions: range, num_samples: int | None, config: MultiTurnDatasetConfig
) -> PlanKey:
    return PlanKey(
        dataset_hash=store.manifest.idx_sha256,
        sessions=(sessions.start, sessions.stop),
        num_samples=num_samples,
        seed=config.random_seed,
        sequence_length=config.sequence_length,
        piece_multiple=config.piece_multiple,
        long_session=config.long_session,
        session_window=config.session_window,
        window_context=config.window_context,
    )


def _speaks() -> bool:
    if torch.distributed.is_initialized():
        return bool(torch.distributed.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"  # plans are counted before there are process groups


def _build_plan(
    store: SessionStore, sessions: range, key: PlanKey, split_name: str
) -> tuple[PackPlan, CutReport]:
    pieces, report = _cut(store, sessions, key, split_name)
    plan = pack(
        pieces,
        sequence_length=key.sequence_length,
        piece_multiple=key.piece_multiple,
        seed=key.seed,
        at_least_rows=key.num_samples or 0,
    )
    return plan, report


def _cut(
    store: SessionStore, sessions: range, key: PlanKey, split_name: str
) -> tuple[PieceTable, CutReport]:
    """The pieces of a split, their sessions numbered as in the whole dataset."""
    first_segments, segment_lengths, modes = store.segment_index()
    try:
        pieces, report = cut_sessions(
            store.session_lengths()[sessions.start : sessions.stop],
            sequence_length=key.sequence_length,
            long_session=key.long_session,
            segment_index=(
                first_segments[sessions.start : sessions.stop + 1],
                segment_lengths,
                modes,
            ),
            window_context=int((key.session_window or key.sequence_length) * key.window_context),
            session_window=key.session_window,
        )
    except DatasetError as error:
        raise DatasetError(
            f"{split_name} split of {store.prefix}, which begins at session {sessions.start} of "
            f"the dataset: {error}"
        ) from error
    if not len(pieces) and key.num_samples != 0:
        raise DatasetError(
            f"the {split_name} split of {store.prefix} fills no row ({report}); raise "
            "--seq-length or pass --long-session window"
        )
    return replace(pieces, session=pieces.session + np.int32(sessions.start)), report
