"""The selfcheck's reference: the same rows and weights on one rank, by the shortest way.

It shares the rows and Megatron's layers with the run that is checked, and nothing of `batch`,
`attention`, `forward`, `loss`, `moe` or `mtp`: attention is a loop over pieces, the objective is
computed from the rows, and Megatron is told neither a divisor nor `calculate_per_token_loss`, so
its own averaging over one rank's micro-batches, the identity here, is all that is left of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.recording import Part, Recording

Rows = dict[str, Tensor]

# A parameter that the objective hardly depends on has a gradient of rounding errors. Differences
# are taken relative to no less than this, times the norm that it had if all elements of the
# gradient were alike.
_LEAST_SHARE = 1e-2


@dataclass(kw_only=True)
class Pieces(PackedSeqParams):
    """Where pieces begin and end in a micro-batch of rows laid end to end."""

    piece_boundaries: list[int]


class PieceAttention(torch.nn.Module):
    """Causal attention, one piece at a time; query [s, b, h, d] to [s, b, h * d]."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = megatron.attention_window(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: Pieces,
        **kwargs: Any,
    ) -> Tensor:
        s, b, h, d = query.shape
        outputs = []
        for start, stop in pairwise(packed_seq_params.piece_boundaries):
            row, first = divmod(start, s)
            # [s, b, h, d] -> [1, h, n, d], keys and values once for each head that shares them
            q, k, v = (
                t[first : first + stop - start, row].transpose(0, 1).unsqueeze(0)
                for t in (query, key, value)
            )
            k, v = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (k, v))
            seen = self._window_mask(stop - start, q.device)
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=seen is None, scale=self.softmax_scale
            )
            outputs.append(out.squeeze(0).transpose(0, 1))
        # [b * s, h, d] -> [s, b, h * d]
        return torch.cat(outputs).view(b, s, h * d).transpose(0, 1).contiguous()

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """Which keys (columns) a query sees; None where that is all keys before it."""
        if self.window is None or self.window >= length - 1:
            return None
        position = torch.arange(length, device=device)
        distance = position.unsqueeze(1) - position
        return (distance >= 0) & (distance <= self.window)


def adapt_layer_spec(spec: Any, config: Any, vp_stage: int | None) -> Any:
    """Megatron's own layers with `PieceAttention`; see `megatron_hooks.hook_model`."""
    block = megatron.block_spec(spec, config, vp_stage)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = PieceAttention
    return block


def adapt_mtp_spec(block: Any, config: Any) -> None:
    """The same, in place, for Megatron's spec of multi-token prediction layers."""
    for layer in block.layer_specs:
        attention = layer.submodules.mtp_model_layer.submodules.self_attention
        attention.submodules.core_attention = PieceAttention


