"""GREATS: of each batch, train only the samples that lower the targets' loss most.

Wang et al. 2024, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration" (NeurIPS 2024), with
the rule of its authors' code. Before a step, with g_i the gradients of the batch's samples and h that of some targets,

    gain_i = <g_i, h>;   K times: take the sample with the largest gain, then  gain_j -= c <g_i, g_j>  for all others j

so that samples with similar gradients are not all taken. In the step's loss the K selected samples have weight G / K each,
the others weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Weighter
from dataflex_mega.algorithms.requests import BatchGradientSignal, Request
from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import BatchGradients, ProjectionSpec, SampleStats


@dataclass
class Greats(Weighter):
    """Weight G / K for the K selected samples of a batch of G, 0 for the others.

    Args:
        keep_ratio: K / G, above 0 and at most 1; K is rounded to the nearest whole number, at least 1.
        curvature: c, >= 0. 0 takes the K largest gains, however similar the gradients are.
        target_batch: target samples per step, drawn anew at every step; 0: all of them.
        gradient_type: "sgd" compares gradients, as the paper does; "adam" the samples' Adam updates.
        side: gradients are compared by their projections, each layer's to side x side numbers; where side is at least as
            long as a layer's longer side, nothing is lost.
        seed: of the projection.
    """

    renamed: ClassVar[Mapping[str, str]] = {"keep": "keep_ratio"}

    keep_ratio: Annotated[float, Range(gt=0, le=1)] = 0.5
    curvature: Annotated[float, Range(ge=0)] = 1.0
    target_batch: Annotated[int, Range(ge=0)] = 16
    gradient_type: Literal["adam", "sgd"] = "sgd"
    side: Annotated[int, Range(ge=1)] = 16
    seed: Annotated[int, Range(ge=0)] = 0
    _ids: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [m] sorted, of the step to come
    _weights: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [m] float64

    def requests(self) -> tuple[Request, ...]:
        projection = ProjectionSpec("two_sided", self.side, self.seed)
        return (BatchGradientSignal(projection, self.target_batch, self.gradient_type == "adam"),)

    def receive(self, request: Request, value: BatchGradients, step: int) -> None:
        """Select from the batch of the next step."""
        ids, dot, gram = value.sample_ids, value.dot, value.gram
        count = max(1, round(self.keep_ratio * len(ids)))
        weights = torch.zeros(len(ids), dtype=torch.float64)
        weights[greedy_select(dot, gram, count, self.curvature)] = len(ids) / count
        # A sample that a batch has twice gets the mean weight of its copies, which gives the same gradient.
        unique, position, copies = torch.unique(ids, return_inverse=True, return_counts=True)
        self._ids = unique
        self._weights = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, position, weights) / copies

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n], mean 1 over the samples of a step; all 1 before the first observed batch.

        Raises TrainingFault for a sample that is not in the observed batch.
        """
        if self._ids is None or self._weights is None:
            return torch.ones_like(samples.loss_sum)
        ids = samples.sample_ids.cpu()
        position = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        if not torch.equal(self._ids[position], ids):
            raise TrainingFault(f"weighter greats: step {step + 1} trains samples that are not in the observed batch")
        return self._weights[position].to(samples.loss_sum)


def greedy_select(dot: Tensor, gram: Tensor, count: int, curvature: float) -> Tensor:
    """[G], [G, G] -> [count] positions in the order in which they are taken; the lower one where gains are equal."""
    gain, remaining = torch.nan_to_num(dot.double(), nan=-math.inf), list(range(len(dot)))
    selected: list[int] = []
    while remaining and len(selected) < count:
        gains = gain[remaining]
        best = remaining.pop(int((gains == gains.max()).nonzero()[0]))
        selected.append(best)
        gain = gain - curvature * gram[best].double()
    return torch.tensor(selected)
