"""Megatron's own layers with packed attention in them, and norms that know sequence parallelism.

The spec of the layers that Megatron is about to build is changed, see `megatron_hooks.hook_model`.
`--spec` would do for some versions only, and would stand in the checkpoint.
"""

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.attention import PackedAttention
from megatron_multiturn.errors import ConfigError

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class PackedNorm:
    """Builds PyTorch's norm in the way that Megatron's layer specs build theirs.

    With sequence parallelism each tensor parallel rank normalizes its own positions; Megatron
    sums the gradients of the parameters that are marked so. Its own wrapper of PyTorch's norms
    refuses sequence parallelism for want of the mark.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        if config.normalization not in _NORMS or config.layernorm_zero_centered_gamma:
            raise ConfigError(
                f"--normalization {config.normalization}, --apply-layernorm-1p "
                f"{config.layernorm_zero_centered_gamma}: without Transformer Engine there are "
                f"{' and '.join(_NORMS)}, not centered at zero"
            )
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def adapt_layer_spec(spec: Any, config: Any, vp_stage: int | None, *, kernels: str) -> Any:
    """The spec of this pipeline stage's layers with packed attention in it.

    spec: Megatron's, of one layer or of a block; its layers are changed in place.
    config: the model's `TransformerConfig`.
    kernels: of attention, see `PackedAttention`.
    """
    block = megatron.block_spec(spec, config, vp_stage)
    for layer in block.layer_specs:
        _keep_pieces_apart(layer, config.transformer_impl, kernels)
    if config.transformer_impl == "local":
        block.layer_norm = PackedNorm
    return block


def adapt_mtp_spec(block: Any, config: Any, *, kernels: str) -> None:
    """The same, in place, for Megatron's spec of multi-token prediction layers."""
    for layer in block.layer_specs:
        _keep_pieces_apart(layer.submodules.mtp_model_layer, config.transformer_impl, kernels)
        if config.transformer_impl == "local":
            layer.submodules.enorm = layer.submodules.hnorm = PackedNorm
            layer.submodules.layer_norm = PackedNorm


def _keep_pieces_apart(layer: Any, transformer_impl: str, kernels: str) -> None:
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=PackedAttention, params={"kernels": kernels})
    if transformer_impl == "local":
        layer.submodules.input_layernorm = PackedNorm
        layer.submodules.pre_mlp_layernorm = PackedNorm
        for name in ("q_layernorm", "k_layernorm"):
            # Else it is the identity, or an L2 norm, which has no parameters.
            if getattr(attention, name) in megatron.local_norms():
                setattr(attention, name, PackedNorm)
