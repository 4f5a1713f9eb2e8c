"""The oracle of the layout tests, against models that others wrote and numbers worked by hand."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_sessions import write_layout_sessions
from layouts import MODELS, random_parameters
from oracle import (
    AdamSettings,
    Parameters,
    Session,
    gradients_of,
    read_sessions,
    target_weights,
    train,
)
from oracle_model import ModelShape, token_losses
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOKENS = torch.randint(0, 100, (60,), generator=torch.Generator().manual_seed(1))


class Float64(TorchFunctionMode):
    """Computes in float64 what asks for float32, as some layers of transformers insist on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def layer_of(parameters: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The parameters of a layer, by the last parts of their names."""
    prefix = "decoder.layers."
    return {
        name.removeprefix(prefix).removeprefix("self_attention.").removeprefix("mlp."): t[number]
        for name, t in parameters.items()
        if name.startswith(prefix)
    }


def split_qkv(qkv: Tensor, shape: ModelShape) -> list[Tensor]:
    """The rows of queries, of keys and of values."""
    per_group = shape.num_heads // shape.num_groups
    by_head = qkv.unflatten(0, (shape.num_groups, per_group + 2, -1))
    return [part.flatten(0, 2) for part in by_head.split([per_group, 1, 1], dim=1)]


def llama(parameters: Parameters, shape: ModelShape) -> Any:
    """transformers' Llama or, with experts, its Mixtral."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    embedding = parameters["embedding.word_embeddings.weight"]
    qkv = parameters["decoder.layers.self_attention.linear_qkv.weight"]
    experts = shape.experts_per_token
    fc2 = "experts.experts.linear_fc2.weight" if experts else "linear_fc2.weight"
    settings: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "intermediate_size": parameters["decoder.layers.mlp." + fc2].shape[-1],
        "num_hidden_layers": len(qkv),
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base},
        "attn_implementation": "sdpa",
    }
    if experts:
        settings |= {"num_local_experts": 4, "num_experts_per_tok": experts}
        settings["experts_implementation"] = "eager"  # the other ones have no float64
        model: Any = MixtralForCausalLM(MixtralConfig(**settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": parameters["decoder.final_layernorm.weight"],
        "lm_head.weight": parameters["output_layer.weight"],
    }
    for number in range(len(qkv)):
        layer, to = layer_of(parameters, number), f"model.layers.{number}."
        q, k, v = split_qkv(layer["linear_qkv.weight"], shape)
        state[to + "self_attn.q_proj.weight"] = q
        state[to + "self_attn.k_proj.weight"] = k
        state[to + "self_attn.v_proj.weight"] = v
        state[to + "self_attn.o_proj.weight"] = layer["linear_proj.weight"]
        state[to + "input_layernorm.weight"] = layer["linear_qkv.layer_norm_weight"]
        state[to + "post_attention_layernorm.weight"] = layer["linear_fc1.layer_norm_weight"]
        if experts:
            state[to + "mlp.gate.weight"] = layer["router.weight"]
            state[to + "mlp.experts.gate_up_proj"] = layer["experts.experts.linear_fc1.weight"]
            state[to + "mlp.experts.down_proj"] = layer["experts.experts.linear_fc2.weight"]
        else:
            gate, up = layer["linear_fc1.weight"].chunk(2)
            state[to + "mlp.gate_proj.weight"] = gate
            state[to + "mlp.up_proj.weight"] = up
            state[to + "mlp.down_proj.weight"] = layer["linear_fc2.weight"]
    model.load_state_dict(state)
    return model


def gpt2(parameters: Parameters, shape: ModelShape) -> Any:
    """transformers' GPT-2, whose linear layers are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    embedding = parameters["embedding.word_embeddings.weight"]
    positions = parameters["embedding.position_embeddings.weight"]
    fc1 = parameters["decoder.layers.mlp.linear_fc1.weight"]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=embedding.shape[0],
            n_positions=len(positions),
            n_embd=embedding.shape[1],
            n_layer=len(fc1),
            n_head=shape.num_heads,
            n_inner=fc1.shape[1],
            attn_implementation="sdpa",
        )
    )
    state = {
        "transformer.wte.weight": embedding,
        "lm_head.weight": embedding,
        "transformer.wpe.weight": positions,
        "transformer.ln_f.weight": parameters["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": parameters["decoder.final_layernorm.bias"],
    }
    for number in range(len(fc1)):
        layer, to = layer_of(parameters, number), f"transformer.h.{number}."
        for kind in ("weight", "bias"):
            state[to + f"ln_1.{kind}"] = layer[f"linear_qkv.layer_norm_{kind}"]
            state[to + f"ln_2.{kind}"] = layer[f"linear_fc1.layer_norm_{kind}"]
            state[to + f"attn.c_attn.{kind}"] = torch.cat(
                split_qkv(layer[f"linear_qkv.{kind}"], shape)
            ).t()
            state[to + f"attn.c_proj.{kind}"] = layer[f"linear_proj.{kind}"].t()
            state[to + f"mlp.c_fc.{kind}"] = layer[f"linear_fc1.{kind}"].t()
            state[to + f"mlp.c_proj.{kind}"] = layer[f"linear_fc2.{kind}"].t()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("name", "build"), [("llama", llama), ("gpt2", gpt2), ("moe", llama)])
def test_token_losses_are_those_of_transformers(
    name: str, build: Callable[[Parameters, ModelShape], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = MODELS[name].shape
    parameters = {n: tensor.double() for n, tensor in random_parameters(shape).items()}
    ours, _ = token_losses(parameters, shape, TOKENS)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64(), torch.no_grad():
            logits = build(parameters, shape).eval()(TOKENS[None]).logits[0]
            theirs = torch.nn.functional.cross_entropy(logits[:-1], TOKENS[1:], reduction="none")
    finally:
        torch.set_default_dtype(default)
    assert theirs.dtype == torch.float64
    assert theirs.std() > 0.1
    assert ours[0] == 0
    torch.testing.assert_close(ours[1:], theirs, rtol=0, atol=1e-10)


def test_sessions_of_a_dataset(tmp_path: Path) -> None:
    flags = write_layout_sessions(tmp_path)
    sessions = read_sessions(flags[-1])
    # A1 c30 A1 c9 B40 C3 c5 D60 c2: the first token is no target, and A goes on behind a gap.
    turns = next(s.turns for s in sessions if len(s.tokens) == 151)
    assert [(turn[0], len(turn)) for turn in turns] == [(31, 1), (41, 40), (81, 3), (89, 60)]
    assert sum(not session.turns for session in sessions) == 5


def test_weights_of_the_averages() -> None:
    sessions = [
        Session(tokens=torch.zeros(4), turns=[[2, 3]]),
        Session(tokens=torch.zeros(3), turns=[]),
        Session(tokens=torch.zeros(6), turns=[[1], [3, 4, 5]]),
    ]
    weights = {
        "turn": [0, 0, 1 / 6, 1 / 6, 0, 0, 0, 0, 1 / 3, 0, 1 / 9, 1 / 9, 1 / 9],
        "session": [0, 0, 1 / 4, 1 / 4, 0, 0, 0, 0, 1 / 4, 0, 1 / 12, 1 / 12, 1 / 12],
        "token": [0, 0, 1 / 6, 1 / 6, 0, 0, 0, 0, 1 / 6, 0, 1 / 6, 1 / 6, 1 / 6],
    }
    for average, expected in weights.items():
        assert torch.cat(target_weights(sessions, average)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_steps_are_those_of_torchs_adam(clip_norm: float | None) -> None:
    shape = MODELS["llama"].shape
    initial = random_parameters(shape)
    batches = [[Session(tokens=TOKENS[i : i + 9], turns=[[3, 4], [6, 7, 8]])] for i in range(3)]
    adam = AdamSettings(learning_rate=0.01, epsilon=1e-4, clip_norm=clip_norm)
    result = train(initial, shape, batches, adam)

    theirs = {n: t.double().requires_grad_() for n, t in initial.items()}
    optimizer = torch.optim.Adam(theirs.values(), lr=0.01, eps=1e-4)
    for batch, gradients in zip(batches, result.gradients, strict=True):
        again = gradients_of(theirs, shape, batch)[1]
        for name, parameter in theirs.items():
            torch.testing.assert_close(gradients[name], again[name], rtol=1e-9, atol=1e-12)
            parameter.grad = again[name]
        if clip_norm is not None:
            assert torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm) > 2 * clip_norm
        optimizer.step()
    for name, parameter in theirs.items():
        torch.testing.assert_close(
            result.parameters[name], parameter.detach(), rtol=1e-9, atol=1e-12
        )
