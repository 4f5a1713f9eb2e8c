"""Packed attention for rows of one document, for `--spec whole_row_attention whole_row_layer_spec`.

Megatron without Transformer Engine has no attention that trains on a GPU. This lets its own
datasets and forward step, which know no pieces, run with the kernel that packed rows run with.
"""

import functools
from typing import Any

import torch
from megatron.training.models.gpt import default_layer_spec
from torch import Tensor

from megatron_multiturn.attention import PackedAttention, PackedRows, packed_rows
from megatron_multiturn.layer_spec import adapt_layer_spec
from megatron_multiturn.megatron_hooks import compile_rotary_embedding


class WholeRowAttention(PackedAttention):
    """Causal attention over each row as one piece, by PyTorch; shapes as in `PackedAttention`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        assert packed_seq_params is None, "made for rows that have no pieces"
        rows = whole_rows(query.shape[1], query.shape[0], query.device)
        return super().forward(query, key, value, None, packed_seq_params=rows)


@functools.cache
def whole_rows(num_rows: int, sequence_length: int, device: torch.device) -> PackedRows:
    """The boundaries of rows that are one piece each; made once, for all layers and steps."""
    stops = torch.arange(num_rows + 1, dtype=torch.int32) * sequence_length
    return packed_rows(stops, sequence_length=sequence_length, device=device)


def whole_row_layer_spec(model_config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's own layers with this attention, and with the plugin's rotary embedding."""
    compile_rotary_embedding()
    spec = default_layer_spec(model_config, vp_stage)
    block = adapt_layer_spec(spec, model_config.transformer, vp_stage, kernels="torch")
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = WholeRowAttention
    return block
