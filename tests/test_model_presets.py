"""launch/models: the shapes are those that are published."""

from pathlib import Path

import pytest
from launch_scripts import SETTINGS, dry_run, parsed, run_script

# Layers, width, feed-forward, heads, groups, bias, RoPE base, epsilon; tokens and embedded tokens;
# parameters as published.
PUBLISHED = {
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, True, 1e6, 1e-6, 151665, 152064, 7_615_616_512),
    "llama3-8b": (32, 4096, 14336, 32, 8, False, 5e5, 1e-5, 128256, 128256, 8_030_261_248),
}


@pytest.mark.parametrize("tensor_parallel", ["1", "2", "8"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_shapes(model: str, tensor_parallel: str, repository: Path) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    args = parsed(dry_run(repository, MODEL=model, TENSOR_PARALLEL=tensor_parallel))
    *shape, num_tokens, num_embedded, num_parameters = PUBLISHED[model]
    assert shape == [
        *(args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads),
        *(args.num_query_groups, args.add_qkv_bias, args.rotary_base, args.layernorm_epsilon),
    ]
    args.rank = 0
    assert vocab_size_with_padding(num_tokens, args, logging_enabled=False) == num_embedded
    assert args.group_query_attention
    assert args.swiglu
    assert args.normalization == "RMSNorm"
    assert not args.add_bias_linear
    width, kv_width = args.hidden_size, args.num_query_groups * args.hidden_size // shape[3]
    attention = width * (width + 2 * kv_width) + width * width
    if args.add_qkv_bias:
        attention += width + 2 * kv_width
    layer = attention + 3 * width * args.ffn_hidden_size + 2 * width
    assert args.untie_embeddings_and_output_weights
    assert 2 * num_embedded * width + args.num_layers * layer + width == num_parameters


def test_every_preset_is_a_model(repository: Path, tmp_path: Path) -> None:
    presets = sorted(path.stem for path in (repository / "launch/models").glob("*.sh"))
    assert presets == sorted(["tiny", "gpt-0.3b", "gpt-1.3b", *PUBLISHED])
    for name in presets:
        args = parsed(dry_run(repository, MODEL=name))
        assert args.num_layers
        assert args.seq_length == args.max_position_embeddings >= 256
    assert parsed(dry_run(repository, MODEL="tiny", SEQ_LENGTH="64")).seq_length == 64
    mine = tmp_path / "mine.sh"
    mine.write_text("SEQ_LENGTH=32 model=(--num-layers 3)\n")
    assert parsed(dry_run(repository, MODEL=str(mine))).num_layers == 3
    script = repository / "launch/pretrain_torchrun.sh"
    done = run_script(script, DRY_RUN="1", **SETTINGS, MODEL="big")
    assert done.returncode == 1
    assert "MODEL=big: there is no " in done.stderr
    assert "gpt-0.3b gpt-1.3b llama3-8b qwen2.5-7b tiny\n" in done.stderr
