"""`python -m streamfs`."""

import sys

from streamfs.cli import main

if __name__ == "__main__":
    sys.exit(main())
