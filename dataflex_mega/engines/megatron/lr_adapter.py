"""A Hugging Face learning-rate schedule for Megatron's optimizer, which torch's schedulers do not take."""

from __future__ import annotations

from typing import Any

import torch


class Rates:
    """Runs `make(optimizer)` on an optimizer of one number and hands its rate to Megatron's parameter groups."""

    def __init__(self, optimizer: Any, lr: float, weight_decay: float, make: Any) -> None:
        self.target, self.weight_decay = optimizer, weight_decay
        self.stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        self.schedule = make(self.stand_in)
        self._apply()

    @property
    def now(self) -> float:
        """The rate of the step to come."""
        return float(self.stand_in.param_groups[0]["lr"])

    def step(self) -> None:
        """On to the next optimizer step."""
        self.stand_in.step()  # a schedule warns when it moves before its optimizer
        self.schedule.step()
        self._apply()

    def _apply(self) -> None:
        for group in self.target.param_groups:
            group["lr"] = self.now * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        state = self.schedule.state_dict()
        return {key: value for key, value in state.items() if isinstance(value, int | float | list | str | bool | None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.schedule.load_state_dict(state)
        for group, rate in zip(self.stand_in.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self._apply()
