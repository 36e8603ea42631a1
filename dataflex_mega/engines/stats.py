"""Sums of one optimizer step, on the device until one reduction at its end."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.signals.router_load import RouterLoadCounter
from dataflex_mega.types import Batch, SampleStats, StepStats, WeightStats

STOP_UNIT = 1 << 40  # more tokens than a step can have; sums of it are exact in float64 for 8192 ranks


class StepAccumulator:
    """Adds up micro-batches of one rank; `reduce` adds up ranks in one all-reduce."""

    def __init__(
        self,
        num_domains: int,
        device: torch.device,
        router_loads: RouterLoadCounter | None = None,
        report_names: tuple[str, ...] = (),
    ) -> None:
        self.router_loads, self.report_names = router_loads, report_names
        self.report_sums = torch.zeros(len(report_names), dtype=torch.float64, device=device)
        # MPS and some other devices have no float64; the CPU and CUDA do, and only they are supported.
        # Loss, target tokens, samples, excess loss.
        self.domain_sums = torch.zeros(4, num_domains, dtype=torch.float64, device=device)
        self.num_with_excess = torch.zeros((), dtype=torch.float64, device=device)  # micro-batches that had a reference
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.num_tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.samples: list[SampleStats] = []
        self.weights: list[Tensor] = []

    def add(self, samples: SampleStats, batch: Batch, loss: Tensor, weights: Tensor | None) -> None:
        """One micro-batch: its samples, its scalar share of the loss, [n] weights if any."""
        # A one-hot product rather than index_add, whose order of addition is not fixed on a GPU.
        hot = torch.nn.functional.one_hot(samples.domain_ids, self.domain_sums.shape[1]).double()
        excess = torch.zeros_like(samples.loss_sum) if samples.excess_loss_sum is None else samples.excess_loss_sum
        ones = torch.ones_like(samples.num_tokens).double()
        values = torch.stack([samples.loss_sum.double(), samples.num_tokens.double(), ones, excess.double()])
        self.domain_sums += values @ hot
        self.loss_sum += loss
        self.num_with_excess += float(samples.excess_loss_sum is not None)
        self.num_tokens += (batch.segment_ids >= 0).sum()
        if samples.report is not None:
            counted = (samples.num_tokens > 0).unsqueeze(1)
            self.report_sums += torch.where(counted, samples.report.double(), 0.0).sum(dim=0)
        self.samples.append(samples)
        if weights is not None:
            self.weights.append(weights)

    def non_finite_ids(self) -> list[int]:
        """Sample ids of this rank whose loss is NaN or infinite."""
        return [i for samples in self.samples for i in samples.sample_ids[~torch.isfinite(samples.loss_sum)].tolist()]

    def reduce(
        self,
        collectives: TorchCollectives,
        grad_norm: float,
        has_weights: bool,
        stop_requested: Callable[[], bool] | None = None,
    ) -> StepStats:
        """Sums over ranks and pipeline stages -> StepStats, equal on every rank.

        Stages that saw no losses add nothing. `has_weights`: whether a weighter ran, on whatever stage. A request to stop
        travels in the number of tokens, far above any such number, so that it costs nothing and changes no sum.
        """
        stops = int(stop_requested is not None and stop_requested())
        self.num_tokens += stops * STOP_UNIT
        k = self.domain_sums.shape[1]
        flat = torch.cat(
            [self.domain_sums.flatten(), torch.stack([self.loss_sum, self.num_tokens, self.num_with_excess])]
        )
        weights = torch.cat(self.weights).double() if self.weights else flat.new_zeros(0)
        logs = torch.xlogy(weights, weights).sum()
        flat = torch.cat([flat, torch.stack([weights.sum(), logs, flat.new_tensor(float(len(weights)))])])
        ahead = len(flat)
        if self.router_loads is not None:
            flat = torch.cat([flat, self.router_loads.counts.flatten()])
        end_of_loads = len(flat)
        if self.report_names:
            flat = torch.cat([flat, self.report_sums])
        flat = collectives.all_reduce_sum_with_pipeline(flat).cpu()
        domain = flat[: 4 * k].view(4, k)
        loss, tokens, with_excess, *of_weights = flat[4 * k : ahead].tolist()
        stops, tokens = divmod(int(tokens), STOP_UNIT)
        if stop_requested is not None:
            stops = collectives.sum_over_model_ranks(stops)
        return StepStats(
            loss=loss if float(domain[1].sum()) > 0 else math.nan,  # a loss of nothing is none
            grad_norm=grad_norm,
            domain_loss=domain[0],
            domain_tokens=domain[1],
            domain_samples=domain[2],
            num_tokens=tokens,
            weights=self._weight_stats(weights, of_weights, collectives) if has_weights else None,
            domain_excess_loss=domain[3] if with_excess else None,
            expert_load=self._expert_load(flat[ahead:end_of_loads]),
            stop_requested=stops > 0,
            report=dict(zip(self.report_names, (flat[end_of_loads:] / domain[1].sum()).tolist(), strict=True)),
        )

    def _expert_load(self, flat: Tensor) -> Tensor | None:
        return None if self.router_loads is None else flat.view_as(self.router_loads.counts).clone()

    @staticmethod
    def _weight_stats(weights: Tensor, sums: list[float], collectives: TorchCollectives) -> WeightStats:
        """Entropy of p = w / sum(w) from sums: H = log(W) - sum(w log w) / W."""
        total, logs, count = sums
        none = weights.new_tensor(math.inf)
        low, high = (weights.min(), weights.max()) if len(weights) else (none, -none)
        minimum, maximum = collectives.all_reduce_min_max(low, high)
        entropy = math.log(total) - logs / total if total > 0 else 0.0
        return WeightStats(entropy=entropy / math.log(count) if count > 1 else 1.0, minimum=minimum, maximum=maximum)
