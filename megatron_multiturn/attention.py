"""Attention in which the pieces of a row never see each other, with and without Transformer Engine.

`PackedAttention` is a `core_attention` for Megatron's layer specs. It takes the stock layout
`[s, b, h, d]`, micro-batch kept, so pipeline and tensor parallel shapes stay as they are; the
piece boundaries come with Megatron's own `packed_seq_params`, which travel through activation
recomputation. Rotary embeddings are relative, so positions need no restart inside a row.

Context parallel ranks hold some positions of all heads (`batch.keep_positions_of_rank`). They
exchange them for all positions of some heads, attend, and exchange back (Ulysses). With
`--packed-attention te` Transformer Engine's own context parallelism takes their place.

No kernel waits for the device: how many pieces there are and how long the longest is, which decide
the size of a launch, is known on the host.
"""

import copy
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
from megatron_multiturn.batch import to_device
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.saved_output import attend_and_reorder

# Transformer Engine's kernel is the faster one per pair of positions and the slower one to launch.
# On an H200, forward and backward break even where heads * head size * sum(piece length ** 2) is
# 3.4e10 to 4.0e10 with heads of 128, and at 1.5e10 with heads of 64 (benchmarks/RESULTS.md).
_BREAK_EVEN_WORK = 3.5e10
_HOPPER = (9, 0)  # on older GPUs it may have no packed kernel at all

# Transformer Engine plans its kernel anew for another number of pieces or another longest one, and
# takes any number up to this for this; so both are rounded up to powers of two.
_FEWEST_PLANNED_PIECES = 32


@dataclass(kw_only=True)
class PackedRows(PackedSeqParams):
    """The piece boundaries of one micro-batch of rows, as Megatron hands them to every layer.

    With `qkv_format` "sbhd" Megatron leaves the tensors alone, and the rotary embedding is as
    long as a row (`max_seqlen_q`).
    """

    piece_boundaries: Tensor  # int32 (n + 1,), rising from 0 to b * s over the rows laid end to end
    host_boundaries: list[int]  # the same
    longest_piece: int  # positions
    squared_lengths: int  # sum over pieces of length ** 2: pairs of positions, mask aside
    planned: PackedSeqParams | None = None  # the same for Transformer Engine


def packed_rows(
    boundaries: Tensor, *, sequence_length: int, device: Any, cuts_pieces: bool = False
) -> PackedRows:
    """The boundaries for the layers of one micro-batch.

    boundaries: int32 (n + 1,) on the CPU, rising from 0 to b * `sequence_length`: where the
        pieces of the rows laid end to end begin and end.
    cuts_pieces: whether context parallel ranks hold parts of every piece, and not of every row.
    """
    host_boundaries = boundaries.tolist()
    lengths = [stop - start for start, stop in pairwise(host_boundaries)]
    planned_pieces = max(_FEWEST_PLANNED_PIECES, 1 << (len(lengths) - 1).bit_length())
    if cuts_pieces:
        planned_pieces = len(lengths)  # its exchange of heads waits for the device for every piece
    planned_length = min(1 << (max(lengths) - 1).bit_length(), host_boundaries[-1])
    ends = boundaries[-1:].expand(planned_pieces - len(lengths))
    on_device = to_device(torch.cat([boundaries, ends]), device)
    planned = megatron.packed_seq_params(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=on_device if cuts_pieces else None,
        cu_seqlens_kv_padded=on_device if cuts_pieces else None,
        max_seqlen_q=planned_length,
        max_seqlen_kv=planned_length,
        pad_between_seqs=False,
    )
    piece_boundaries = on_device[: len(boundaries)]
    return PackedRows(
        # "thd" lets Megatron restart the rotary embedding in every piece, and take a rank's part.
        qkv_format="thd" if cuts_pieces else "sbhd",
        cu_seqlens_q=piece_boundaries,
        cu_seqlens_kv=piece_boundaries,
        max_seqlen_q=sequence_length,
        max_seqlen_kv=sequence_length,
        piece_boundaries=piece_boundaries,
        host_boundaries=host_boundaries,
        longest_piece=max(lengths),
        squared_lengths=sum(length**2 for length in lengths),
        planned=planned,
    )


