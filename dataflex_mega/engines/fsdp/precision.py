"""Loss scaling for fp16."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossScale:
    """How the scale moves: from `start`, doubled after `interval` finite steps, halved down to `floor` on an overflow."""

    start: float = 2.0**16
    interval: int = 2000
    floor: float = 1.0
    constant: bool = False


class LossScaler:
    """The scale of the loss, as `rule` moves it. 1 and constant where it is not needed.

    The gradient norm it judges by is the global one, so all ranks take the same decision without communication.
    """

    def __init__(self, enabled: bool, rule: LossScale | None = None) -> None:
        self.enabled, self.rule = enabled, rule or LossScale()
        self.value = self.rule.start if enabled else 1.0
        self.finite_steps = 0

    def update(self, finite: bool) -> None:
        """After each step, with whether its gradient was finite."""
        if not self.enabled or self.rule.constant:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, self.rule.floor)
        elif self.finite_steps == self.rule.interval:
            self.value, self.finite_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        """JSON values: the scale and the number of finite steps since it changed."""
        return {"value": self.value, "finite_steps": self.finite_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.value, self.finite_steps = float(state["value"]), int(state["finite_steps"])
