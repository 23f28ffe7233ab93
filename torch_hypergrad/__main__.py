"""``python -m torch_hypergrad`` is the command ``torch-hypergrad``."""

import sys
from importlib import import_module


def main() -> int:
    """Runs the command, or says in one line what must be installed for it."""
    try:
        import_module(f"{__package__}.experiment")
    except ModuleNotFoundError as error:
        print(f"torch-hypergrad: error: {error}", file=sys.stderr)
        return 2
    from .cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
