"""Floors, caps and epoch limits of domains: a mixer's proportions, moved as little as possible until they are allowed.

The result is the information projection onto {p : minimum <= p <= maximum, sum p = 1}, the p that minimises
sum p log(p / q) for the mixer's proportions q. Its form is p_d = min(max(s q_d, minimum_d), maximum_d) with one scale s, so
domains that touch no bound keep their ratios, and a domain with cap 0 leaves its proportion to the others in the ratio of
theirs. The sum is a non-decreasing piecewise linear function of s, whose kinks are known, so s is found exactly and not by
iteration. Where caps leave something over for domains with q_d = 0, those domains divide it evenly: the limit of equal, ever
smaller q_d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dataflex_mega.errors import ConfigError, DataError

SUM_TOLERANCE = 1e-12  # of a sum of proportions


def project_to_bounds(
    proportions: Sequence[float], minimum: Sequence[float], maximum: Sequence[float]
) -> tuple[float, ...]:
    """[k] proportions, [k] floors, [k] caps -> [k] proportions within them, sum 1.

    Raises ValueError when a floor is above its cap, the floors sum to more than 1, or the caps to less.
    """
    p, low, high = (np.asarray(values, np.float64) for values in (proportions, minimum, maximum))
    if (low > high).any() or low.sum() > 1 + SUM_TOLERANCE or high.sum() < 1 - SUM_TOLERANCE:
        raise ValueError(f"no proportions lie within {low.tolist()} and {high.tolist()}")
    inside = bool(((p >= low) & (p <= high)).all()) and abs(p.sum() - 1) <= SUM_TOLERANCE
    if inside:
        return tuple(p.tolist())
    positive = p > 0
    available = 1.0 - low[~positive].sum()
    if high[positive].sum() > available:
        projected = np.where(positive, _scale_and_clip(p, low, high, positive, available), low)
    else:
        left_over = 1.0 - high[positive].sum()
        projected = np.where(positive, high, _scale_and_clip(np.ones_like(p), low, high, ~positive, left_over))
    return tuple((projected / projected.sum()).tolist())


def _scale_and_clip(p: np.ndarray, low: np.ndarray, high: np.ndarray, mask: np.ndarray, total: float) -> np.ndarray:
    """clip(s p, low, high) with the scale s at which the entries of `mask`, all > 0, sum to `total`."""
    q, a, b = p[mask], low[mask], high[mask]
    kinks = np.unique(np.concatenate([a / q, b / q]))
    sums = np.array([np.clip(s * q, a, b).sum() for s in kinks])
    right = int(np.searchsorted(sums, total))
    if right == 0:
        scale = kinks[0]
    elif right == len(kinks):
        scale = kinks[-1]
    else:  # between two kinks the sum is a straight line
        fraction = (total - sums[right - 1]) / (sums[right] - sums[right - 1])
        scale = kinks[right - 1] + fraction * (kinks[right] - kinks[right - 1])
    return np.clip(scale * p, low, high)


@dataclass(frozen=True)
class ProportionLimits:
    """Bounds on the proportions of a run. All tuples are [k], in the order of the `dataset` key."""

    names: tuple[str, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    max_samples: tuple[float, ...]  # that may be drawn of each domain; infinite without max_epochs
    each_row_once: bool = False  # whether all of them are to be drawn; see data.each_row_once

    def apply(self, proportions: Sequence[float], exhausted: frozenset[int], step: int) -> tuple[float, ...]:
        """[k] proportions -> the nearest allowed ones. Domains in `exhausted` get 0, whatever their floor.

        Raises DataError when all domains are exhausted, or when the caps of the other ones sum to less than 1.
        """
        minimum = [0.0 if d in exhausted else low for d, low in enumerate(self.minimum)]
        maximum = [0.0 if d in exhausted else high for d, high in enumerate(self.maximum)]
        if math.fsum(maximum) < 1 - SUM_TOLERANCE:
            names = ", ".join(self.names[d] for d in sorted(exhausted))
            others = f"max_proportion lets the others have {math.fsum(maximum):g} of a batch"
            why = others if len(exhausted) < len(self.names) else "no domain is left"
            raise DataError(f"max_epochs: at step {step + 1} {names} had been drawn that often, and {why}")
        return project_to_bounds(proportions, minimum, maximum)

    def exhausted(self, cursors: Sequence[int], next_counts: Sequence[int]) -> frozenset[int]:
        """Domains that would exceed their limit when `next_counts` samples of each are drawn after `drawn`."""
        counts = enumerate(zip(cursors, next_counts, self.max_samples, strict=True))
        return frozenset(d for d, (before, added, limit) in counts if before + added > limit)

    @property
    def has_epoch_limit(self) -> bool:
        """Whether the number of draws of some domain is limited."""
        return any(math.isfinite(limit) for limit in self.max_samples)

    def check_run(self, num_samples: int) -> None:
        """Raises ConfigError when all domains together may give fewer than the `num_samples` that the run draws."""
        available = math.fsum(self.max_samples)
        if available < num_samples:
            raise ConfigError(
                f"max_epochs: the run draws {num_samples} samples, the datasets may give {int(available)}; train less"
            )


def make_limits(
    names: Sequence[str],
    sizes: Sequence[int],
    bounds: Mapping[str, float | Sequence[float] | None],
    max_epochs: float | Sequence[float] | None,
) -> ProportionLimits | None:
    """The limits of the keys min_proportion and max_proportion (`bounds`) and max_epochs, each one number for all domains or
    one per domain.

    None when none of them is set. Raises ConfigError for another number of them than domains, and for floors and caps that
    no proportions can keep to.
    """
    if max_epochs is None and all(value is None for value in bounds.values()):
        return None
    minimum = _per_domain("min_proportion", bounds["min_proportion"], 0.0, names)
    maximum = _per_domain("max_proportion", bounds["max_proportion"], 1.0, names)
    epochs = _per_domain("max_epochs", max_epochs, math.inf, names)
    for d, name in enumerate(names):
        if minimum[d] > maximum[d]:
            raise ConfigError(f"min_proportion: {minimum[d]:g} of {name} is above its max_proportion {maximum[d]:g}")
    if math.fsum(minimum) > 1 + SUM_TOLERANCE:
        raise ConfigError(f"min_proportion: the floors of {len(names)} datasets sum to {math.fsum(minimum):g}, above 1")
    if math.fsum(maximum) < 1 - SUM_TOLERANCE:
        raise ConfigError(f"max_proportion: the caps of {len(names)} datasets sum to {math.fsum(maximum):g}, below 1")
    max_samples = tuple(
        float(math.floor(e * n)) if math.isfinite(e) else math.inf for e, n in zip(epochs, sizes, strict=True)
    )
    return ProportionLimits(tuple(names), minimum, maximum, max_samples)


def _per_domain(
    key: str, value: float | Sequence[float] | None, default: float, names: Sequence[str]
) -> tuple[float, ...]:
    if value is None:
        return (default,) * len(names)
    if isinstance(value, int | float):
        return (float(value),) * len(names)
    if len(value) != len(names):
        raise ConfigError(f"{key}: {len(value)} numbers for {len(names)} datasets ({', '.join(names)})")
    return tuple(float(x) for x in value)
