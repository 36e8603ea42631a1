"""When to re-plan, and how many steps a run has: DataFlex's keys as arithmetic.

A cycle is `warmup` steps, then `times` windows of `every` steps; selections repeat cycles, each of which begins with a
warm-up on random samples. With `times` below 0 (or 0 when selecting) windows go on until the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """warmup_step, update_step, update_times."""

    warmup: int
    every: int
    times: int
    repeats: bool  # whether a finished cycle starts again with a warm-up

    @property
    def cycle(self) -> int:
        """Steps of a cycle, 0 when it has no end."""
        return self.warmup + self.every * self.times if self.times > 0 else 0

    def phase(self, step: int) -> int:
        """Steps done in the current cycle after `step` steps of the run."""
        return step % self.cycle if self.repeats and self.cycle else step

    def warming(self, step: int) -> bool:
        """Whether the step after `step` steps belongs to a warm-up."""
        return self.phase(step) < self.warmup

    def is_update(self, step: int) -> bool:
        """Whether algorithms choose anew after `step` steps."""
        phase = self.phase(step)
        if self.every <= 0 or phase < self.warmup or (phase - self.warmup) % self.every:
            return False
        endless = self.times < 0 or (self.times == 0 and self.repeats)
        return endless or (phase - self.warmup) // self.every < self.times

    def starts_warmup(self, step: int) -> bool:
        """Whether a warm-up begins after `step` steps."""
        return self.warmup > 0 and self.phase(step) == 0

    def total_updates(self, steps: int) -> int:
        """Updates in a run of `steps` steps, 0 when windows have no end."""
        if self.times <= 0:
            return 0
        return self.times * (math.ceil(steps / self.cycle) if self.repeats else 1)

    def update_number(self, step: int) -> int:
        """How many updates came before the one at `step`."""
        if self.every <= 0:
            return 0
        before = (self.phase(step) - self.warmup) // self.every
        if self.repeats and self.cycle:
            before += step // self.cycle * self.times
        return max(before, 0)


@dataclass(frozen=True)
class Budget:
    """The keys that limit a run."""

    train_step: int = 0
    max_steps: int = -1
    epochs: float = 1.0
    samples: int = 0  # of the pool
    global_batch: int = 1


def total_steps(budget: Budget, schedule: Schedule, selecting: bool, mixing: bool) -> int:
    """Optimizer steps of the run. train_step wins, then max_steps, then DataFlex's formula for the role, then epochs."""
    if budget.train_step > 0:
        return budget.train_step
    if budget.max_steps > 0:
        return budget.max_steps
    per_epoch = max(1, math.ceil(budget.samples / budget.global_batch))
    if selecting and schedule.times > 0:
        return math.ceil(budget.epochs * max(1, schedule.cycle))
    if mixing and schedule.times >= 0 and schedule.every > 0:
        return max(1, schedule.warmup + schedule.every * schedule.times)
    return math.ceil(budget.epochs * per_epoch)
