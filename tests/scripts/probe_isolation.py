"""Changes one token of one piece of a packed row and prints which logits of a real GPT change.

Run as SCRIPT.py of `python -m megatron_multiturn`. Prints one JSON line: for each piece of the
row, the largest change of its logits; and the changed piece and position. With the environment
variable ATTENTION=whole-row the boundaries say that the row is one piece: the mutant.
"""

import json
import os
from itertools import pairwise

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_multiturn.attention import packed_rows
from megatron_multiturn.provider import train_valid_test_datasets_provider


def logits(model, row, cu_seqlens):
    length = row["tokens"].shape[1]
    boundaries = packed_rows(cu_seqlens[0].unique(), sequence_length=length, device="cpu")
    with torch.no_grad():
        return model(row["tokens"], row["position_ids"], None, packed_seq_params=boundaries)


def probe(model):
    train, _, _ = train_valid_test_datasets_provider([1, 0, 0])
    index = max(range(len(train)), key=lambda i: len(train.plan.pieces_of_row(i)))
    row = {name: torch.from_numpy(array)[None] for name, array in train[index].items()}
    bounds = row["cu_seqlens"].unique().tolist()
    cu_seqlens = row["cu_seqlens"]
    if os.environ.get("ATTENTION") == "whole-row":
        cu_seqlens = torch.tensor([[0, row["tokens"].shape[1]]], dtype=torch.int32)
    changed_piece = len(bounds) // 2 - 1
    position = (bounds[changed_piece] + bounds[changed_piece + 1]) // 2
    before = logits(model, row, cu_seqlens)
    row["tokens"][0, position] = (row["tokens"][0, position] + 1) % get_args().padded_vocab_size
    change = (logits(model, row, cu_seqlens) - before).abs().amax(dim=(0, 2))
    print(
        json.dumps(
            {
                "changed_piece": changed_piece,
                "change_by_piece": [float(change[a:b].max()) for a, b in pairwise(bounds)],
                "change_before_position": float(change[bounds[changed_piece] : position].max()),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    args = parse_and_validate_args()

    def no_training(*positional, **keywords):
        model = setup(*positional, **keywords)[0]
        probe(model[0].eval())
        raise SystemExit(0)

    setup = training.setup_model_and_optimizer
    training.setup_model_and_optimizer = no_training
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, None, ModelType.encoder_or_decoder, None)
