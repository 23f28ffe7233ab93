"""HyperOptimizer: wires model, optimizer, hyperparameters and method together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .device.capture import recorder_for
from .device.readings import Reading
from .errors import TrajectoryError
from .history.packing import pack_state, unpack_state
from .methods import Method
from .safety.checkpoint import pack_run, unpack_run
from .safety.checks import (
    check_hyper_optimizer,
    check_memory,
    check_not_compiled,
    check_one_process,
    check_rtol,
    check_tuned_tensors,
    check_types,
    parameter_names,
    validation_batches,
)
from .safety.hyper_step import (
    AskedValidation,
    Evaluation,
    HyperReport,
    asked_statistics,
    check_recorded,
    finite_norm,
    move_values,
    num_clipped,
    put_back_on_error,
    read_statistics,
)
from .safety.watch import Watch
from .step.live_model import LiveModel
from .step.live_optimizer import LiveOptimizer
from .step.problem import make_problem
from .step.state import Buffers
from .step.user_functions import GradTransform, Loss
from .tune.hyperparameter_set import HyperparameterSet
from .updates import rule_of

NOT_GIVEN: Any = object()
"""A batch may be anything, None included."""


class HyperOptimizer:
    """Trains a model with a wrapped optimizer and tunes hyperparameters by hypergradients.

    Args:
        model: the model; every parameter of the optimizer must be one of its parameters.
        optimizer: a ``torch.optim`` optimizer, or one with a registered update rule. Its state is kept in its
            own format. Its ``step`` is called by :class:`Implicit` alone, while settings are tuned per group,
            if at all; else :meth:`step` takes its place.
        train_loss: ``train_loss(model, batch) -> scalar tensor``. It is called again on recorded batches, so
            it must read nothing that changes between steps but the model, the batch and the tuned tensors.
        tune: what to tune: :class:`Hyperparameter` for settings of the optimizer; an ``nn.Module`` or a leaf
            tensor that ``train_loss`` reads, or a pair of a name and one of these.
        method: :class:`Unrolled`, :class:`ForwardMode` or :class:`Implicit`.
        hyper_optimizer: makes the optimizer of the hyperparameters from a list of leaf tensors, for instance
            ``functools.partial(torch.optim.Adam, lr=1e-2)``.
        val_loss: ``val_loss(model, batch) -> scalar tensor``. None takes ``train_loss``, which is allowed
            only while all that is tuned are settings of the optimizer.
        grad_transform: a differentiable function from the list of gradients (those that are not None, in the
            order of the optimizer's parameters) to such a list, such as clipping; applied in training and in
            replay.
        capture: on a CUDA device, record the training loss and its gradient in a CUDA graph for each shape of
            batches, and replay it in the place of hundreds of launches; with :class:`Unrolled` double
            backward too, with :class:`Implicit` the whole solve or its products. For a ``train_loss`` that
            does nothing in Python that must be done anew at each step. What cannot be recorded is computed
            eagerly, and one warning says why.

    Raises:
        TypeError, ValueError: for arguments that do not fit, with the reason.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> def train_loss(model, batch):
        ...     x, y = batch
        ...     return (model(x) - y).square().mean()
        >>> from functools import partial
        >>> from torch_hypergrad import Hyperparameter, Unrolled
        >>> hyper = HyperOptimizer(
        ...     model, torch.optim.SGD(model.parameters(), lr=0.1), train_loss, tune=[Hyperparameter("lr")],
        ...     method=Unrolled(), hyper_optimizer=partial(torch.optim.SGD, lr=1e-3))
        >>> batch = torch.ones(2, 3), torch.ones(2, 1)
        >>> for _ in range(5):
        ...     loss = hyper.step(batch)
        >>> report = hyper.hyper_step(batch)
        >>> sorted(hyper.values())
        ['lr/group0']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_loss: Loss,
        tune: Sequence[Any],
        method: Method,
        hyper_optimizer: Callable[[list[Tensor]], Optimizer],
        *,
        val_loss: Loss | None = None,
        grad_transform: GradTransform | None = None,
        capture: bool = False,
    ) -> None:
        check_types(model, optimizer, train_loss, method, hyper_optimizer, val_loss, grad_transform)
        check_one_process(model)
        rule = rule_of(optimizer)
        names = parameter_names(model, optimizer)
        check_memory(model, optimizer)
        tune = [tune] if not isinstance(tune, (list, tuple)) else list(tune)
        hyperparameters = HyperparameterSet(tune, optimizer.param_groups, names, rule)
        method.check(hyperparameters, rule, type(optimizer).__name__)
        if method.needs_second_derivatives:
            check_not_compiled([model, *hyperparameters.modules])
        check_tuned_tensors(hyperparameters, optimizer, val_loss)
        self.model, self.optimizer = model, optimizer
        self._hyperparameters, self._method = hyperparameters, method
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        self._problem = make_problem(
            LiveModel([model, *hyperparameters.modules], optimizer, names, hyperparameters.loss_tensors),
            LiveOptimizer(optimizer, rule, hyperparameters.are_per_weight),
            hyperparameters,
            train_loss,
            train_loss if val_loss is None else val_loss,
            grad_transform,
            recorder_for(weights) if capture else None,
            twice_differentiable=method.replays and method.needs_second_derivatives,
        )
        self._window = method.start(self._problem)
        self.hyper_optimizer = hyper_optimizer([tuned.leaf for tuned in hyperparameters.all])
        check_hyper_optimizer(self.hyper_optimizer, hyperparameters)
        self._watch = Watch(self._problem)
        self._origin = self._problem.live.state()
        self._number = 0
        self._buffers: Buffers | None = None  # before the window's first step

    @property
    def method(self) -> Method:
        """How hypergradients are computed; its ``cost`` is that of a hyper step."""
        return self._method

    # ---- training -----------------------------------------------------------------------------------------

    def step(self, batch: Any) -> Tensor:
        """One training step; the optimizer's ``zero_grad``, ``backward`` and ``step`` in one.

        Args:
            batch: any pytree of tensors (lists, tuples and dicts), given to ``train_loss`` and recorded by
                reference: its tensors must not be changed in place until the next hyper step.

        Returns:
            The training loss before the step, without graph.

        Raises:
            TypeError, ValueError: if ``train_loss`` does not return a scalar tensor with a graph or writes to
                parameters, or a schedule has ended.
            TrajectoryError: if somebody else has written to the parameters, the optimizer's state or the
                hyperparameters since the recording began.
        """
        live, window = self._problem.live, self._window
        self._watch.check(self._number)
        with live.model.autocast_for_losses():
            state = live.state() if window.reads_states else None
            tampered = None if state is None else self._watch.compare(state, self._number)
            step = live.begin(self._number, batch, tampered)
            buffers = live.model.buffers() if state is None or state.buffers is None else state.buffers
            with live.undone_on_error(step, buffers):
                step, after = window.take(step, state)
            if after is not None:
                live.write(after)
        if after is not None and window.checks_parameters:
            self._watch.step_written(after)
        self._buffers = self._buffers or buffers
        self._number += 1
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # LR schedulers look here for the order of calls
        assert step.loss is not None
        return step.loss

    def record(self, batch: Any) -> None:
        """Notes a training batch without moving the weights, for whoever trains by other means: with
        :class:`Implicit` the hypergradient then takes the current weights for the optimum on it.

        Raises:
            TypeError: with another method, which differentiates steps that were taken.
        """
        with self._problem.live.model.autocast_for_losses():
            self._window.note(self._problem.live.begin(self._number, batch, None))
        self._buffers = self._buffers or self._problem.live.model.buffers()

    def restart(self) -> None:
        """Puts parameters, buffers and the optimizer's state back to where this HyperOptimizer began, and
        begins a new episode. Hyperparameters stay; recorded steps are dropped."""
        self._problem.live.reset(self._origin)
        self.begin_window()
        self._number = 0

    # ---- hyperparameters ----------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """The current values by name: ``"lr/group0"``, ``"weight_decay/layers.0.weight"``, or the name of a
        tensor.

        Returns:
            Copies, of shape ``()`` per group and tensor, the parameter's own per element, ``(num_steps,)``
            per step.
        """
        return self._hyperparameters.values()

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Replaces values by name, for instance to go on from a grid search.

        Raises:
            ValueError: for an unknown name, another shape, or values out of bounds; nothing has changed then.
            TrajectoryError: in the middle of a recorded window, which was trained with the old values.
        """
        if self._window.checks_parameters and any(True for _ in self._window.steps()):
            raise TrajectoryError(
                f"set_values before training step {self._number + 1} is in the middle of a recorded window, "
                "which was trained with the old values of the hyperparameters. Call it after a hyper step "
                "or restart(), which end the window."
            )
        self._hyperparameters.check_values(values)
        self._hyperparameters.set_values(values)

    def validation_loss(
        self,
        val_batch: Any = NOT_GIVEN,
        *,
        batches: Iterable[Any] | None = None,
        sizes: Sequence[float] | None = None,
    ) -> Tensor:
        """The validation loss at the current weights, a scalar without graph. Changes nothing, buffers and
        random number generators included. The arguments are those of :meth:`evaluate`."""
        asked = self._asked(val_batch, batches, sizes, None)
        live, readings = self._problem.live, self._problem.readings
        with live.model.autocast_for_losses(), readings.before_errors(), live.preserved():
            loss = asked().loss
            readings.read()
        return loss

    def evaluate(
        self,
        val_batch: Any = NOT_GIVEN,
        *,
        batches: Iterable[Any] | None = None,
        sizes: Sequence[float] | None = None,
        rtol: float | None = None,
    ) -> Evaluation:
        """The validation loss, its derivative with respect to the values (also of those on a log scale), and
        what is known of how good that is.

        Changes nothing, and the recording goes on. A solver with a warm start begins its next solve here.

        Args:
            val_batch: what ``val_loss`` is called with.
            batches: in its place, several such batches (a list, a loader), over which loss and gradients are
                averaged before one solve or sweep.
            sizes: the weight of each of these in the mean, such as its number of examples; None for one each.
            rtol: the tolerance of this solve, in the place of the solver's own.

        Raises:
            TrajectoryError: if nothing is recorded, a recorded batch or the parameters were changed, or a
                loss computed again is not what it was.
            NonFiniteError: if a loss or the result is not finite.
            SolverError: if the solver failed.
            NotTwiceDifferentiableError: if the training loss has no second derivative.
            TypeError, ValueError: for both or neither of ``val_batch`` and ``batches``, none in these, other
                ``sizes``, or an ``rtol`` where no solver has one.
        """
        asked = self._asked(val_batch, batches, sizes, rtol)
        gradients, _, statistics = self._hypergradient(asked)
        self._problem.readings.read()
        found = read_statistics(statistics, self._problem.live.params, self._method)
        return Evaluation(asked.value(), self._hyperparameters.named(gradients), **found)

    def hypergradient(
        self,
        val_batch: Any = NOT_GIVEN,
        *,
        batches: Iterable[Any] | None = None,
        sizes: Sequence[float] | None = None,
        rtol: float | None = None,
    ) -> dict[str, Tensor]:
        """The derivative that :meth:`evaluate` gives, with the names and shapes of :meth:`values`."""
        return self.evaluate(val_batch, batches=batches, sizes=sizes, rtol=rtol).hypergradient

    def hyper_step(
        self,
        val_batch: Any = NOT_GIVEN,
        *,
        batches: Iterable[Any] | None = None,
        sizes: Sequence[float] | None = None,
        rtol: float | None = None,
    ) -> HyperReport:
        """The hypergradient, then one step of the hyper optimizer on the values, then projection onto bounds.

        The recording ends: training goes on from the current weights, and the next window begins there. The
        arguments are those of :meth:`evaluate`.

        Raises:
            HypergradientError: as :meth:`evaluate`; then nothing has changed.
        """
        asked, readings = self._asked(val_batch, batches, sizes, rtol), self._problem.readings
        gradients, norm, statistics = self._hypergradient(asked)
        with put_back_on_error(self._problem, self.hyper_optimizer, self._watch):
            constants = self._problem.transition.gradient.running.constants(self._buffers or ())
            clipped = move_values(
                self._hyperparameters, self.hyper_optimizer, gradients, asked.value, readings, rtol
            )
            readings.read()  # the one time that a hyper step waits for the device
        self.begin_window()
        found = read_statistics(statistics, self._problem.live.params, self._method)
        counts = num_clipped(clipped)
        return HyperReport(asked.value(), norm.value, **found, constants=constants.value, clipped=counts)

    def begin_window(self) -> None:
        """Begins a new window at the current weights, as a hyper step does: recorded steps are dropped. For
        whoever moves the values by other means, or goes on after an error."""
        self._window.clear()
        self._watch.reset()
        self._buffers = None

    def _asked(
        self,
        val_batch: Any,
        batches: Iterable[Any] | None,
        sizes: Sequence[float] | None,
        rtol: float | None,
    ) -> AskedValidation:
        check_rtol(rtol, self._method)
        return AskedValidation(self._problem, validation_batches(val_batch, NOT_GIVEN, batches, sizes), rtol)

    def _hypergradient(self, asked: AskedValidation) -> tuple[list[Tensor], Reading[float], dict[str, Any]]:
        """The hypergradient, its norm, and the method's statistics as numbers or readings of them."""
        live, readings = self._problem.live, self._problem.readings
        self._watch.check(self._number)
        with readings.before_errors():
            steps = list(self._window.steps())
            check_recorded(steps, readings)
            self._watch.check_values(steps, self._number, readings)
            with live.model.autocast_for_losses(), live.preserved():
                total, statistics = self._window.hypergradient(asked)
                gradients = total.result()
            found = asked_statistics(statistics, readings)
            squares = [g.detach().double().square().sum() for g in gradients]
            norm = readings.ask(squares, partial(finite_norm, self._hyperparameters, gradients))
        return gradients, norm, found

    def __getstate__(self) -> Any:
        raise TypeError(
            "A HyperOptimizer cannot be copied or pickled: train_loss would go on reading the model and the "
            "tuned tensors of the original. Make another one in the same way, and call "
            "other.load_state_dict(hyper.state_dict())."
        )

    # ---- checkpoints --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole run, also in the middle of a trajectory: model, optimizer, hyperparameters, hyper
        optimizer, recorded steps with their batches, the start that :meth:`restart` goes back to, and the
        random number generators.

        Plain containers of tensors, which ``torch.load(..., weights_only=True)`` takes, if the batches are
        such.
        """
        run = pack_run(self._problem, self._method, self._window, self.hyper_optimizer)
        return {**run, "origin": pack_state(self._origin), "number": self._number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a run saved by :meth:`state_dict`: what follows is bitwise what would have followed
        there.

        Sets the global random number generators too.

        Raises:
            TypeError: if ``state_dict`` is no dict.
            ValueError: if it was saved with another model, optimizer, method or other hyperparameters;
                nothing has changed then.
        """
        unpack_run(state_dict, self._problem, self._method, self.hyper_optimizer)
        live = self._problem.live
        self._origin, _ = unpack_state(state_dict["origin"], live.optimizer)
        self.begin_window()
        self._window.load_state_dict(state_dict["window"])
        self._number = state_dict["number"]
        live.model.set_rng(state_dict["rng"])
        if self._window.checks_parameters and any(True for _ in self._window.steps()):
            self._watch.step_written(live.state())
