"""The vector-Jacobian product of an update rule on one bucket: written out where the rule has it, else by autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import autodiff
from .buckets import Bucket
from .records import RuleState, Step
from .training import Training
from .tuned import TunedSetting


@dataclass(frozen=True)
class UpdateAdjoint:
    """Adjoints of what one update reads; None or missing where zero."""

    param: Tensor
    grad: Tensor | None
    rule_state: dict[str, Tensor]
    settings: dict[TunedSetting, Tensor]


def pull_update(
    training: Training,
    bucket: Bucket,
    param: Tensor,
    grads: Sequence[Tensor | None],
    rule_state: RuleState,
    step: Step,
    adj_param: Tensor,
    adj_state: Mapping[str, Tensor],
) -> UpdateAdjoint:
    """From the adjoints of the parameters and the rule's state after an update to those of what it read.

    What is returned may share memory with ``adj_param`` and ``adj_state``.
    """
    written = _written_out(training, bucket, param, grads, rule_state, step, adj_param, adj_state)
    if written is not None:
        return written
    update = training.traced_update(bucket, param, grads, rule_state, step)
    found = autodiff.gradients(
        [update.new_param, *(update.new_state[k] for k in adj_state)],
        [update.param, update.grad, *update.state.values(), *update.tuned.values()],
        [adj_param, *adj_state.values()],
    )
    num_state = len(update.state)
    return UpdateAdjoint(
        torch.zeros_like(adj_param) if found[0] is None else found[0],
        found[1],
        {k: adj for k, adj in zip(update.state, found[2:]) if adj is not None},
        {setting: part for setting, part in zip(update.tuned, found[2 + num_state :]) if part is not None},
    )


def _written_out(
    training: Training,
    bucket: Bucket,
    param: Tensor,
    grads: Sequence[Tensor | None],
    rule_state: RuleState,
    step: Step,
    adj_param: Tensor,
    adj_state: Mapping[str, Tensor],
) -> UpdateAdjoint | None:
    """The same by the rule's own formula; None if it has none for these settings."""
    if training.rule.pull is None:
        return None
    with torch.no_grad():
        grad = bucket.gather(grads)  # type: ignore[arg-type]
        pulled = training.rule.pull(param, grad, rule_state, training.settings(bucket, step), adj_param, adj_state)
        tuned = training.hyperparameters.of_group[bucket.group]
        if pulled is None or any(setting.spec.name not in pulled.settings for setting in tuned):
            return None
        parts = {
            setting: pulled.settings[setting.spec.name] * setting.factor(step.settings[bucket.group]) for setting in tuned
        }
    return UpdateAdjoint(pulled.param, pulled.grad, dict(pulled.state), parts)
