"""HyperOptimizer: wires model, optimizer, hyperparameters and method together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import autodiff
from .errors import NonFiniteError, TrajectoryError
from .hyperparameters import HyperparameterSet
from .methods import Method, SolveStatistics, Validation
from .training import GradTransform, Loss, State, Training, check_loss
from .trajectory import pack_state, unpack_state
from .updates import rule_of


@dataclass(frozen=True)
class HyperReport:
    """What one hyper step did.

    Args:
        val_loss: the validation loss before the step.
        hypergradient_norm: Euclidean norm of the hypergradient with respect to the values.
        num_matvecs: products that the solver of an implicit method took; None for other methods.
        residual: its relative residual; None for other methods and for :class:`Identity`.
        clipped: for each setting that was projected onto a bound, how many of its values were.
    """

    val_loss: float
    hypergradient_norm: float
    num_matvecs: int | None = None
    residual: float | None = None
    clipped: dict[str, int] = field(default_factory=dict)


class HyperOptimizer:
    """Trains a model with a wrapped optimizer and tunes hyperparameters by hypergradients.

    Args:
        model: the model; every parameter of the optimizer must be one of its parameters.
        optimizer: a ``torch.optim`` optimizer, or one with a registered update rule. Its state is kept in its own format.
            Its ``step`` is not called: :meth:`step` takes its place.
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
    ) -> None:
        _check_types(model, optimizer, train_loss, method, hyper_optimizer, val_loss, grad_transform)
        _check_not_compiled(model)
        rule = rule_of(optimizer)
        names = _parameter_names(model, optimizer)
        tune = [tune] if not isinstance(tune, (list, tuple)) else list(tune)
        hyperparameters = HyperparameterSet(tune, optimizer.param_groups, names, rule)
        method.check(hyperparameters, rule, type(optimizer).__name__)
        _check_tuned_tensors(hyperparameters, optimizer, val_loss)
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
            twice_differentiable=method.replays,
        )
        self._recording = method.start(self._training)
        self.hyper_optimizer = hyper_optimizer([tuned.leaf for tuned in hyperparameters.all])
        if not isinstance(self.hyper_optimizer, Optimizer):
            raise TypeError(
                f"hyper_optimizer must make a torch Optimizer from a list of tensors, but returned "
                f"{type(self.hyper_optimizer).__name__}. Pass functools.partial(torch.optim.Adam, lr=1e-2) or the like."
            )
        self._origin = self._training.capture(buffers=True)
        self._number = 0
        self._written: State | None = None
        self._versions = hyperparameters.versions()

    # ---- training -------------------------------------------------------------------------------------------------

    def step(self, batch: Any) -> Tensor:
        """One training step; the optimizer's ``zero_grad``, ``backward`` and ``step`` in one.

        Args:
            batch: any pytree of tensors (lists, tuples and dicts), given to ``train_loss`` and recorded by reference:
                its tensors must not be changed in place until the next hyper step.

        Returns:
            The training loss before the step, without graph.

        Raises:
            TypeError, ValueError: if ``train_loss`` does not return a scalar tensor with a graph, or a schedule has ended.
            TrajectoryError: if somebody else has written to the parameters, the optimizer's state or the
                hyperparameters since the recording began.
        """
        training, recording = self._training, self._recording
        self._check_untouched()
        state = training.capture(buffers=recording.wants_buffers())
        tampered = None
        if recording.checks_parameters and self._written is not None:
            tampered = training.differs(state, self._written)
            if tampered.device.type == "cpu" and bool(tampered):  # elsewhere it waits for the hyper step: no synchronization
                raise TrajectoryError(_tampering("a parameter", self._number))
        step = training.begin(self._number, batch)
        loss, grads = training.gradients(batch, create_graph=recording.create_graph)
        step = training.finish(step, loss, grads, tampered)
        after = training.advance(state, grads, step)
        recording.record(step, state, grads)
        training.write(after)
        self._written = after if recording.checks_parameters else None
        self._number += 1
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # LR schedulers look here for the order of calls
        return loss.detach()

    def restart(self) -> None:
        """Puts parameters, buffers and the optimizer's state back to where this HyperOptimizer began, and begins a new
        episode. Hyperparameters stay; recorded steps are dropped."""
        for p in self._training.params:
            self.optimizer.state.pop(p, None)
        self._training.load(self._origin)
        self._training.reset_optimizer_state(self._origin)
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
            ValueError: for an unknown name or another shape.
            TrajectoryError: in the middle of a recorded window, which was trained with the old values.
        """
        if any(True for _ in self._recording.steps()) and self._recording.checks_parameters:
            raise TrajectoryError(_tampering("a hyperparameter", self._number))
        self._hyperparameters.set_values(values)
        self._versions = self._hyperparameters.versions()

    def validation_loss(self, val_batch: Any) -> Tensor:
        """The validation loss at the current weights, a scalar without graph. Changes nothing, buffers and random number
        generators included."""
        with self._training.preserved():
            return self._validation(val_batch).loss

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
        return self._hyperparameters.named(self._hypergradient(val_batch)[0])

    def hyper_step(self, val_batch: Any) -> HyperReport:
        """The hypergradient, then one step of the hyper optimizer on the values, then projection onto bounds.

        The recording ends: training goes on from the current weights, and the next window begins there.

        Args:
            val_batch: what ``val_loss`` is called with.

        Raises:
            HypergradientError: as :meth:`hypergradient`; then nothing has changed.
        """
        gradients, val_loss, norm, statistics = self._hypergradient(val_batch)
        hyperparameters = self._hyperparameters
        for tuned, gradient in zip(hyperparameters.all, gradients):
            tuned.set_leaf_gradient(gradient)
        self.hyper_optimizer.step()
        self.hyper_optimizer.zero_grad()
        clipped = {tuned.label: count for tuned in hyperparameters.settings if (count := tuned.project())}
        self._begin_window()
        return HyperReport(val_loss, norm, statistics.num_matvecs, statistics.residual, clipped)

    def _hypergradient(self, val_batch: Any) -> tuple[list[Tensor], float, float, SolveStatistics]:
        training = self._training
        self._check_untouched()
        self._check_recorded()
        with training.preserved():
            validation = self._validation(val_batch)
            gradients, statistics = self._recording.hypergradient(validation)
        total = torch.stack([g.detach().double().square().sum().cpu() for g in gradients]).sum()
        norm, val_loss = math.sqrt(float(total)), float(validation.loss)
        if not math.isfinite(norm):
            bad = [n for n, g in self._hyperparameters.named(gradients).items() if not g.isfinite().all()]
            raise NonFiniteError(
                f"The hypergradient of {', '.join(bad[:3])} is not finite, though every loss was. Adjoints that grow over the "
                "window overflow: shorten it with Unrolled(truncation=...), lower the learning rate, or raise the "
                "optimizer's eps. Nothing was changed."
            )
        return gradients, val_loss, norm, statistics

    def _validation(self, val_batch: Any) -> Validation:
        training, tensors = self._training, self._hyperparameters.loss_tensors
        with torch.enable_grad(), training.kernels(twice_differentiable=False):
            loss = self._val_loss(self.model, val_batch)
            check_loss(loss, "val_loss")
            found = autodiff.gradients([loss], [*training.trainable(), *tensors])
        if not bool(loss.detach().isfinite()):
            raise NonFiniteError(
                f"The validation loss is {loss.item()} at the current weights, so it has no hypergradient. Weights that have "
                "diverged need a lower learning rate; check the validation batch too. Nothing was changed."
            )
        by_param = dict(zip(map(id, training.trainable()), found))
        first = len(training.trainable())
        return Validation(loss.detach(), [by_param.get(id(p)) for p in training.params], found[first:])

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _check_untouched(self) -> None:
        if not self._recording.checks_parameters or self._written is None:
            return
        changed = self._training.changed()
        if changed is None and self._versions != self._hyperparameters.versions():
            changed = "a hyperparameter"
        if changed is not None:
            raise TrajectoryError(_tampering(changed, self._number))

    def _check_recorded(self) -> None:
        steps = list(self._recording.steps())
        if not steps:
            raise TrajectoryError(
                "There are no training steps to differentiate: none was taken since this HyperOptimizer was made, restarted "
                "or took its last hyper step. Call step(batch) first."
            )
        finite = torch.stack([step.loss.isfinite().to(steps[0].loss.device).reshape(()) for step in steps])
        if not bool(finite.all()):
            bad = steps[int((~finite).nonzero()[0])]
            raise NonFiniteError(
                f"The training loss was {bad.loss.item()} at training step {bad.number + 1}, so the steps after it have no "
                "derivative. Lower the learning rate, clip gradients with grad_transform, or restart(). Nothing was changed."
            )
        flags = [(step.number, step.tampered) for step in steps if step.tampered is not None]
        if self._written is not None:
            now = self._training.capture(buffers=False)
            flags.append((self._number, self._training.differs(now, self._written)))
        if flags:
            tampered = torch.stack([flag for _, flag in flags])
            if bool(tampered.any()):
                raise TrajectoryError(_tampering("a parameter", flags[int(tampered.nonzero()[0])][0]))

    def _begin_window(self) -> None:
        self._recording.clear()
        self._written = None
        self._versions = self._hyperparameters.versions()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole run, also in the middle of a trajectory: model, optimizer, hyperparameters, hyper optimizer, recorded
        steps with their batches, the start that :meth:`restart` goes back to, and the random number generators.

        Plain containers of tensors, which ``torch.load(..., weights_only=True)`` takes, if the batches are such.
        """
        surroundings = self._training.surroundings()
        return {
            "fingerprint": self._fingerprint(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hyperparameters": [tuned.leaf.detach().clone() for tuned in self._hyperparameters.all],
            "bases": [setting.base for setting in self._hyperparameters.settings],
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "recording": self._recording.state_dict(),
            "origin": pack_state(self._origin),
            "number": self._number,
            "rng": list(surroundings.rng),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a run saved by :meth:`state_dict`: what follows is bitwise what would have followed there.

        Sets the global random number generators too.

        Raises:
            ValueError: if it was saved with another model, optimizer, method or other hyperparameters; nothing has
                changed then.
        """
        self._check_fingerprint(state_dict)
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        with torch.no_grad():
            for tuned, saved in zip(self._hyperparameters.all, state_dict["hyperparameters"]):
                tuned.leaf.copy_(saved)
        for setting, base in zip(self._hyperparameters.settings, state_dict["bases"]):
            setting.base = base
            setting.project()
        self.hyper_optimizer.load_state_dict(state_dict["hyper_optimizer"])
        self._origin = unpack_state(state_dict["origin"], self._training)
        self._begin_window()
        self._recording.load_state_dict(state_dict["recording"])
        self._training.capture(buffers=False)
        self._training.mark_written()
        self._number = state_dict["number"]
        self._training.set_rng(state_dict["rng"])
        if self._recording.checks_parameters and any(True for _ in self._recording.steps()):
            self._written = self._training.capture(buffers=False)

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "optimizer": type(self.optimizer).__name__,
            "method": repr(self._method),
            "parameters": {n: list(p.shape) for n, p in zip(self._training.names, self._training.params)},
            "hyperparameters": {n: list(v.shape) for n, v in self.values().items()},
        }

    def _check_fingerprint(self, state_dict: dict[str, Any]) -> None:
        if "fingerprint" not in state_dict:
            raise ValueError(
                f"This is no checkpoint of a HyperOptimizer: it has the keys {sorted(state_dict)[:5]}. Save with "
                "torch.save(hyper.state_dict(), path)."
            )
        for kind, own in self._fingerprint().items():
            saved = state_dict["fingerprint"][kind]
            if saved != own:
                raise ValueError(
                    f"The checkpoint was saved with another {kind.rstrip('s')}: {_difference(saved, own)}. Make the "
                    "HyperOptimizer as it was made for the saved run, then load. Nothing was changed."
                )


def _difference(saved: Any, own: Any) -> str:
    if not isinstance(own, dict):
        return f"{saved} there, {own} here"
    for name in (*saved, *own):
        if saved.get(name) != own.get(name):
            return f"{name!r} has shape {saved.get(name, 'none')} there and {own.get(name, 'none')} here"
    return "the same entries in another order"


def _tampering(what: str, number: int) -> str:
    return (
        f"Somebody else wrote to {what} before training step {number + 1}, in the middle of a recorded window. The recorded "
        "steps no longer lead to the current weights, so they cannot be differentiated. Do it after a hyper step or "
        "restart(), which end the window, or as a part of the training loss or grad_transform; with method=Implicit weights "
        "may be changed at any time."
    )


def _check_types(
    model: Any, optimizer: Any, train_loss: Any, method: Any, hyper_optimizer: Any, val_loss: Any, grad_transform: Any
) -> None:
    for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer), ("method", method, Method)):
        if not isinstance(value, kind):
            shown = value.__name__ + " (a class: make an instance of it)" if isinstance(value, type) else repr(value)
            raise TypeError(f"HyperOptimizer: {name} must be a {kind.__name__}, got {shown}.")
    for name, value, optional in (
        ("train_loss", train_loss, False),
        ("hyper_optimizer", hyper_optimizer, False),
        ("val_loss", val_loss, True),
        ("grad_transform", grad_transform, True),
    ):
        if not (callable(value) or (optional and value is None)):
            raise TypeError(f"HyperOptimizer: {name} must be a function, got {value!r}.")


def _check_not_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"The module {name or 'model'!r} is compiled, and torch.compile gives no second derivative, which every "
                "hypergradient needs. Pass the module from before torch.compile."
            )


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for g, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"The optimizer's group {g} holds a parameter of shape {tuple(p.shape)} that is not one of the model's. "
                    "Likely causes: an optimizer made for another model, or before the model's parameters were replaced."
                )
            if p.is_complex() or p.layout is not torch.strided:
                raise ValueError(
                    f"The parameter {names[id(p)]!r} is {'complex' if p.is_complex() else 'sparse'}. Update rules are for "
                    "real, dense parameters: hold real and imaginary parts as two parameters, or make it dense."
                )
        found.append([names[id(p)] for p in group["params"]])
    return found


def _check_tuned_tensors(hyperparameters: HyperparameterSet, optimizer: Optimizer, val_loss: Loss | None) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tuned in hyperparameters.tensors:
        if id(tuned.leaf) in trained:
            raise ValueError(
                f"{tuned.name!r} is both tuned and trained: the optimizer holds it as a parameter. Take it out of the one or "
                "the other."
            )
    if hyperparameters.tensors and val_loss is None:
        raise ValueError(
            f"tune holds {hyperparameters.tensors[0].name!r}, which the training loss reads, and val_loss is not given. "
            "Validation must not see what is tuned (example weights, augmentation): pass val_loss=..., a plain loss."
        )
