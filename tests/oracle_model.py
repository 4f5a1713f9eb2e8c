"""The GPTs of the oracle, in float64 and one session at a time; see `oracle`.

Parameters go by Megatron's names in a checkpoint, whole. Those of the layers are stacked, layer
first: `decoder.layers.self_attention.linear_proj.weight` is (layers, hidden, heads * head size).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the parameters alone do not say of a model."""

    num_heads: int
    num_groups: int  # of query heads that share a key and a value head
    rotary: bool  # else learned positions
    rms_norm: bool  # else LayerNorm
    gated: bool  # SwiGLU, else GELU
    biases: bool
    tied: bool  # the word embeddings are the output layer
    experts_per_token: int = 0  # 0: one MLP for all tokens
    norm_epsilon: float = 1e-5
    rotary_base: float = 10_000.0


def token_losses(
    parameters: Mapping[str, Tensor], shape: ModelShape, tokens: Tensor
) -> tuple[Tensor, float]:
    """-log p(token | the tokens before it), (m,) and 0 for the first; and the routing margin."""
    hidden = parameters["embedding.word_embeddings.weight"][tokens[:-1]]
    if not shape.rotary:
        hidden = hidden + parameters["embedding.position_embeddings.weight"][: len(hidden)]
    margins = [math.inf]
    stacked = {
        name.removeprefix("decoder.layers."): tensor
        for name, tensor in parameters.items()
        if name.startswith("decoder.layers.")
    }
    for number in range(len(stacked["self_attention.linear_qkv.weight"])):
        layer = {name: tensor[number] for name, tensor in stacked.items()}
        normed = _norm(hidden, layer, "self_attention.linear_qkv.layer_norm_", shape)
        hidden = hidden + _attention(normed, layer, shape)
        normed = _norm(hidden, layer, "mlp.linear_fc1.layer_norm_", shape)
        if shape.experts_per_token:
            change, margin = _mixture_of_experts(normed, layer, shape)
            margins.append(margin)
        else:
            change = _mlp(normed, layer, "mlp.linear_", shape)
        hidden = hidden + change
    hidden = _norm(hidden, parameters, "decoder.final_layernorm.", shape)
    output = "embedding.word_embeddings.weight" if shape.tied else "output_layer.weight"
    log_p = (hidden @ parameters[output].T).log_softmax(dim=-1)  # (m - 1, vocabulary)
    predicted = -log_p.gather(1, tokens[1:, None])[:, 0]
    return torch.cat([predicted.new_zeros(1), predicted]), min(margins)


def _norm(x: Tensor, layer: Mapping[str, Tensor], prefix: str, shape: ModelShape) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension."""
    if shape.rms_norm:
        scale = (x.square().mean(dim=-1, keepdim=True) + shape.norm_epsilon).rsqrt()
        return x * scale * layer[prefix + "weight"]
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + shape.norm_epsilon).rsqrt()
    return centred * scale * layer[prefix + "weight"] + layer[prefix + "bias"]


def _linear(x: Tensor, layer: Mapping[str, Tensor], name: str, shape: ModelShape) -> Tensor:
    product = x @ layer[name + ".weight"].T
    return product + layer[name + ".bias"] if shape.biases else product


def _attention(x: Tensor, layer: Mapping[str, Tensor], shape: ModelShape) -> Tensor:
    """Causal self-attention over one session; (n, hidden) to (n, hidden).

    The rows of `linear_qkv` are, group by group: the group's queries, its key, its value.
    """
    n, heads_per_group = len(x), shape.num_heads // shape.num_groups
    qkv = _linear(x, layer, "self_attention.linear_qkv", shape)
    # (n, rows) -> (groups, queries and key and value, n, head size)
    qkv = qkv.view(n, shape.num_groups, heads_per_group + 2, -1).permute(1, 2, 0, 3)
    query, key, value = qkv.split([heads_per_group, 1, 1], dim=1)
    if shape.rotary:
        query, key = _rotate(query, shape.rotary_base), _rotate(key, shape.rotary_base)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    future = torch.ones(n, n, dtype=torch.bool).triu(diagonal=1)
    attended = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value
    # (groups, heads of a group, n, head size) -> (n, heads * head size)
    attended = attended.permute(2, 0, 1, 3).reshape(n, -1)
    return _linear(attended, layer, "self_attention.linear_proj", shape)


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding, (..., n, d): dimensions i and i + d/2 turn by position * base^(-2i/d)."""
    n, half = x.shape[-2], x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(n, dtype=x.dtype)[:, None] * speed
    first, second = x.split(half, dim=-1)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
        dim=-1,
    )


def _mlp(x: Tensor, layer: Mapping[str, Tensor], prefix: str, shape: ModelShape) -> Tensor:
    """Two linear layers with SwiGLU or GELU between them."""
    inner = _linear(x, layer, prefix + "fc1", shape)
    if shape.gated:
        gate, linear = inner.chunk(2, dim=-1)
        inner = gate * gate.sigmoid() * linear
    else:
        # The tanh form, which Megatron's fused bias and GELU computes.
        cubic = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
        inner = 0.5 * inner * (1 + cubic.tanh())
    return _linear(inner, layer, prefix + "fc2", shape)


def _mixture_of_experts(
    x: Tensor, layer: Mapping[str, Tensor], shape: ModelShape
) -> tuple[Tensor, float]:
    """Each token's best k experts, weighted by a softmax over their k logits; and the margin.

    The margin is the least difference of any token between the last logit that was chosen and
    the first that was not: where it is near the rounding error, other arithmetic chooses others.
    """
    k = shape.experts_per_token
    ranked, order = (x @ layer["mlp.router.weight"].T).sort(dim=-1, descending=True)
    share = ranked[:, :k].softmax(dim=-1)
    outputs = torch.zeros_like(x)
    experts = {f"fc{i}.weight": layer[f"mlp.experts.experts.linear_fc{i}.weight"] for i in (1, 2)}
    for number in range(len(experts["fc1.weight"])):
        expert = {name: tensor[number] for name, tensor in experts.items()}
        token, rank = (order[:, :k] == number).nonzero(as_tuple=True)
        output = _mlp(x[token], expert, "", shape) * share[token, rank, None]
        outputs = outputs.index_add(0, token, output)
    return outputs, (ranked[:, k - 1] - ranked[:, k]).min().item()
