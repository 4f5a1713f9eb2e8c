"""Stock Megatron on rows of one session each, with the auxiliary losses that its flags ask for.

Run as SCRIPT.py with `--dataset-provider megatron`: Megatron's own attention, its default mean
over micro-batches of each one's mean, and nothing of the package's. Records what
pretrain_and_record records. STOCK_WEIGHTS says what the mean of a row is over: `turn` or `token`.
"""

import os
from functools import partial

from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from pretrain_and_record import SplitSamples, record_training


class SessionRows(SplitSamples):
    """Each session a row; its turns, or its target tokens, weigh alike."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        tokens, _ = self.samples[index % len(self.samples)]
        weights = row.pop("weights")
        if os.environ["STOCK_WEIGHTS"] == "token":
            weights = (weights > 0).float()
        else:
            weights = weights / weights[weights > 0].min()  # a sum that Megatron does not clamp
        row["loss_mask"] = weights
        row["padding_mask"] = row["position_ids"] >= len(tokens) - 1
        return row


def provider(num_samples, vp_stage=None):
    args = get_args()
    return SessionRows(args.data_path[0], "session", args.seq_length), None, None


provider.is_distributed = True


def loss_func(loss_mask, output_tensor):
    loss = (output_tensor.float() * loss_mask).sum() / loss_mask.sum()
    return loss, {"lm loss": loss.detach().clone()}


def forward_step(data_iterator, model):
    batch = {name: tensor.cuda() for name, tensor in next(data_iterator).items()}
    assert get_attr_wrapped_model(model, "pre_process"), "written for one pipeline stage"
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        padding_mask=batch["padding_mask"] if get_args().num_experts else None,
    )
    return output, partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    args = parse_and_validate_args()
    record_training()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, provider, ModelType.encoder_or_decoder, forward_step)
