"""`python -m loongforge.kernels.bench`."""

import sys

from loongforge.kernels.bench.command import command

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
