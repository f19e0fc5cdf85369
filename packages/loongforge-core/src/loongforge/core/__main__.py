"""`python -m loongforge.core`: the same as `loongforge`, for launchers that start modules."""

import sys

from loongforge.core.cli import main

if __name__ == "__main__":
    sys.exit(main())
