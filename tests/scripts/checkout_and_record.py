"""Runs the pretrain_gpt.py of the checkout CHECKOUT, and records what it computes.

SCRIPT.py of `python -m megatron_multiturn`, copied into that checkout's folder or with it first on
PYTHONPATH; see `pretrain_and_record.py` for what is recorded, and where.
"""

import os
import runpy
from pathlib import Path

import megatron.training
from pretrain_and_record import record_training

CHECKOUT = Path(os.environ["CHECKOUT"])

assert Path(megatron.training.__file__).is_relative_to(CHECKOUT), megatron.training.__file__
record_training()
runpy.run_path(str(CHECKOUT / "pretrain_gpt.py"), run_name="__main__")
