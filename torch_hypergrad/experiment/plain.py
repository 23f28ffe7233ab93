"""Training without tuning, with the interface that the loop needs of a HyperOptimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class PlainTraining:
    """The plain loop of torch: ``zero_grad``, ``backward``, ``step``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_loss: Callable[[nn.Module, Any], Tensor],
        grad_transform: Callable[[list[Tensor]], list[Tensor]] | None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._train_loss, self._grad_transform = train_loss, grad_transform

    def step(self, batch: Any) -> Tensor:
        """One training step; returns the loss before it, without graph."""
        self.optimizer.zero_grad()
        loss = self._train_loss(self.model, batch)
        loss.backward()
        if self._grad_transform is not None:
            with_grad = [
                p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            for param, grad in zip(with_grad, self._grad_transform([p.grad for p in with_grad])):
                param.grad = grad
        self.optimizer.step()
        return loss.detach()

    def values(self) -> dict[str, Tensor]:
        """Nothing is tuned."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and the random number generators."""
        device = next(self.model.parameters()).device
        rng = [torch.get_rng_state()]
        if device.type != "cpu":
            rng.append(torch.get_device_module(device).get_rng_state(device))
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`, bitwise."""
        device = next(self.model.parameters()).device
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"][0])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(state["rng"][1], device)
