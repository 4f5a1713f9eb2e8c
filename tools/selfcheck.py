#!/usr/bin/env python3
"""A job in its own layout against one rank; the same as the installed megatron-multiturn-selfcheck.

Under torchrun: torchrun --nproc-per-node 8 tools/selfcheck.py [SCRIPT.py] <the job's flags>
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_multiturn.selfcheck import main

if __name__ == "__main__":
    # The ranks of the job are children of this process, and import the package too.
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    sys.exit(main())
