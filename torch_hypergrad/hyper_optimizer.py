"""HyperOptimizer: wires model, optimizer, hyperparameters and method together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import autodiff
from .checkpoint import check_checkpoint, fingerprint
from .checks import check_hyper_optimizer, check_not_compiled, check_tuned_tensors, check_types, parameter_names
from .errors import TrajectoryError
from .hyper_step import HyperReport, check_losses, finite_norm, finite_validation_loss, move_values, put_back_on_error
from .hyperparameter_set import HyperparameterSet
from .methods import Method, Statistics, Validation
from .readings import Reading, Readings, settled
from .training import GradTransform, Loss, Training, check_loss
from .trajectory import pack_state, unpack_state
from .trust import warnings_of
from .updates import rule_of
from .watch import Watch


class HyperOptimizer:
    """Trains a model with a wrapped optimizer and tunes hyperparameters by hypergradients.

    Args:
        model: the model; every parameter of the optimizer must be one of its parameters.
        optimizer: a ``torch.optim`` optimizer, or one with a registered update rule. Its state is kept in its own format.
            Its ``step`` is called by :class:`Implicit` alone, while settings are tuned per group, if at all; else
            :meth:`step` takes its place.
        train_loss: ``train_loss(model, batch) -> scalar tensor``. It is called again on recorded batches, so it must read
            nothing that changes between steps but the model, the batch and the tuned tensors.
        tune: what to tune: :class:`Hyperparameter` for settings of the optimizer; an ``nn.Module`` or a leaf tensor that
            ``train_loss`` reads, or a pair of a name and one of these.
        method: :class:`Unrolled`, :class:`ForwardMode` or :class:`Implicit`.
        hyper_optimizer: makes the optimizer of the hyperparameters from a list of leaf tensors, for instance
            ``functools.partial(torch.optim.Adam, lr=1e-2)``.
        val_loss: ``val_loss(model, batch) -> scalar tensor``. None takes ``train_loss``, which is allowed only while all
            that is tuned are settings of the optimizer.
        grad_transform: a differentiable function from the list of gradients (those that are not None, in the order of
            the optimizer's parameters) to such a list, such as clipping; applied in training and in replay.
        capture: on a CUDA device, record the training loss and its gradient in a CUDA graph for each shape of batches,
            and replay it in the place of hundreds of launches; with :class:`Unrolled` the double backward pass too, with
            :class:`Implicit` the whole solve of :class:`Neumann` and :class:`Identity`, and products of other solvers. For a
            ``train_loss`` that does nothing in Python that must be done anew at each step; equal to the eager result up
            to rounding. What cannot be recorded is computed eagerly, and one warning says why.

    Raises:
        TypeError, ValueError: for arguments that do not fit, with the reason.

    Example:
        >>> model = nn.Linear(3, 1)
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
        rule = rule_of(optimizer)
        names = parameter_names(model, optimizer)
        tune = [tune] if not isinstance(tune, (list, tuple)) else list(tune)
        hyperparameters = HyperparameterSet(tune, optimizer.param_groups, names, rule)
        method.check(hyperparameters, rule, type(optimizer).__name__)
        if method.needs_second_derivatives:
            check_not_compiled([model, *hyperparameters.modules])
        check_tuned_tensors(hyperparameters, optimizer, val_loss)
        self.model, self.optimizer = model, optimizer
        self._hyperparameters, self._method = hyperparameters, method
        self._val_loss = train_loss if val_loss is None else val_loss
        self._training = Training(
            model,
            optimizer,
            rule,
            hyperparameters,
            train_loss,
            grad_transform,
            [name for of_group in names for name in of_group],
            twice_differentiable=method.replays and method.needs_second_derivatives,
            keeps_graphs=method.keeps_graphs,
            captures=capture,
        )
        self._recording = method.start(self._training)
        self.hyper_optimizer = hyper_optimizer([tuned.leaf for tuned in hyperparameters.all])
        check_hyper_optimizer(self.hyper_optimizer, hyperparameters)
        self._watch = Watch(self._training)
        self._origin = self._training.capture()
        self._number = 0

    # ---- training -------------------------------------------------------------------------------------------------

    def step(self, batch: Any) -> Tensor:
        """One training step; the optimizer's ``zero_grad``, ``backward`` and ``step`` in one.

        Args:
            batch: any pytree of tensors (lists, tuples and dicts), given to ``train_loss`` and recorded by reference:
                its tensors must not be changed in place until the next hyper step.

        Returns:
            The training loss before the step, without graph.

        Raises:
            TypeError, ValueError: if ``train_loss`` does not return a scalar tensor with a graph or writes to parameters, or
                a schedule has ended.
            TrajectoryError: if somebody else has written to the parameters, the optimizer's state or the
                hyperparameters since the recording began.
        """
        training, recording = self._training, self._recording
        self._watch.check(self._number)
        state = training.capture() if recording.reads_states else None
        tampered = None if state is None else self._watch.compare(state, self._number)
        step = training.begin(self._number, batch, tampered)
        with training.undone_on_error(step, None if state is None else state.buffers):
            step, after = recording.take(step, state)
        if after is not None:
            training.write(after)
        if after is not None and recording.checks_parameters:
            self._watch.step_written(after)
        self._number += 1
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # LR schedulers look here for the order of calls
        return step.loss

    def restart(self) -> None:
        """Puts parameters, buffers and the optimizer's state back to where this HyperOptimizer began, and begins a new
        episode. Hyperparameters stay; recorded steps are dropped."""
        self._training.reset(self._origin)
        self._begin_window()
        self._number = 0

    # ---- hyperparameters ------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """The current values by name: ``"lr/group0"``, ``"weight_decay/layers.0.weight"``, or the name of a tensor.

        Returns:
            Copies, of shape ``()`` per group and tensor, the parameter's own per element, ``(num_steps,)`` per step.
        """
        return self._hyperparameters.values()

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Replaces values by name, for instance to go on from a grid search.

        Raises:
            ValueError: for an unknown name, another shape, or values out of bounds; nothing has changed then.
            TrajectoryError: in the middle of a recorded window, which was trained with the old values.
        """
        if self._recording.checks_parameters and any(True for _ in self._recording.steps()):
            raise TrajectoryError(
                f"set_values before training step {self._number + 1} is in the middle of a recorded window, which was trained "
                "with the old values of the hyperparameters. Call it after a hyper step or restart(), which end the window."
            )
        self._hyperparameters.check_values(values)
        self._hyperparameters.set_values(values)

    def validation_loss(self, val_batch: Any) -> Tensor:
        """The validation loss at the current weights, a scalar without graph. Changes nothing, buffers and random number
        generators included."""
        asked = Readings()
        with self._training.preserved():
            validation, _ = self._validation(val_batch, asked)
            asked.read()
        return validation.loss

    def hypergradient(self, val_batch: Any) -> dict[str, Tensor]:
        """The derivative of the validation loss with respect to the values, also of those on a log scale.

        Changes nothing, and the recording goes on.

        Args:
            val_batch: what ``val_loss`` is called with.

        Returns:
            The derivative, with the names and shapes of :meth:`values`.

        Raises:
            TrajectoryError: if nothing is recorded, or a recorded batch or the parameters were changed.
            NonFiniteError: if a loss or the result is not finite.
            SolverError: if the solver failed.
            NotTwiceDifferentiableError: if the training loss has no second derivative.
        """
        asked = Readings()
        gradients = self._hypergradient(val_batch, asked)[0]
        asked.read()
        return self._hyperparameters.named(gradients)

    def hyper_step(self, val_batch: Any) -> HyperReport:
        """The hypergradient, then one step of the hyper optimizer on the values, then projection onto bounds.

        The recording ends: training goes on from the current weights, and the next window begins there.

        Args:
            val_batch: what ``val_loss`` is called with.

        Raises:
            HypergradientError: as :meth:`hypergradient`; then nothing has changed.
        """
        asked = Readings()
        gradients, val_loss, norm, statistics = self._hypergradient(val_batch, asked)
        with self._put_back_on_error():
            clipped = move_values(self._hyperparameters, self.hyper_optimizer, gradients, asked)
            asked.read()  # the one time that a hyper step waits for the device
        self._begin_window()
        found = Statistics(**{name: settled(value) for name, value in vars(statistics).items()})
        counts = {label: int(count.value) for label, count in clipped.items() if count.value}
        warnings = warnings_of(found, self._training.params)
        return HyperReport(val_loss.value, norm.value, **vars(found), clipped=counts, warnings=warnings)

    @contextmanager
    def _put_back_on_error(self) -> Iterator[None]:
        """Undoes what a hyper step does if it fails."""
        model_state = self._training.model_state
        surroundings = model_state.surroundings()
        try:
            with put_back_on_error(self._hyperparameters, self.hyper_optimizer):
                yield
        except BaseException:
            model_state.set_surroundings(surroundings)
            self._watch.hyperparameters_restored()
            raise

    def _hypergradient(
        self, val_batch: Any, asked: Readings
    ) -> tuple[list[Tensor], Reading[float], Reading[float], Statistics]:
        """The hypergradient, the validation loss, the hypergradient's norm and the method's statistics."""
        training = self._training
        self._watch.check(self._number)
        with asked.before_errors():
            self._check_recorded(asked)
            with training.preserved():
                validation, val_loss = self._validation(val_batch, asked)
                gradients, statistics = self._recording.hypergradient(validation)
        for found in vars(statistics).values():
            asked.note(found)
        squares = [g.detach().double().square().sum() for g in gradients]
        norm = asked.ask(squares, partial(finite_norm, self._hyperparameters, gradients))
        return gradients, val_loss, norm, statistics

    def _validation(self, val_batch: Any, asked: Readings) -> tuple[Validation, Reading[float]]:
        training, tensors = self._training, self._hyperparameters.loss_tensors
        with torch.enable_grad(), training.kernels(twice_differentiable=False):
            loss = self._val_loss(self.model, val_batch)
            check_loss(loss, "val_loss")
            found = autodiff.gradients([loss], [*training.trainable(), *tensors])
        val_loss = asked.ask([loss], finite_validation_loss)
        by_param = dict(zip(map(id, training.trainable()), found))
        first = len(training.trainable())
        return Validation(loss.detach(), [by_param.get(id(p)) for p in training.params], found[first:]), val_loss

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _check_recorded(self, asked: Readings) -> None:
        steps = list(self._recording.steps())
        if not steps:
            raise TrajectoryError(
                "There are no training steps to differentiate: none was taken since this HyperOptimizer was made, restarted "
                "or took its last hyper step. Call step(batch) first."
            )
        asked.ask([step.loss for step in steps], partial(check_losses, steps))
        self._watch.check_values(steps, self._number, asked)

    def _begin_window(self) -> None:
        self._recording.clear()
        self._watch.reset()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole run, also in the middle of a trajectory: model, optimizer, hyperparameters, hyper optimizer, recorded
        steps with their batches, the start that :meth:`restart` goes back to, and the random number generators.

        Plain containers of tensors, which ``torch.load(..., weights_only=True)`` takes, if the batches are such.
        """
        return {
            "fingerprint": self._fingerprint(),
            "model": self.model.state_dict(),
            "modules": [module.state_dict() for module in self._hyperparameters.modules],
            "optimizer": self.optimizer.state_dict(),
            "hyperparameters": [tuned.leaf.detach().clone() for tuned in self._hyperparameters.all],
            "bases": [setting.base for setting in self._hyperparameters.settings],
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "recording": self._recording.state_dict(),
            "origin": pack_state(self._origin),
            "state": pack_state(replace(self._training.capture(), params=())),  # buffers that are not persistent, and dtypes
            "number": self._number,
            "rng": list(self._training.model_state.surroundings().rng),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a run saved by :meth:`state_dict`: what follows is bitwise what would have followed there.

        Sets the global random number generators too.

        Raises:
            TypeError: if ``state_dict`` is no dict.
            ValueError: if it was saved with another model, optimizer, method or other hyperparameters; nothing has
                changed then.
        """
        training, hyperparameters = self._training, self._hyperparameters
        check_checkpoint(state_dict, self._fingerprint(), hyperparameters)
        self.model.load_state_dict(state_dict["model"])
        for module, saved in zip(hyperparameters.modules, state_dict["modules"]):
            module.load_state_dict(saved)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        training.reset(unpack_state(state_dict["state"], training))
        for setting, base in zip(hyperparameters.settings, state_dict["bases"]):
            setting.base = base
        for tuned, leaf in zip(hyperparameters.all, state_dict["hyperparameters"]):
            tuned.set_leaf(leaf)
        self.hyper_optimizer.load_state_dict(state_dict["hyper_optimizer"])
        self._origin = unpack_state(state_dict["origin"], training)
        self._begin_window()
        self._recording.load_state_dict(state_dict["recording"])
        self._number = state_dict["number"]
        training.model_state.set_rng(state_dict["rng"])
        if self._recording.checks_parameters and any(True for _ in self._recording.steps()):
            self._watch.step_written(training.capture())

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.model, self.optimizer, self._method, self._hyperparameters, self.hyper_optimizer)
