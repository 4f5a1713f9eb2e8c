#!/usr/bin/env python3
"""Shards -> dataset; the same as the installed megatron-multiturn-merge."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_multiturn.merge import main

if __name__ == "__main__":
    sys.exit(main())
