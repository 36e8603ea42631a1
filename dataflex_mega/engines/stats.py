"""Sums of one optimizer step, kept on the device until one reduction at its end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.signals.router_load import LoadSums
from dataflex_mega.types import Batch, SampleObs, StepStats, WeightStats


class StepSums:
    """Adds up micro-batches of one rank; `reduce` adds up ranks in one all-reduce."""

    def __init__(self, domains: int, device: torch.device, loads: LoadSums | None = None) -> None:
        self.loads = loads
        # MPS and some other devices have no float64; the CPU and CUDA do, and only they are supported.
        # Loss, target tokens, samples, excess loss.
        self.domain = torch.zeros(4, domains, dtype=torch.float64, device=device)
        self.with_excess = torch.zeros((), dtype=torch.float64, device=device)  # micro-batches that had a reference
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.seen: list[SampleObs] = []
        self.weights: list[Tensor] = []

    def add(self, obs: SampleObs, batch: Batch, loss: Tensor, weights: Tensor | None) -> None:
        """One micro-batch: its samples, its scalar share of the loss, [n] weights if any."""
        # A one-hot product rather than index_add, whose order of addition is not fixed on a GPU.
        hot = torch.nn.functional.one_hot(obs.domain, self.domain.shape[1]).double()
        excess = torch.zeros_like(obs.loss_sum) if obs.excess_sum is None else obs.excess_sum
        ones = torch.ones_like(obs.tokens).double()
        values = torch.stack([obs.loss_sum.double(), obs.tokens.double(), ones, excess.double()])
        self.domain += values @ hot
        self.loss += loss
        self.with_excess += float(obs.excess_sum is not None)
        self.tokens += (batch.segment >= 0).sum()
        self.seen.append(obs)
        if weights is not None:
            self.weights.append(weights)

    def not_finite(self) -> list[int]:
        """Sample ids of this rank whose loss is NaN or infinite."""
        return [i for obs in self.seen for i in obs.sample_id[~torch.isfinite(obs.loss_sum)].tolist()]

    def reduce(self, collectives: Collectives, grad_norm: float, weighed: bool) -> StepStats:
        """Sums over ranks and pipeline stages -> StepStats, equal on every rank.

        Stages that saw no losses add nothing. `weighed`: whether a weighter ran, on whatever stage.
        """
        k = self.domain.shape[1]
        flat = torch.cat([self.domain.flatten(), torch.stack([self.loss, self.tokens, self.with_excess])])
        weights = torch.cat(self.weights).double() if self.weights else flat.new_zeros(0)
        logs = torch.xlogy(weights, weights).sum()
        flat = torch.cat([flat, torch.stack([weights.sum(), logs, flat.new_tensor(float(len(weights)))])])
        ahead = len(flat)
        if self.loads is not None:
            flat = torch.cat([flat, self.loads.total.flatten()])
        flat = collectives.sum_stages(flat).cpu()
        domain = flat[: 4 * k].view(4, k)
        loss, tokens, with_excess, *of_weights = flat[4 * k : ahead].tolist()
        return StepStats(
            loss=loss,
            grad_norm=grad_norm,
            domain_loss=domain[0],
            domain_tokens=domain[1],
            domain_samples=domain[2],
            tokens=int(tokens),
            weights=self._weight_stats(weights, of_weights, collectives) if weighed else None,
            domain_excess=domain[3] if with_excess else None,
            expert_load=None if self.loads is None else flat[ahead:].view_as(self.loads.total).clone(),
        )

    @staticmethod
    def _weight_stats(weights: Tensor, sums: list[float], collectives: Collectives) -> WeightStats:
        """Entropy of p = w / sum(w) from sums: H = log(W) - sum(w log w) / W."""
        total, logs, count = sums
        none = weights.new_tensor(math.inf)
        low, high = (weights.min(), weights.max()) if len(weights) else (none, -none)
        minimum, maximum = collectives.extremes(low, high)
        entropy = math.log(total) - logs / total if total > 0 else 0.0
        return WeightStats(entropy=entropy / math.log(count) if count > 1 else 1.0, minimum=minimum, maximum=maximum)
