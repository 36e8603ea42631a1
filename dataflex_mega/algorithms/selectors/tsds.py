"""Samples drawn with the chances that TSDS computed before the run.

Liu et al. 2024, "TSDS: Data Selection for Task-Specific Model Finetuning" (arXiv 2410.11303): an optimal transport from
the samples of a task to the candidates gives every candidate a chance p_i. The offline tool writes the chances. Every update
draws samples by them: one after the other without replacement as DataFlex does, or with replacement as the paper does.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Selector
from dataflex_mega.algorithms.selectors._npy import read_npy
from dataflex_mega.algorithms.selectors._sampling import draw_without_replacement
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import SignalTable, UpdateContext

PROBABILITY_DTYPES = {"<f8": torch.float64, "<f4": torch.float32}


@dataclass
class Tsds(Selector):
    """Chances from a file.

    Args:
        probs_path: the .npy file of the offline tool: [N] float64 or float32, one number >= 0 for each sample of the
            pool in its order, taken relative to their sum.
        replacement: whether a candidate may be selected more than once.
    """

    probs_path: str = "tsds_probs.npy"
    replacement: bool = False
    _log_chances: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [N] float32

    def setup(self, domains: DomainInfo) -> None:
        """Read the file.

        Raises:
            ConfigError: there is no such file.
            DataError: its content is of another type, belongs to a pool of another size, or holds no chances.
        """
        path, num_samples = Path(self.probs_path).expanduser(), sum(domains.num_samples)
        if not path.is_file():
            raise ConfigError(f"selector.tsds.probs_path: {path} not found (relative to {Path.cwd()})")
        chances = read_npy(path, PROBABILITY_DTYPES, ("N",), "numbers").double()
        if len(chances) != num_samples:
            sizes = ", ".join(f"{name} {size}" for name, size in zip(domains.names, domains.num_samples, strict=True))
            raise DataError(
                f"{path}: expected {num_samples} numbers, one per sample of the pool ({sizes}), found {len(chances)}"
            )
        wrong = (~(torch.isfinite(chances) & (chances >= 0))).nonzero()
        if len(wrong):
            raise DataError(f"{path}: must be finite and >= 0, found {float(chances[wrong[0]])} at {int(wrong[0])}")
        if float(chances.max()) == 0:
            raise DataError(f"{path}: must not be 0 for all {num_samples} samples")
        relative = chances / chances.max()  # before the sum, which may overflow
        self._log_chances = (relative.log() - relative.sum().log()).float()

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32: log p of each sample, -inf for p = 0."""
        assert self._log_chances is not None, "setup was not called"
        return self._log_chances[table.sample_ids.cpu()]

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64 positions. Raises DataError when count exceeds the number of candidates with p > 0."""
        logs = scores.double()
        possible = int((logs > -math.inf).sum())
        if count > possible and (not self.replacement or possible == 0):
            found = f"{count} samples wanted, {self.probs_path} gives {possible} of {len(scores)} candidates a chance"
            raise DataError(f"selector.tsds: {found}; shorten update_step or set selector.tsds.replacement")
        if self.replacement:
            bounds = (logs - logs.max()).exp().cumsum(0)
            points = torch.rand(count, generator=rng, dtype=torch.float64) * bounds[-1]
            last = int((logs > -math.inf).nonzero().max())  # rounding may put a point at the very end
            return torch.searchsorted(bounds, points, right=True).clamp(max=last)
        return draw_without_replacement(logs, count, rng)

    def state_dict(self) -> dict[str, Any]:
        """A hash of the chances, so that a resumed run cannot continue with others."""
        assert self._log_chances is not None, "setup was not called"
        return {"chances": hashlib.sha256(self._log_chances.numpy().tobytes()).hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the file has changed."""
        if state != self.state_dict():
            raise CheckpointError(f"{self.probs_path} gives other chances than when the checkpoint was written")
