"""GREATS: of the batch that is about to be trained, only the part that lowers the targets' loss most.

Wang et al. 2024, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration" (NeurIPS 2024), with
the rule of its authors' code. Before a step, with g_i the gradients of the batch's samples and h that of some targets,

    gain_i = <g_i, h>;   K times: take the sample with the largest gain, then  gain_j -= c <g_i, g_j>  for all others j

so that a sample which says what another has said already is not taken twice over. Samples that are not taken weigh nothing
in the step's loss, and the K taken ones G / K each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.errors import ConfigError, TrainingFault
from dataflex_mega.types import FeatureSpec, NeedsBatchGradients, SampleObs


@dataclass
class Greats(NeedsBatchGradients, Weighter):
    """Weight G / K for the K chosen samples of a batch of G, 0 for the others.

    Args:
        keep: K / G, above 0 and at most 1; K is rounded to the nearest whole number, at least 1.
        curvature: c, >= 0. 0 takes the K largest gains, whatever they have in common.
        target_batch: target samples compared with at a step, drawn anew at every step; 0: all of them.
        gradient_type: "sgd" compares gradients, as the paper does; "adam" the samples' Adam updates.
        side: gradients are compared by their projections, each layer's to side x side numbers; where side is at least as
            long as a layer's longer side, nothing is lost.
        seed: of the projection.
    """

    keep: float = 0.5
    curvature: float = 1.0
    target_batch: int = 16
    gradient_type: Literal["adam", "sgd"] = "sgd"
    side: int = 16
    seed: int = 0
    _ids: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [m] sorted, of the step to come
    _weights: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [m] float64

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"weighter.greats.keep: must be above 0 and at most 1, found {self.keep}")
        if not (math.isfinite(self.curvature) and self.curvature >= 0):
            raise ConfigError(f"weighter.greats.curvature: must be finite and >= 0, found {self.curvature}")
        for name, least in (("target_batch", 0), ("side", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"weighter.greats.{name}: must be >= {least}, found {getattr(self, name)}")

    @property
    def preconditioned(self) -> bool:
        """Whether Adam's moments count."""
        return self.gradient_type == "adam"

    def feature_spec(self) -> FeatureSpec:
        """The projection."""
        return FeatureSpec("two_sided", self.side, self.seed)

    def look(self, ids: Tensor, dot: Tensor, gram: Tensor) -> None:
        """Choose from the coming batch: [G] ids, [G] inner products with the targets, [G, G] with each other."""
        count = max(1, round(self.keep * len(ids)))
        weights = torch.zeros(len(ids), dtype=torch.float64)
        weights[pick(dot, gram, count, self.curvature)] = len(ids) / count
        # A sample that a batch has twice weighs what its copies weigh on average, which comes to the same gradient.
        unique, place, copies = torch.unique(ids, return_inverse=True, return_counts=True)
        self._ids = unique
        self._weights = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, place, weights) / copies

    def weights(self, obs: SampleObs, step: int, total_steps: int) -> Tensor:
        """[n], mean 1 over the samples of a step; all 1 before it has looked at a batch.

        Raises TrainingFault for a sample that is not in the batch that was looked at.
        """
        if self._ids is None or self._weights is None:
            return torch.ones_like(obs.loss_sum)
        ids = obs.sample_id.cpu()
        place = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        if not torch.equal(self._ids[place], ids):
            raise TrainingFault(f"weighter greats: step {step + 1} trains samples that were not looked at before it")
        return self._weights[place].to(obs.loss_sum)


def pick(dot: Tensor, gram: Tensor, count: int, curvature: float) -> Tensor:
    """[G], [G, G] -> [count] positions in the order in which they are taken; the lower one where gains are equal."""
    gain, left = torch.nan_to_num(dot.double(), nan=-math.inf), list(range(len(dot)))
    taken: list[int] = []
    while left and len(taken) < count:
        open_to = gain[left]
        best = left.pop(int((open_to == open_to.max()).nonzero()[0]))
        taken.append(best)
        gain = gain - curvature * gram[best].double()
    return torch.tensor(taken)
