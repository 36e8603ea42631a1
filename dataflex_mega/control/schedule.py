"""When to re-plan, and how many steps a run has: DataFlex's keys as arithmetic.

A cycle is `warmup_steps` steps, then `num_updates` windows of `update_every` steps. Selections repeat cycles, each of which
begins with a warm-up on random samples. With `num_updates` below 0 (or 0 when selecting) windows continue until the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateSchedule:
    """When updates happen, from DataFlex's keys warmup_step, update_step and update_times."""

    warmup_steps: int
    update_every: int
    num_updates: int
    repeat_cycles: bool  # whether a finished cycle starts again with a warm-up

    @property
    def cycle_steps(self) -> int:
        """Steps of a cycle, 0 when it has no end."""
        return self.warmup_steps + self.update_every * self.num_updates if self.num_updates > 0 else 0

    def steps_in_cycle(self, step: int) -> int:
        """Steps done in the current cycle after `step` steps of the run."""
        return step % self.cycle_steps if self.repeat_cycles and self.cycle_steps else step

    def in_warmup(self, step: int) -> bool:
        """Whether the step after `step` steps belongs to a warm-up."""
        return self.steps_in_cycle(step) < self.warmup_steps

    def is_update(self, step: int) -> bool:
        """Whether algorithms update after `step` steps."""
        done = self.steps_in_cycle(step)
        if self.update_every <= 0 or done < self.warmup_steps or (done - self.warmup_steps) % self.update_every:
            return False
        endless = self.num_updates < 0 or (self.num_updates == 0 and self.repeat_cycles)
        return endless or (done - self.warmup_steps) // self.update_every < self.num_updates

    def starts_warmup(self, step: int) -> bool:
        """Whether a warm-up begins after `step` steps."""
        return self.warmup_steps > 0 and self.steps_in_cycle(step) == 0

    def total_updates(self, steps: int) -> int:
        """Updates in a run of `steps` steps, 0 when windows have no end or there are none."""
        if self.num_updates <= 0 or self.update_every <= 0:
            return 0
        return self.num_updates * (math.ceil(steps / self.cycle_steps) if self.repeat_cycles else 1)

    def update_index(self, step: int) -> int:
        """How many updates came before the one at `step`."""
        if self.update_every <= 0:
            return 0
        before = (self.steps_in_cycle(step) - self.warmup_steps) // self.update_every
        if self.repeat_cycles and self.cycle_steps:
            before += step // self.cycle_steps * self.num_updates
        return max(before, 0)


@dataclass(frozen=True)
class RunLength:
    """The keys that limit a run, and the sizes that an epoch follows from."""

    train_step: int = 0
    max_steps: int = -1
    epochs: float = 1.0
    num_samples: int = 0  # of the pool
    global_batch_size: int = 1


def total_steps(run_length: RunLength, schedule: UpdateSchedule, selecting: bool, mixing: bool) -> int:
    """Optimizer steps of the run. train_step wins, then max_steps, then DataFlex's formula for the role, then epochs."""
    if run_length.train_step > 0:
        return run_length.train_step
    if run_length.max_steps > 0:
        return run_length.max_steps
    per_epoch = max(1, math.ceil(run_length.num_samples / run_length.global_batch_size))
    if selecting and schedule.num_updates > 0:
        return math.ceil(run_length.epochs * max(1, schedule.cycle_steps))
    if mixing and schedule.num_updates >= 0 and schedule.update_every > 0:
        return max(1, schedule.warmup_steps + schedule.update_every * schedule.num_updates)
    return math.ceil(run_length.epochs * per_epoch)
