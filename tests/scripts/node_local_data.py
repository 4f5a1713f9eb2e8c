"""Trains with "@" in the flags replaced by the rank, as if every rank had files of its own."""

import os
import sys

from megatron_multiturn import megatron_compat

if __name__ == "__main__":
    sys.argv = [argument.replace("@", os.environ["RANK"]) for argument in sys.argv]
    megatron_compat.run_gpt()
