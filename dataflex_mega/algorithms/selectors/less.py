"""LESS: train on what moves the model as the target samples would.

Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning" (arXiv 2402.04333). Targets are the
samples of `eval_dataset`; with `eval_on_each_dataset: true` every evaluation set is a sub-task of its own.

    score_i = max over sub-tasks s of  mean over v in s of  cos(G_i, g_v)

G_i is Adam's update for the gradient of candidate i alone, with the moments and constants of the running optimizer, and g_v
the plain gradient of a target's mean token loss. The scores are exact: see signals/gradients.py for how they are computed
without a projection and without storing a gradient. The model of now is one checkpoint; the paper sums over several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import DataError
from dataflex_mega.types import Clock, SignalTable


@dataclass
class Less(Selector):
    """The candidates with the highest scores.

    Args:
        gradient_type: "adam" preconditions the candidates' gradients, "sgd" does not. Targets are never preconditioned.
        cache_dir: where step_N.json goes; None: output_dir/selections.
        proj_dim: stands in DataFlex's files; nothing is projected here, so it changes nothing.
        seed: the same.
        save_interval: the same.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    cache_dir: str | None = None
    proj_dim: int | None = None
    seed: int | None = None
    save_interval: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"gradient_adam"})

    def __post_init__(self) -> None:
        self.needs = frozenset({f"gradient_{self.gradient_type}"})  # type: ignore[misc]  # of this instance

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1; 0 for a candidate without a gradient (no target token in it)."""
        norm = table["norm2"].sqrt().unsqueeze(1)
        cosines = torch.where(norm > 0, table["dot"] / norm, torch.zeros_like(table["dot"]))
        return cosines.max(dim=1).values

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        if count > len(scores):
            raise DataError(f"selector.less: {count} samples wanted, {len(scores)} candidates are there")
        ranked = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -torch.inf))
        return torch.sort(ranked, descending=True, stable=True).indices[:count]
