"""Tensors that the ranks of a job saved in parts, put together again."""

from megatron_multiturn.recording import whole_tensors

__all__ = ["whole_tensors"]
