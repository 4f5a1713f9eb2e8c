"""The models and the layouts of the layout tests.

`llama` has rotary positions, grouped queries, RMSNorm, SwiGLU and untied embeddings; `gpt2`
learned positions, LayerNorm, GELU, biases and tied embeddings; `moe` is `llama` with four experts
of which each token takes two.

A layout is written in words: DP, TP, PP, CP, EP and a number are parallel sizes, VPP2 two virtual
stages a pipeline rank, mb the micro-batch size; the other words are in `_FLAGS`.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
from layout_sessions import SEED, SEQUENCE_LENGTH
from oracle import AdamSettings, Parameters
from oracle_model import ModelShape

STEPS = 3
LOGGED_TURNS = 3
ADAM = AdamSettings(learning_rate=1e-2, epsilon=1e-3)

_LAYERS, _HIDDEN, _HEADS, _INNER, _EXPERTS = 4, 64, 8, 96, 4
_PADDED_VOCABULARY = 128
_PARAMETER_SEED = 25  # no token is near two experts alike, see `layout_reference.oracle_of`


@dataclass(frozen=True, slots=True)
class Model:
    flags: str  # to Megatron
    shape: ModelShape


_SHARED_FLAGS = (
    f"--num-layers {_LAYERS} --hidden-size {_HIDDEN} --num-attention-heads {_HEADS} "
    f"--ffn-hidden-size {_INNER} --attention-dropout 0 --hidden-dropout 0 "
    f"--seq-length {SEQUENCE_LENGTH} --max-position-embeddings {SEQUENCE_LENGTH} "
    f"--make-vocab-size-divisible-by 32 --seed {SEED} --log-turn-index {LOGGED_TURNS} "
)
_LLAMA_FLAGS = (
    "--position-embedding-type rope --group-query-attention --num-query-groups 4 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
)
_LLAMA = ModelShape(
    num_heads=_HEADS,
    num_groups=4,
    rotary=True,
    rms_norm=True,
    gated=True,
    biases=False,
    tied=False,
)
MODELS = {
    "llama": Model(_SHARED_FLAGS + _LLAMA_FLAGS, _LLAMA),
    "gpt2": Model(
        _SHARED_FLAGS + "--position-embedding-type learned_absolute",
        ModelShape(
            num_heads=_HEADS,
            num_groups=_HEADS,
            rotary=False,
            rms_norm=False,
            gated=False,
            biases=True,
            tied=True,
        ),
    ),
    "moe": Model(
        _SHARED_FLAGS + _LLAMA_FLAGS + f"--num-experts {_EXPERTS} --moe-router-topk 2 "
        f"--moe-ffn-hidden-size {_INNER} --moe-router-load-balancing-type none",
        replace(_LLAMA, experts_per_token=2),
    ),
}

# Those marked * are in the quick part of the suite.
_TABLE = """
llama  mb1
llama  mb4 *
gpt2   mb1
moe    mb2
llama  mb2 recompute-full
llama  mb2 recompute-selective
llama  DP2 mb4
gpt2   DP2 mb1
llama  DP4 mb1 *
llama  DP8 mb1
llama  DP2 mb2 overlap-reduce
llama  DP2 mb2 sharded-optimizer
llama  DP2 mb2 sharded-optimizer overlap *
llama  DP4 mb1 sharded-optimizer
gpt2   DP4 mb1 sharded-optimizer overlap
llama  TP2 mb4
llama  TP2 SP mb4 *
gpt2   TP2 SP mb2
llama  TP4 SP mb4
gpt2   PP2 mb2 *
llama  PP2 mb1 recompute-full
llama  PP2 VPP2 mb2 *
llama  PP4 mb2
gpt2   PP4 mb1
gpt2   PP2 VPP2 DP2 mb2
llama  CP2 mb4 *
llama  CP2 mb1
gpt2   CP2 mb2
llama  CP4 mb4
llama  CP2 DP2 mb2
llama  CP2 TP2 mb4
llama  CP2 TP2 SP mb4 recompute-selective
gpt2   CP2 PP2 mb2
llama  CP2 PP2 VPP2 mb2
moe    EP2 DP2 mb4 *
moe    EP4 DP4 mb1
moe    EP2 DP4 mb2 sharded-optimizer overlap all-to-all
moe    EP2 DP2 TP2 SP mb4
moe    EP2 TP2 SP mb4 all-to-all whole-experts
moe    EP2 DP2 PP2 mb2
moe    EP2 CP2 mb4
llama  TP2 PP2 DP2 mb2
gpt2   TP2 SP PP2 DP2 mb2 sharded-optimizer overlap
llama  TP2 CP2 DP2 mb4
llama  PP2 CP2 DP2 mb2 sharded-optimizer
llama  TP2 SP PP2 CP2 mb2 recompute-full
moe    EP4 CP2 DP4 mb2 sharded-optimizer
"""
_FLAGS = {
    "SP": "--sequence-parallel",
    "VPP2": "--num-virtual-stages-per-pipeline-rank 2",
    "sharded-optimizer": "--use-distributed-optimizer",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "overlap-reduce": "--overlap-grad-reduce",
    "recompute-full": "--recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "recompute-selective": "--recompute-granularity selective",
    "all-to-all": "--moe-token-dispatcher-type alltoall",
    "whole-experts": "--expert-tensor-parallel-size 1",
}
_SIZE_FLAGS = {
    "mb": "--micro-batch-size",
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "CP": "--context-parallel-size",
    "EP": "--expert-model-parallel-size",
}
_SIZED = rf"(DP|{'|'.join(_SIZE_FLAGS)})\d"


@dataclass(frozen=True, slots=True)
class Layout:
    """A model and how it is laid out over ranks."""

    model: str
    words: str

    def __str__(self) -> str:
        return f"{self.model} {self.words}"

    def size(self, word: str) -> int:
        """The number after `word`; 1 where there is none."""
        found = re.search(rf"\b{word}(\d+)", self.words)
        return int(found[1]) if found else 1

    @property
    def num_ranks(self) -> int:
        return math.prod(map(self.size, ("DP", "TP", "PP", "CP")))

    @property
    def flags(self) -> list[str]:
        """Megatron's, of the model and of the layout."""
        flags = [MODELS[self.model].flags]
        flags += [f"{flag} {self.size(word)}" for word, flag in _SIZE_FLAGS.items()]
        flags += [_FLAGS[word] for word in self.words.split() if word in _FLAGS]
        return " ".join(flags).split()


