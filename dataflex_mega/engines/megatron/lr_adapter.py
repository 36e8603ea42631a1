"""A torch or Hugging Face learning-rate scheduler for Megatron's optimizer, which torch's schedulers do not take."""

from __future__ import annotations

from typing import Any

import torch

from dataflex_mega.engines.schedules import follows_evaluations, plain_state


class LRSchedulerAdapter:
    """Runs a scheduler on a dummy optimizer with one scalar parameter and copies its rate to Megatron's parameter groups."""

    def __init__(self, optimizer: Any, lr: float, weight_decay: float, build_scheduler: Any) -> None:
        self.megatron_optimizer, self.weight_decay = optimizer, weight_decay
        self.proxy_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        self.scheduler = build_scheduler(self.proxy_optimizer)
        self._apply()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the step to come."""
        return float(self.proxy_optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Set the learning rate of the next optimizer step."""
        self.proxy_optimizer.step()  # a scheduler warns when it moves before its optimizer
        if not follows_evaluations(self.scheduler):
            self.scheduler.step()
            self._apply()

    def step_by_metric(self, metric: float) -> None:
        """After an evaluation: the same for a scheduler that goes by its result."""
        if follows_evaluations(self.scheduler):
            self.scheduler.step(metric)
            self._apply()

    def _apply(self) -> None:
        for group in self.megatron_optimizer.param_groups:
            group["lr"] = self.learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON values of the scheduler's state."""
        return plain_state(self.scheduler)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.scheduler.load_state_dict(state)
        for group, rate in zip(self.proxy_optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self._apply()
