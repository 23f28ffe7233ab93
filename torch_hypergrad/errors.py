"""The errors of torch_hypergrad. Bad arguments are plain ``TypeError`` or ``ValueError``."""


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
