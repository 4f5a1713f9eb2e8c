"""Show a packed row, a session or the statistics of a preprocessed dataset; see --help."""

import sys

from megatron_multiturn.inspection import main

if __name__ == "__main__":
    sys.exit(main())
