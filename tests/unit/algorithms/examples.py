"""Small inputs shared by the tests of algorithms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dataflex_mega.algorithms.base import DomainInfo, Selector
from dataflex_mega.types import SampleStats, SignalTable, StepStats, UpdateContext

DOMAINS = DomainInfo(names=("web", "wiki", "code"), num_samples=(40, 10, 25), initial_proportions=(0.5, 0.3, 0.2))


def update_context(step: int = 10) -> UpdateContext:
    return UpdateContext(step=step, total_steps=100, update_index=1, seed=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observed(losses: list[float] | torch.Tensor, tokens: int = 4) -> SampleStats:
    """Samples with these mean losses over `tokens` tokens each, and some vector."""
    losses = torch.as_tensor(losses, dtype=torch.float32)
    count = torch.full((len(losses),), tokens)
    ids = torch.arange(len(losses))
    hidden = torch.nn.functional.normalize(torch.randn(len(losses), 5, generator=generator(4)))
    return SampleStats(
        sample_ids=ids, domain_ids=ids % 3, loss_sum=losses * tokens, num_tokens=count, embeddings=hidden
    )


def stats(mean_losses: Mapping[int, float], domains: int = 3, tokens: float = 8.0) -> StepStats:
    """A step in which only these domains had tokens; a quarter of each loss is beyond the reference."""
    counts = torch.tensor([tokens if d in mean_losses else 0.0 for d in range(domains)], dtype=torch.float64)
    sums = torch.tensor([mean_losses.get(d, 0.0) * tokens for d in range(domains)], dtype=torch.float64)
    return StepStats(
        loss=1.0,
        grad_norm=1.0,
        domain_loss=sums,
        domain_tokens=counts,
        domain_samples=counts / 4,
        num_tokens=int(counts.sum()),
        domain_excess_loss=sums / 4,
        expert_load=torch.stack([counts + sums, counts, counts.flip(0)], dim=1).unsqueeze(0),
    )


def table_for(selector: Selector, rows: int = 75) -> SignalTable:
    """Candidates with a random value for every signal that a selector requests."""
    return table(frozenset(request.name for request in selector.requests()), rows)


def table(names: frozenset[str], rows: int = 75) -> SignalTable:
    """Candidates with a random value for every signal of these names."""
    ids = torch.arange(rows)
    values: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        if name.startswith(("gradient_", "cluster_", "policy_")):
            values["dot"] = torch.randn(rows, 2, generator=generator(len(name)))
            values["norm2"] = torch.rand(rows, generator=generator(len(name) + 1)) + 0.1
        elif name == "clusters":
            values |= {"cluster": ids // 10, "order": (ids * 7) % 10}
            values |= {
                key: torch.rand(8, generator=generator(len(key)))[ids // 10] for key in ("density", "transferability")
            }
        else:
            values[name] = torch.rand(rows, generator=generator(len(name))) * 3
    return SignalTable(sample_ids=ids, domain_ids=ids % 3, signals=values)


def softmax(values: list[float]) -> list[float]:
    """Plain Python, as an independent formula."""
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]
