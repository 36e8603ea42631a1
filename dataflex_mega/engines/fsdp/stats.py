"""Sums of one optimizer step, kept on the device until one reduction at its end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.types import Batch, SampleObs, StepStats, WeightStats


class StepSums:
    """Adds up micro-batches of one rank; `reduce` adds up ranks in one all-reduce."""

    def __init__(self, domains: int, device: torch.device) -> None:
        # MPS and some other devices have no float64; the CPU and CUDA do, and only they are supported.
        self.domain = torch.zeros(3, domains, dtype=torch.float64, device=device)  # loss, target tokens, samples
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.seen: list[SampleObs] = []
        self.weights: list[Tensor] = []

    def add(self, obs: SampleObs, batch: Batch, loss: Tensor, weights: Tensor | None) -> None:
        """One micro-batch: its samples, its scalar share of the loss, [n] weights if any."""
        # A one-hot product rather than index_add, whose order of addition is not fixed on a GPU.
        hot = torch.nn.functional.one_hot(obs.domain, self.domain.shape[1]).double()
        values = torch.stack([obs.loss_sum.double(), obs.tokens.double(), torch.ones_like(obs.tokens).double()])
        self.domain += values @ hot
        self.loss += loss
        self.tokens += (batch.segment >= 0).sum()
        self.seen.append(obs)
        if weights is not None:
            self.weights.append(weights)

    def not_finite(self) -> list[int]:
        """Sample ids of this rank whose loss is NaN or infinite."""
        return [i for obs in self.seen for i in obs.sample_id[~torch.isfinite(obs.loss_sum)].tolist()]

    def reduce(self, collectives: Collectives, grad_norm: float) -> StepStats:
        """Sums over ranks -> StepStats, equal on every rank."""
        flat = torch.cat([self.domain.flatten(), torch.stack([self.loss, self.tokens])])
        weights = torch.cat(self.weights).double() if self.weights else None
        if weights is not None:
            logs = torch.xlogy(weights, weights).sum()
            flat = torch.cat([flat, torch.stack([weights.sum(), logs, weights.new_tensor(float(len(weights)))])])
        flat = collectives.sum(flat).cpu()
        domain = flat[: self.domain.numel()].view(3, -1)
        loss, tokens = flat[self.domain.numel() : self.domain.numel() + 2].tolist()
        return StepStats(
            loss=loss,
            grad_norm=grad_norm,
            domain_loss=domain[0],
            domain_tokens=domain[1],
            domain_samples=domain[2],
            tokens=int(tokens),
            weights=None if weights is None else self._weight_stats(weights, flat[-3:].tolist(), collectives),
        )

    @staticmethod
    def _weight_stats(weights: Tensor, sums: list[float], collectives: Collectives) -> WeightStats:
        """Entropy of p = w / sum(w) from sums: H = log(W) - sum(w log w) / W."""
        total, logs, count = sums
        ends = collectives.gather(torch.stack([weights.min(), weights.max()]).unsqueeze(0))
        entropy = math.log(total) - logs / total if total > 0 else 0.0
        return WeightStats(
            entropy=entropy / math.log(count) if count > 1 else 1.0,
            minimum=float(ends[:, 0].min()),
            maximum=float(ends[:, 1].max()),
        )
