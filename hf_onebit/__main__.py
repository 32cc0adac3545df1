"""``python -m hf_onebit``: the command line, for launchers that start modules (torchrun, accelerate)."""

import sys

from hf_onebit.cli import main

if __name__ == "__main__":
    sys.exit(main())
