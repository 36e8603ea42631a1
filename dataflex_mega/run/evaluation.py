"""Metrics of an evaluation beside the losses of its sets: how long it took, and one loss for all domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataflex_mega.algorithms.base import DomainInfo

DOMAIN_LOSS = "eval_weighted_domain_loss"


@dataclass(frozen=True)
class DomainLoss:
    """The mean loss of the evaluation sets that are named like domains, weighted with the proportions that the run begins
    with. These stay the same while a mixer moves its own, so that two evaluations can be compared.

    Attributes:
        weights: evaluation set -> proportion of its domain, sum 1.
    """

    weights: dict[str, float]

    @classmethod
    def of(cls, sets: Sequence[str], domains: DomainInfo) -> DomainLoss | None:
        """None when fewer than two evaluation sets are named like domains, or none of these has a share."""
        shares = dict(zip(domains.names, domains.initial_proportions, strict=True))
        named = {name: shares[name] for name in sets if name in shares}
        total = math.fsum(named.values())
        if len(named) < 2 or not total > 0:
            return None
        return cls({name: share / total for name, share in named.items()})

    def added_to(self, evaluate: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
        """The same evaluation with one metric more."""

        def evaluate_all() -> dict[str, float]:
            results = evaluate()
            terms = [share * results[f"eval_{name}_loss"] for name, share in self.weights.items()]
            return {**results, DOMAIN_LOSS: math.fsum(terms)}

        return evaluate_all


def speed(prefix: str, seconds: float, num_samples: int, batch_size: int) -> dict[str, float]:
    """Hugging Face's `eval_runtime`, `eval_samples_per_second` and `eval_steps_per_second`. `batch_size`: of all ranks."""
    seconds = max(seconds, 1e-9)
    return {
        f"{prefix}_runtime": round(seconds, 4),
        f"{prefix}_samples_per_second": round(num_samples / seconds, 3),
        f"{prefix}_steps_per_second": round(math.ceil(num_samples / batch_size) / seconds, 3),
    }