def _read_table() -> tuple[list[Layout], list[Layout]]:
    quick: list[Layout] = []
    slow: list[Layout] = []
    for line in _TABLE.strip().splitlines():
        model, words = line.rstrip(" *").split(maxsplit=1)
        unknown = [w for w in words.split() if w not in _FLAGS and not re.fullmatch(_SIZED, w)]
        assert not unknown, unknown
        (quick if line.endswith("*") else slow).append(Layout(model, words))
    return quick, slow


QUICK_LAYOUTS, SLOW_LAYOUTS = _read_table()


def random_parameters(shape: ModelShape) -> Parameters:
    """Parameters with which every model begins, float32; no norm is 1 and no bias 0.

    Under the names, and in the shapes, of a checkpoint of Megatron's.
    """
    head = _HIDDEN // shape.num_heads
    qkv, inner = (shape.num_heads + 2 * shape.num_groups) * head, _INNER * (1 + shape.gated)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (_PADDED_VOCABULARY, _HIDDEN),
        "decoder.layers.self_attention.linear_qkv.weight": (_LAYERS, qkv, _HIDDEN),
        "decoder.layers.self_attention.linear_proj.weight": (_LAYERS, _HIDDEN, _HIDDEN),
    }
    if not shape.rotary:
        shapes["embedding.position_embeddings.weight"] = (SEQUENCE_LENGTH, _HIDDEN)
    if not shape.tied:
        shapes["output_layer.weight"] = (_PADDED_VOCABULARY, _HIDDEN)
    mlp = "decoder.layers.mlp."
    stack: tuple[int, ...] = (_LAYERS,)
    if shape.experts_per_token:
        shapes[mlp + "router.weight"] = (_LAYERS, _EXPERTS, _HIDDEN)
        mlp, stack = mlp + "experts.experts.", (_LAYERS, _EXPERTS)
    shapes[mlp + "linear_fc1.weight"] = (*stack, inner, _HIDDEN)
    shapes[mlp + "linear_fc2.weight"] = (*stack, _HIDDEN, _INNER)
    if shape.biases:
        shapes |= {
            name.replace("weight", "bias"): size[:-1]
            for name, size in shapes.items()
            if ".linear_" in name
        }
    norms = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (_LAYERS, _HIDDEN),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (_LAYERS, _HIDDEN),
        "decoder.final_layernorm.weight": (_HIDDEN,),
    }
    if not shape.rms_norm:
        shapes |= {name.replace("weight", "bias"): size for name, size in norms.items()}
    generator = torch.Generator().manual_seed(_PARAMETER_SEED)
    parameters = {n: 0.1 * torch.randn(size, generator=generator) for n, size in shapes.items()}
    for name, size in norms.items():
        parameters[name] = 1 + 0.1 * torch.randn(size, generator=generator)
    return parameters
