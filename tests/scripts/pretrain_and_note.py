"""A training script in the manner of pretrain_gpt.py that notes which rows it trains on, and when.

Run by the tests as SCRIPT.py of `python -m megatron_multiturn`. In the folder RECORD_DIR every rank
writes, line by line as it goes, so that a rank that is killed leaves what it has done:

    pid-R          its process
    rows-R.jsonl   a line a micro-batch: how many rows were consumed before the step, and a hash of
                   the tokens and of the divisor of every row it read
    losses.jsonl   from the last rank, a line a step: the same number, and each reduced loss
"""

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_multiturn import forward

RECORD_DIR = Path(os.environ["RECORD_DIR"])


def note(name, content):
    with (RECORD_DIR / name).open("a") as file:
        file.write(json.dumps(content) + "\n")


def note_training():
    rank = int(os.environ["RANK"])
    RECORD_DIR.mkdir(parents=True, exist_ok=True)
    (RECORD_DIR / f"pid-{rank}").write_text(str(os.getpid()))
    next_rows, train_step = forward._next_rows, training.train_step

    def noted_rows(data_iterator, model, args):
        rows = next_rows(data_iterator, model, args)
        hashes = [
            hashlib.sha256(tokens.numpy().tobytes() + divisor.numpy().tobytes()).hexdigest()[:12]
            for tokens, divisor in zip(rows["tokens"], rows["turn_num"], strict=True)
        ]
        note(f"rows-{rank}.jsonl", {"consumed": args.consumed_train_samples, "rows": hashes})
        return rows

    def noted_step(*args, **kwargs):
        consumed = get_args().consumed_train_samples
        result = train_step(*args, **kwargs)
        if result[0] and rank == torch.distributed.get_world_size() - 1:
            losses = {name: float(value) for name, value in result[0].items()}
            note("losses.jsonl", {"consumed": consumed, **losses})
        return result

    forward._next_rows, training.train_step = noted_rows, noted_step


if __name__ == "__main__":
    # As in a process that torchrun has started; the tests' are children of a server.
    multiprocessing.set_start_method("fork", force=True)
    args = parse_and_validate_args()
    note_training()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, None, ModelType.encoder_or_decoder, None)
