"""Loss scaling for fp16."""

from __future__ import annotations


class LossScaler:
    """Doubles after `interval` finite steps, halves on an overflow. 1 and constant where it is not needed.

    The gradient norm it judges by is the global one, so all ranks take the same decision without communication.
    """

    def __init__(self, enabled: bool, start: float = 2.0**16, interval: int = 2000) -> None:
        self.enabled, self.interval = enabled, interval
        self.value = start if enabled else 1.0
        self.finite_steps = 0

    def update(self, finite: bool) -> None:
        """After each step, with whether its gradient was finite."""
        if not self.enabled:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.finite_steps == self.interval:
            self.value, self.finite_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        """JSON values: the scale and the number of finite steps since it changed."""
        return {"value": self.value, "finite_steps": self.finite_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.value, self.finite_steps = float(state["value"]), int(state["finite_steps"])
