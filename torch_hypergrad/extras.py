"""What parts of the package need beyond torch, higher and tqdm."""

from importlib.util import find_spec


def check_installed(extra: str, *packages: str) -> None:
    """Raises ModuleNotFoundError, with the remedy, for packages that a part of this one needs and that are
    not installed.

    Args:
        extra: what brings them: ``pip install 'torch-hypergrad[extra]'``.
        packages: as they are imported.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"This part of torch_hypergrad needs {', '.join(missing)}, which is not installed: pip install "
            f"'torch-hypergrad[{extra}]'.",
            name=missing[0],
        )
