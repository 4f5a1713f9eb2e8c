"""stock_rows.py, which also records what pretrain_and_record records.

Run as SCRIPT.py with `--dataset-provider megatron`. Without Transformer Engine Megatron has no
attention that trains on a GPU: `--spec whole_row_attention whole_row_layer_spec` takes that of the
benchmarks, which sees each row as one piece.
"""

import sys
from pathlib import Path

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from pretrain_and_record import record_training
from stock_rows import forward_step, provider

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

if __name__ == "__main__":
    args = parse_and_validate_args()
    record_training()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, provider, ModelType.encoder_or_decoder, forward_step)