class PackedAttention(MegatronModule):
    """Causal attention within each piece of each row.

    Shapes: query [s, b, h, d]; key and value [s, b, g, d], g query groups; result [s, b, h * d].
    With context parallelism s is the rank's share of a row.

    kernels: what runs in bf16 and fp16 on a GPU; otherwise it is a loop over pieces. "torch" is
        PyTorch's variable-length flash attention; "fa4", that of FlashAttention 4; "te",
        Transformer Engine's, also for context parallelism; "auto", PyTorch's or Transformer
        Engine's, whichever is faster for the pieces at hand.
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
        kernels: str = "torch",
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = megatron.attention_window(config, layer_number)
        if kernels == "auto" and (
            self.window is not None or torch.cuda.get_device_capability() < _HOPPER
        ):
            kernels = "torch"  # the break-even is not known
        self.kernels = kernels
        self.cp_group = None
        if config.context_parallel_size > 1 and kernels != "te":
            self.cp_group = pg_collection.cp if pg_collection else megatron.context_parallel_group()
        if kernels in ("te", "auto"):
            # It has no parameters. In a tuple, it leaves no trace in a checkpoint.
            self._te = (
                megatron.te_attention_class()(
                    self._config_of_kernel(),
                    layer_number=layer_number,
                    attn_mask_type=attn_mask_type,
                    attention_type=attention_type,
                    attention_dropout=attention_dropout,
                    softmax_scale=self.softmax_scale,
                    cp_comm_type=cp_comm_type,
                    pg_collection=pg_collection,
                ),
            )

    def _config_of_kernel(self) -> Any:
        """What Transformer Engine must take for the model: after the exchange, fewer heads."""
        if self.cp_group is None:
            return self.config
        config, ranks = copy.copy(self.config), self.cp_group.size()
        tp_size = config.tensor_model_parallel_size
        config.context_parallel_size = 1
        config.num_attention_heads //= ranks
        config.num_query_groups = max(config.num_query_groups // tp_size // ranks, 1) * tp_size
        return config

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
        if packed_seq_params.qkv_format == "thd":
            # Megatron has laid the one row out as [s, h, d].
            return self._by_te(query, key, value, packed_seq_params, attn_mask_type)
        if self.cp_group is not None:
            query, key, value = exchange_positions_for_heads(query, key, value, self.cp_group)
        _, b, h, d = query.shape
        # [s, b, h, d] -> [b * s, h, d]: rows end to end, as the boundaries count them. What is
        # kept for the backward pass must be no view of all three.
        q, k, v = (t.transpose(0, 1).flatten(0, 1).contiguous() for t in (query, key, value))

        def attend() -> Tensor:
            if not has_varlen_kernels(q):
                return self._by_piece(q, k, v, packed_seq_params)
            if self._prefers_te(packed_seq_params.squared_lengths * h * d):
                return self._by_te(q, k, v, packed_seq_params, attn_mask_type)
            if self.kernels == "fa4":
                return self._by_flash_attention_4(q, k, v, packed_seq_params)
            return self._by_varlen_attn(q, k, v, packed_seq_params)

        out = attend_and_reorder(attend, b, d)
        if self.cp_group is not None:
            out = exchange_heads_for_positions(out, self.cp_group)
        return out.flatten(2).contiguous()

    def _prefers_te(self, work: int) -> bool:
        return self.kernels == "te" or (self.kernels == "auto" and work >= _BREAK_EVEN_WORK)

    def _by_te(
        self, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, attn_mask_type: Any
    ) -> Tensor:
        out: Tensor = self._te[0](
            q, k, v, None, attn_mask_type=attn_mask_type, packed_seq_params=rows.planned
        )
        return out

    def _by_varlen_attn(self, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = rows.piece_boundaries, rows.longest_piece
        out = varlen_attn(
            q,
            k,
            v,
            bounds,
            bounds,
            longest,
            longest,
            scale=self.softmax_scale,
            window_size=(-1 if self.window is None else self.window, 0),
        )
        assert isinstance(out, Tensor)
        return out

    def _by_flash_attention_4(self, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> Tensor:
        from flash_attn.cute.interface import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=rows.piece_boundaries,
            cu_seqlens_k=rows.piece_boundaries,
            max_seqlen_q=rows.longest_piece,
            max_seqlen_k=rows.longest_piece,
            softmax_scale=self.softmax_scale,
            causal=self.window is None,
            window_size=(None, None) if self.window is None else (self.window, 0),
        )
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _by_piece(self, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> Tensor:
        lengths = [stop - start for start, stop in pairwise(rows.host_boundaries)]
        # [b * s, h, d] -> [1, h, b * s, d], then pieces of n tokens, [1, h, n, d]
        pieces = zip(
            *(t.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for t in (q, k, v)), strict=True
        )
        outputs = []
        for query, key, value in pieces:
            mask = self._window_mask(query.shape[2], query.device)
            outputs.append(
                scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=self.softmax_scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        # [1, h, b * s, d] -> [b * s, h, d]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).contiguous()

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """bool (length, length), True where a query sees a key; None if it sees all before it."""
        if self.window is None or self.window >= length - 1:
            return None
        ones = torch.ones(length, length, dtype=torch.bool, device=device)
        return ones.tril().triu(-self.window)


def has_varlen_kernels(query: Tensor) -> bool:
    """Whether kernels for pieces of unlike length run there; else SDPA runs piece by piece."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


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
