"""pretrain_and_record.py in which `--packed-attention auto` takes Transformer Engine's kernel.

By itself it does so for pieces much longer than those of a test.
"""

import runpy
from pathlib import Path

from megatron_multiturn import attention

if __name__ == "__main__":
    attention._BREAK_EVEN_WORK = 0
    script = Path(__file__).with_name("pretrain_and_record.py")
    runpy.run_path(str(script), run_name="__main__")
