"""``python -m torch_hypergrad`` is the command ``torch-hypergrad``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
