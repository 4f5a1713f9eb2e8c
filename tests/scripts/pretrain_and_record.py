"""A training script in the manner of pretrain_gpt.py that writes down what it computes.

Run by the tests as SCRIPT.py of `python -m megatron_multiturn`. Beside a training run it records,
in the folder RECORD_DIR:

    losses.jsonl       one line a step: each reduced loss, in full precision
    initial/           a recording (megatron_multiturn.recording) of the parameters before the
                       first step, unless they came from INITIAL_PARAMETERS, such a folder of
                       another run
    gradients-N/       the gradients of step N before the optimizer, likewise
    parameters/        the parameters after the last step, likewise

With the variable MUTANT it records what this rank holds by itself: `local-gradients`, whatever
the reduction has left in them, or `stale-parameters`, without those that others have updated.

Its own datasets and loss, used with `--dataset-provider megatron`, are the split form that the
packed rows must equal: one sample a row, causal attention over it, each sample's loss a weighted
mean over its tokens, and Megatron's default mean over samples. It shares no code with the
package: it reads the indexed dataset by Megatron's own reader.
"""

import json
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain, training

from megatron_multiturn import recording
from megatron_multiturn.recording import (
    Recording,
    gradient_parts,
    load_parameters,
    parameter_parts,
    save_parts,
)

RECORD_DIR = Path(os.environ["RECORD_DIR"])


class SplitSamples(torch.utils.data.Dataset):
    """The samples that a session is split into, each padded to a row of its own.

    form   turn     one sample a turn, the turn scored
           session  one sample a session, its turns scored alike
           prefix   one sample a prefix of k turns, its k turns scored alike
    """

    def __init__(self, prefix: str, form: str, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.samples = []
        documents = IndexedDataset(prefix, multimodal=True)
        bounds = documents.document_indices
        for begin, end in pairwise(bounds):
            segments, modes = documents[begin:end]
            self.samples += split_session(segments, modes, form)

    def __len__(self) -> int:
        return 1000 * len(self.samples)  # a step a pass: more than any test takes

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, weights = self.samples[index % len(self.samples)]
        length = self.sequence_length
        padded = torch.zeros(length + 1, dtype=torch.int64)
        padded[: len(tokens)] = torch.tensor(tokens[: length + 1])
        row_weights = torch.zeros(length)
        row_weights[: len(weights) - 1] = torch.tensor(weights[1:])
        return {
            "tokens": padded[:-1],
            "labels": padded[1:],
            "weights": row_weights,
            "position_ids": torch.arange(length),
        }


def split_session(segments, modes, form):
    """[(tokens, weight of each token's loss)] of one session; the weights of a sample sum to 1."""
    tokens, turn_of_token, turn = [], [], -1
    for segment, mode in zip(segments, modes, strict=True):
        turn += mode & 3 == 1
        turn_of_token += [turn if mode & 3 else -1] * len(segment)
        tokens += segment.tolist()
    turn_of_token[0] = -1  # nothing predicts a session's first token
    turns = {}
    for index, turn in enumerate(turn_of_token):
        if turn >= 0:
            turns.setdefault(turn, []).append(index)
    turns = list(turns.values())
    ranges = {
        "turn": [(k, k + 1) for k in range(len(turns))],
        "session": [(0, len(turns))],
        "prefix": [(0, k + 1) for k in range(len(turns))],
    }[form]
    samples = []
    for first, last in ranges:
        stop = turns[last - 1][-1] + 1
        weights = [0.0] * stop
        for scored in turns[first:last]:
            for index in scored:
                weights[index] = 1 / (len(scored) * (last - first))
        samples.append((tokens[:stop], weights))
    return samples


def split_provider(num_samples, vp_stage=None):
    args = get_args()
    form = os.environ["SPLIT_FORM"]
    return SplitSamples(args.data_path[0], form, args.seq_length), None, None


split_provider.is_distributed = True


def split_loss(weights, output_tensor):
    loss = (output_tensor.float() * weights).sum()
    return loss, {"lm loss": loss.detach().clone()}  # Megatron divides `loss` in place


def split_forward_step(data_iterator, model):
    batch = {name: tensor.cuda() for name, tensor in next(data_iterator).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(split_loss, batch["weights"])


def save(parts, name):
    save_parts(RECORD_DIR / name, parts, rank=torch.distributed.get_rank())


def record_training():
    """Hook Megatron's training loop so that it writes down losses, gradients, parameters."""
    read_parameters = parameter_parts
    if os.environ.get("MUTANT") == "local-gradients":
        recording._gather_bucket = lambda bucket, gradients, ranks: gradients
    elif os.environ.get("MUTANT") == "stale-parameters":
        read_parameters = recording._parts
    setup, train_step = training.setup_model_and_optimizer, training.train_step
    state = {"step": 0}

    def recording_setup(*args, **kwargs):
        model, optimizer, scheduler = setup(*args, **kwargs)
        if "INITIAL_PARAMETERS" in os.environ:
            initial = Recording(Path(os.environ["INITIAL_PARAMETERS"]))
            load_parameters(model, optimizer, initial)
        else:
            save(parameter_parts(model), "initial")
        step = optimizer.step

        def recording_step(*args, **kwargs):
            save(gradient_parts(model), f"gradients-{state['step']}")
            return step(*args, **kwargs)

        optimizer.step = recording_step
        state["model"] = model
        return model, optimizer, scheduler

    def recording_train_step(*args, **kwargs):
        result = train_step(*args, **kwargs)
        if result[0] and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            losses = {name: float(value) for name, value in result[0].items()}
            with (RECORD_DIR / "losses.jsonl").open("a") as file:
                file.write(json.dumps(losses) + "\n")
        state["step"] += 1
        if state["step"] == get_args().train_iters:
            save(read_parameters(state["model"]), "parameters")
        return result

    training.setup_model_and_optimizer = recording_setup
    training.train_step = recording_train_step


if __name__ == "__main__":
    # Not of every version whose training `checkout_and_record.py` records.
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    record_training()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, split_provider, ModelType.encoder_or_decoder, split_forward_step)
