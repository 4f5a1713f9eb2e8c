"""A provider for `--dataset-provider padded_rows:one_piece_a_row`: rows that nothing shares.

Every piece is rounded up to a whole row, so a row is one session and padding. Attention covers
the whole row, as it does where rows are padded without packing.
"""

from collections.abc import Sequence
from typing import Any

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.dataset import MultiTurnDataset
from megatron_multiturn.provider import dataset_config


def one_piece_a_row(
    num_samples: Sequence[int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """(train, valid, test) with one piece a row; collective over all ranks."""
    args = megatron.get_args()
    config = dataset_config(args)
    config.piece_multiple = args.seq_length
    train, valid, test = megatron.build_blended_datasets(
        MultiTurnDataset,
        num_samples,
        lambda: megatron.tensor_parallel_group().rank() == 0,
        config,
    )
    return train, valid, test
