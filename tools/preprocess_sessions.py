#!/usr/bin/env python3
"""Raw sessions -> dataset; the same as the installed megatron-multiturn-preprocess."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_multiturn.preprocess import run_command

if __name__ == "__main__":
    run_command()
