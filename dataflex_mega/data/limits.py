"""Floors, caps and epochs of domains: what a mixer asked for, moved as little as possible until it is allowed.

The result is the information projection onto {p : least <= p <= most, sum p = 1}, the p that minimises
sum p log(p / asked). Its form is p_d = min(max(s asked_d, least_d), most_d) with one scale s, so domains that touch no bound
keep their ratios, and a domain with cap 0 leaves its share to the others in proportion to theirs. The sum is a
non-decreasing piecewise linear function of s, whose kinks are known, so s is found exactly and not by iteration.
Where a proportion of 0 meets caps that leave something over, the domains that were asked for 0 share it evenly: the limit of
asking for equal, ever smaller proportions of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dataflex_mega.errors import ConfigError, DataError

SLACK = 1e-12  # of a sum of proportions


def project(asked: Sequence[float], least: Sequence[float], most: Sequence[float]) -> tuple[float, ...]:
    """[k] proportions, [k] floors, [k] caps -> [k] proportions within them, sum 1.

    Raises ValueError when a floor is above its cap, the floors sum to more than 1, or the caps to less.
    """
    p, low, high = (np.asarray(values, np.float64) for values in (asked, least, most))
    if (low > high).any() or low.sum() > 1 + SLACK or high.sum() < 1 - SLACK:
        raise ValueError(f"no proportions lie within {low.tolist()} and {high.tolist()}")
    inside = bool(((p >= low) & (p <= high)).all()) and abs(p.sum() - 1) <= SLACK
    if inside:
        return tuple(p.tolist())
    some = p > 0
    rest = 1.0 - low[~some].sum()
    if high[some].sum() > rest:
        found = np.where(some, _scaled(p, low, high, some, rest), low)
    else:
        left = 1.0 - high[some].sum()
        found = np.where(some, high, _scaled(np.ones_like(p), low, high, ~some, left))
    return tuple((found / found.sum()).tolist())


def _scaled(p: np.ndarray, low: np.ndarray, high: np.ndarray, where: np.ndarray, total: float) -> np.ndarray:
    """clip(s p, low, high) with the scale s at which the entries of `where` sum to `total`; they are > 0."""
    q, a, b = p[where], low[where], high[where]
    kinks = np.unique(np.concatenate([a / q, b / q]))
    sums = np.array([np.clip(s * q, a, b).sum() for s in kinks])
    after = int(np.searchsorted(sums, total))
    if after == 0:
        scale = kinks[0]
    elif after == len(kinks):
        scale = kinks[-1]
    else:  # between two kinks the sum is a straight line
        part = (total - sums[after - 1]) / (sums[after] - sums[after - 1])
        scale = kinks[after - 1] + part * (kinks[after] - kinks[after - 1])
    return np.clip(scale * p, low, high)


@dataclass(frozen=True)
class Limits:
    """What the proportions of a run must keep to. All tuples are [k], in the order of the `dataset` key."""

    names: tuple[str, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]
    samples: tuple[float, ...]  # that may be drawn of each domain; infinite without max_epochs

    def apply(self, asked: Sequence[float], spent: frozenset[int], step: int) -> tuple[float, ...]:
        """[k] proportions -> the nearest allowed ones. Domains in `spent` get 0, whatever their floor.

        Raises DataError when all domains are spent, or when the caps of those that are left sum to less than 1.
        """
        least = [0.0 if d in spent else low for d, low in enumerate(self.least)]
        most = [0.0 if d in spent else high for d, high in enumerate(self.most)]
        if math.fsum(most) < 1 - SLACK:
            gone = ", ".join(self.names[d] for d in sorted(spent))
            left = [d for d in range(len(self.names)) if d not in spent]
            why = f"max_proportion lets the others have {math.fsum(most):g} of a batch" if left else "no domain is left"
            raise DataError(f"max_epochs: at step {step + 1} {gone} had been drawn that often, and {why}")
        return project(asked, least, most)

    def spent(self, drawn: Sequence[int], coming: Sequence[int]) -> frozenset[int]:
        """Domains that a step drawing `coming` samples of each would draw more often than allowed, after `drawn`."""
        pairs = enumerate(zip(drawn, coming, self.samples, strict=True))
        return frozenset(d for d, (before, now, most) in pairs if before + now > most)

    @property
    def counts(self) -> bool:
        """Whether some domain may be drawn only so often."""
        return any(math.isfinite(most) for most in self.samples)

    def check_run(self, wanted: int) -> None:
        """Raises ConfigError when all domains together may give less than the `wanted` samples of the run."""
        there = math.fsum(self.samples)
        if there < wanted:
            raise ConfigError(
                f"max_epochs: the run draws {wanted} samples, the datasets may give {int(there)}; train less"
            )


def make_limits(
    names: Sequence[str],
    sizes: Sequence[int],
    shares: Mapping[str, float | Sequence[float] | None],
    epochs: float | Sequence[float] | None,
) -> Limits | None:
    """The keys min_proportion and max_proportion (`shares`) and max_epochs, each one number for all domains or one for each.

    None when none of them is set. Raises ConfigError for another number of them than domains, and for floors and caps that
    no proportions can keep to.
    """
    if epochs is None and all(value is None for value in shares.values()):
        return None
    least = _each("min_proportion", shares["min_proportion"], 0.0, names)
    most = _each("max_proportion", shares["max_proportion"], 1.0, names)
    often = _each("max_epochs", epochs, math.inf, names)
    for d, name in enumerate(names):
        if least[d] > most[d]:
            raise ConfigError(f"min_proportion: {least[d]:g} of {name} is above its max_proportion {most[d]:g}")
    if math.fsum(least) > 1 + SLACK:
        raise ConfigError(f"min_proportion: the floors of {len(names)} datasets sum to {math.fsum(least):g}, above 1")
    if math.fsum(most) < 1 - SLACK:
        raise ConfigError(f"max_proportion: the caps of {len(names)} datasets sum to {math.fsum(most):g}, below 1")
    samples = tuple(
        float(math.floor(e * n)) if math.isfinite(e) else math.inf for e, n in zip(often, sizes, strict=True)
    )
    return Limits(tuple(names), least, most, samples)


def _each(key: str, value: float | Sequence[float] | None, default: float, names: Sequence[str]) -> tuple[float, ...]:
    if value is None:
        return (default,) * len(names)
    if isinstance(value, int | float):
        return (float(value),) * len(names)
    if len(value) != len(names):
        raise ConfigError(f"{key}: {len(value)} numbers for {len(names)} datasets ({', '.join(names)})")
    return tuple(float(x) for x in value)