def roll_within_pieces(tensor: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """`tensor` (b, s) one position to the left, 0 at the end of a piece; and its sum."""
    if tensor.dtype == torch.bool:
        return tensor, tensor.sum()
    flat = tensor.flatten()
    rolled = torch.zeros_like(flat)
    for start, stop in pairwise(pieces.piece_boundaries):
        rolled[start : stop - 1] = flat[start + 1 : stop]
    return rolled.view_as(tensor), rolled.sum()


def objective_weights(rows: Rows, average: str) -> Tensor:
    """What each token's loss counts for in the objective, before the division; (b, s) float64.

    They sum to the divisor. For a mean over turns or tokens that is read off the turns
    themselves; the other averages are those of the rows' `loss_token_num`.
    """
    is_target = rows["turn_index"] > 0
    counted = {
        "turn": rows["turn_token_num"],
        "token": torch.ones_like(rows["loss_mask"]),
    }.get(average, rows["loss_token_num"])
    return torch.where(is_target, 1.0 / counted.double(), 0.0)


@dataclass(kw_only=True)
class BatchSums:
    """What a global batch adds up to on the reference's rank."""

    num_rows: int = 0
    divisor: float = 0.0
    num_targets: float = 0.0
    num_turns: float = 0.0
    objective: float = 0.0  # not yet divided
    token_losses: float = 0.0

    def quantities(self) -> dict[str, float]:
        """The names under which Megatron logs them in the run that is checked."""
        return {
            "lm loss": self.objective / self.divisor if self.divisor else math.nan,
            "token loss": self.token_losses / self.num_targets if self.num_targets else math.nan,
            "turns": self.num_turns,
            "target tokens": self.num_targets,
        }


@dataclass(kw_only=True)
class ReferenceStep:
    """The forward step of the reference, over one global batch after the other."""

    loss_average: str
    sums: BatchSums = field(default_factory=BatchSums)
    _ahead: list[Rows] = field(default_factory=list)

    def begin_batch(self) -> None:
        """Forget the last global batch."""
        self.sums = BatchSums()

    def __call__(
        self, data_iterator: Iterator[Rows], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        """A micro-batch of rows through the model; as Megatron's schedules call it."""
        if not self._ahead:
            self._read_batch(data_iterator)
        rows = {name: tensor.cuda() for name, tensor in self._ahead.pop(0).items()}
        weights = objective_weights(rows, self.loss_average)
        num_micro_batches = megatron.num_micro_batches()
        config = megatron.model_config(model)
        # Megatron takes the mean over the micro-batches of each one's mean over its own weights.
        share = num_micro_batches * weights.sum() / self.sums.divisor
        config.mtp_grad_scale_func = lambda: share.float()
        is_moe = config.num_moe_experts is not None
        output = model(
            rows["tokens"],
            rows["position_ids"],
            None,
            labels=rows["labels"],
            loss_mask=weights.float(),
            packed_seq_params=pieces_of_rows(rows["cu_seqlens"], rows["tokens"].shape[1]),
            **({"padding_mask": rows["padding_mask"].bool()} if is_moe else {}),
        )

        def loss_func(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            losses = losses.double()
            objective = (losses * weights).sum()
            self.sums.objective += float(objective)
            self.sums.token_losses += float(losses[rows["turn_index"] > 0].sum())
            # Megatron divides by the number of micro-batches.
            loss = (objective * (num_micro_batches / self.sums.divisor)).float()
            return loss, {"lm loss": loss.detach().clone()}

        return output, loss_func

    def _read_batch(self, data_iterator: Iterator[Rows]) -> None:
        """Read a whole global batch: its divisor must be known before the first backward pass."""
        self._ahead = [next(data_iterator) for _ in range(megatron.num_micro_batches())]
        for rows in self._ahead:
            is_target = rows["turn_index"] > 0
            self.sums.num_rows += len(rows["tokens"])
            self.sums.divisor += float(objective_weights(rows, self.loss_average).sum())
            self.sums.num_targets += float(is_target.sum())
            self.sums.num_turns += float(objective_weights(rows, "turn").sum())


def pieces_of_rows(cu_seqlens: Tensor, sequence_length: int) -> Pieces:
    """The pieces of a micro-batch; cu_seqlens is int (b, n), as the rows emit it."""
    boundaries = [0]
    for row, bounds in enumerate(cu_seqlens.tolist()):
        boundaries += [
            row * sequence_length + stop for start, stop in pairwise(bounds) if stop > start
        ]
    return Pieces(
        qkv_format="sbhd",
        max_seqlen_q=sequence_length,  # the rotary embedding is as long as a row
        max_seqlen_kv=sequence_length,
        piece_boundaries=boundaries,
    )


def compare_gradients(reference: Sequence[Part], recording: Recording) -> dict[str, Any]:
    """How the recorded gradients differ from the reference's; for the report.

    `worst` holds [name, relative difference] of the parameters that differ most, in the
    Euclidean norm, and `norms` the norm of the whole gradient there and here.
    """
    squares = [0.0, 0.0]
    compared = []  # (name, norm of the difference, norm, elements)
    for part in reference:
        exact = part.data.double()
        ours = recording.read(part.name, begin=part.begin, end=part.end).view_as(exact).double()
        squares[0] += float(ours.square().sum())
        squares[1] += float(exact.square().sum())
        difference = float((ours - exact).norm())
        compared.append((_label(part), difference, float(exact.norm()), exact.numel()))
    unknown = set(recording) - {part.name for part in reference}
    per_element = math.sqrt(squares[1] / sum(numel for *_, numel in compared))
    largest = dict.fromkeys(unknown, math.inf)
    for name, difference, norm, numel in compared:
        relative = _relative(difference, max(norm, _LEAST_SHARE * per_element * math.sqrt(numel)))
        # A gated layer's two halves are parts of one parameter.
        largest[name] = max(largest.get(name, 0.0), relative)
    worst = sorted(largest.items(), key=lambda item: -item[1])
    return {
        "num_parameters": len(largest),
        "worst": worst[:5],
        "norms": [math.sqrt(square) for square in squares],
        "replicas": recording.replica_difference(),
    }


def _relative(difference: float, size: float) -> float:
    """inf where there is a difference to nothing, or one that is no number."""
    if difference == 0:
        return 0.0
    return difference / size if math.isfinite(difference) and size else math.inf


def _label(part: Part) -> str:
    """The parameter's name with its layer, and its expert where it has one: `...weight[3, 1]`."""
    stacked = part.begin[: len(part.begin) - part.data.dim()]
    return part.name + (f"[{', '.join(map(str, stacked))}]" if stacked else "")
