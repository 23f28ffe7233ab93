"""The errors of torch_hypergrad. Bad arguments are plain ``TypeError`` or ``ValueError``."""

from importlib.util import find_spec


class HypergradientError(RuntimeError):
    """A hypergradient could not be computed. Values, weights and optimizer state are as before the call."""


class TrajectoryError(HypergradientError):
    """The recorded training steps cannot be replayed: nothing recorded, or something changed since."""


class NonFiniteError(HypergradientError):
    """A loss or a hypergradient is infinite or not a number."""


class SolverError(HypergradientError):
    """The linear solve of the implicit method failed: divergence, or a matrix that is not positive
    definite."""


class NotTwiceDifferentiableError(HypergradientError):
    """The training loss has no second derivative that autograd can compute."""


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
