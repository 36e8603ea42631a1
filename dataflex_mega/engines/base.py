"""What the loop asks of an engine. It alone knows how parameters, gradients and optimizer state are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dataflex_mega.types import Batch, HiddenSpec, SampleObs, StepStats, Weigh


class Engine(Protocol):
    """One model, its optimizer and its schedule."""

    def train_step(self, micros: Sequence[Batch], weigh: Weigh | None) -> StepStats:
        """Forward, weigh, backward, reduce, clip and update. `micros` are this rank's micro-batches of the step.

        Raises NotFinite, before the parameters change, when the loss or the gradient is not finite.
        """
        ...

    def sample_losses(self, batch: Batch) -> SampleObs:
        """Forward only, in evaluation mode: losses of this rank's samples. Every rank must call it equally often."""
        ...

    def embed(self, batch: Batch, *specs: HiddenSpec) -> Tensor:
        """[n, sum of h] float32: forward only, in evaluation mode, the vectors of each spec side by side for every sample.

        Every rank must call it equally often. Raises ConfigError for a layer that the engine cannot hear.
        """
        ...

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        ...

    def learning_rate(self) -> float:
        """Of the first parameter group, for the step to come."""
        ...

    def save_state(self, folder: Path) -> None:
        """Write parameters, optimizer and schedule below `folder`; every rank calls it."""
        ...

    def load_state(self, folder: Path) -> None:
        """The inverse of `save_state`, on any number of ranks."""
        ...

    def rng_state(self) -> dict[str, Any]:
        """Tensors that restore this process's random generators."""
        ...

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """The inverse of `rng_state`."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; every rank calls it."""
        ...
