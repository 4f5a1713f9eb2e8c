"""Attention in which the pieces of a row never see each other, without Transformer Engine.

`PackedAttention` is a `core_attention` for Megatron's layer specs. It takes the stock layout
`[s, b, h, d]`, micro-batch kept, so pipeline and tensor parallel shapes stay as they are; the
piece boundaries come with Megatron's own `packed_seq_params`, which travel through activation
recomputation. Rotary embeddings are relative, so positions need no restart inside a row.

Context parallel ranks hold some positions of all heads (`batch.keep_positions_of_rank`). They
exchange them for all positions of some heads, attend, and exchange back (Ulysses).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.errors import ConfigError


@dataclass(kw_only=True)
class PackedRows(PackedSeqParams):
    """The piece boundaries of one micro-batch of rows, as Megatron hands them to every layer.

    `qkv_format` is "sbhd": Megatron leaves the tensors alone, and the rotary embedding is as
    long as a row (`max_seqlen_q`).
    """

    piece_boundaries: Tensor  # (n,) int32, rising from 0 to b * s over the rows laid end to end
    host_boundaries: list[int] | None  # the same without repeats, where the loop over pieces is


def packed_rows(cu_seqlens: Tensor, *, sequence_length: int, dtype: torch.dtype) -> PackedRows:
    """The boundaries for the layers of one micro-batch.

    cu_seqlens: int32 (b, n), each row's piece boundaries from 0 to `sequence_length`, the last
        repeated up to n.
    dtype: of queries and keys; decides between the kernel and the loop over pieces.
    """
    row_starts = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device) * sequence_length
    boundaries = (cu_seqlens + row_starts.unsqueeze(1)).flatten().to(torch.int32)
    kernel = uses_varlen_kernel(boundaries.device, dtype)
    return PackedRows(
        qkv_format="sbhd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=sequence_length,
        max_seqlen_kv=sequence_length,
        piece_boundaries=boundaries,
        host_boundaries=None if kernel else boundaries.unique_consecutive().tolist(),
    )


def uses_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's variable-length flash attention runs there; else SDPA piece by piece."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


class PackedAttention(MegatronModule):
    """Causal attention within each piece of each row.

    Shapes: query [s, b, h, d]; key and value [s, b, g, d], g query groups; result [s, b, h * d].
    With context parallelism s is the rank's share of a row.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = None
        if config.context_parallel_size > 1:
            self.cp_group = pg_collection.cp if pg_collection else megatron.context_parallel_group()

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
        if packed_seq_params is None:
            raise ConfigError(
                "PackedAttention was called without piece boundaries; it trains packed rows only. "
                "Load the checkpoint without megatron_multiturn's layer spec to generate text."
            )
        if self.cp_group is not None:
            query, key, value = exchange_positions_for_heads(query, key, value, self.cp_group)
        s, b, h, d = query.shape
        # [s, b, h, d] -> [b * s, h, d]: rows end to end, as the boundaries count them
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
        if packed_seq_params.host_boundaries is None:
            out = self._by_kernel(q, k, v, packed_seq_params)
        else:
            out = self._by_piece(q, k, v, packed_seq_params.host_boundaries)
        # [b * s, h, d] -> [s, b, h, d]
        out = out.reshape(b, s, h, d).transpose(0, 1)
        if self.cp_group is not None:
            out = exchange_heads_for_positions(out, self.cp_group)
        return out.flatten(2).contiguous()

    def _by_kernel(self, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = rows.piece_boundaries, rows.max_seqlen_q
        out = varlen_attn(
            q,
            k,
            v,
            bounds,
            bounds,
            longest,
            longest,
            scale=self.softmax_scale,
            window_size=(-1, 0),
        )
        assert isinstance(out, Tensor)
        return out

    def _by_piece(self, q: Tensor, k: Tensor, v: Tensor, boundaries: list[int]) -> Tensor:
        lengths = [stop - start for start, stop in pairwise(boundaries)]
        # [b * s, h, d] -> [1, h, b * s, d], then pieces of n tokens, [1, h, n, d]
        pieces = zip(
            *(t.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for t in (q, k, v)), strict=True
        )
        outputs = [
            scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            for query, key, value in pieces
        ]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def exchange_positions_for_heads(
    query: Tensor, key: Tensor, value: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Each rank gives its positions of all heads, and gets all positions of its heads.

    query [s / n, b, h, d], key and value [s / n, b, g, d] of n ranks; the results hold the s
    positions in order, h / n heads and g / n groups, or one where there are fewer groups than
    ranks. One all-to-all carries all three.
    """
    n = group.size()
    if key.shape[2] < n:
        key, value = (t.repeat_interleave(n // key.shape[2], dim=2) for t in (key, value))
    # [s / n, b, heads, d] -> [n, s / n, b, heads / n, d], heads of rank r at r
    parts = [t.unflatten(2, (n, -1)).movedim(2, 0) for t in (query, key, value)]
    heads = [part.shape[3] for part in parts]
    received = megatron.all_to_all(group, torch.cat(parts, dim=3))
    # [n, 2 * chunk, b, heads, d]: rank r sent chunks r and 2 n - 1 - r of the rows
    first, second = received.unflatten(1, (2, -1)).unbind(1)
    in_order = torch.cat([first, second.flip(0)]).flatten(0, 1)
    q, k, v = in_order.split(heads, dim=2)
    return q, k, v


def exchange_heads_for_positions(out: Tensor, group: Any) -> Tensor:
    """The inverse, for the output of attention: [s, b, h / n, d] -> [s / n, b, h, d]."""
    n = group.size()
    # [s, b, h / n, d] -> [2 n, chunk, b, h / n, d] -> [n, 2, chunk, ...], chunks of rank r at r
    first, second = out.unflatten(0, (2 * n, -1)).chunk(2)
    received = megatron.all_to_all(group, torch.stack([first, second.flip(0)], dim=1))
    # [n, 2, chunk, b, h / n, d] -> [s / n, b, h, d]
    return received.flatten(1, 2).movedim(0, 2).flatten(2, 3)
