"""RegMix: proportions from a regression over many small runs, each on a mixture drawn at random.

Liu et al. 2024, "RegMix: Data Mixture as Regression for Language Model Pre-training" (arXiv 2407.01492). With q the
natural proportions of k domains:

    draw       p_i ~ Dirichlet(s_i r),  r ~ q^temperature,  s_i log-uniform in `strengths`       one p for each small run
    fit        loss(p) = b + sum_d w_d p_d + sum_{d <= e} w_de p_d p_e                           ridge, degree 2
    propose    the mean of the `average` best of `candidates` further draws, by the fitted loss

The paper fits a linear model or boosted trees. A linear one always puts everything on one domain, and trees want more
runs than the quadratic here, which has its optimum inside where the losses say so. Features are standardised; the
strength of the ridge is the one with the smallest leave-one-out error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex_mega.errors import ConfigError, UserError

RIDGES = np.logspace(-8, 3, 34)


@dataclass(frozen=True)
class Draw:
    """Which mixtures are tried."""

    natural: np.ndarray  # [k] > 0, sums to 1
    strengths: tuple[float, float] = (0.1, 5.0)  # a small one puts most weight on one domain, a large one stays at q
    temperature: float = 0.5  # below 1 lifts small domains

    def mixtures(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count, k] float64, rows sum to 1."""
        centre = self.natural**self.temperature
        centre = centre / centre.sum()
        low, high = np.log(self.strengths)
        gammas = rng.standard_gamma(np.exp(rng.uniform(low, high, size=(count, 1))) * centre)
        gammas = np.maximum(gammas, 1e-300)  # a row of zeros has no proportions
        return gammas / gammas.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Fit:
    """A regression from proportions to loss."""

    model: Any  # sklearn's pipeline
    held_out: np.ndarray  # [n] what a fit to the other n - 1 runs predicts of each
    measured: np.ndarray  # [n]

    def predict(self, mixtures: np.ndarray) -> np.ndarray:
        """[m, k] -> [m] losses."""
        return self.model.predict(mixtures)

    @property
    def error(self) -> float:
        """Root mean square of the leave-one-out error, in nats."""
        return float(np.sqrt(np.mean((self.held_out - self.measured) ** 2)))

    @property
    def correlation(self) -> float:
        """Spearman's, of leave-one-out predictions and losses.

        At 0 or below the proposal means nothing: a mean of the other runs alone has -1.
        """
        return float(np.corrcoef(ranks(self.held_out), ranks(self.measured))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """[n] -> [n] places in ascending order, equal values at the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[group]


def least_runs(domains: int) -> int:
    """Fewer runs than this cannot be fitted at all; a few times as many give a fit that means something."""
    return domains + 2


def fit(mixtures: np.ndarray, losses: np.ndarray, degree: int = 2) -> Fit:
    """[n, k] proportions, [n] losses -> the regression.

    Raises ConfigError for too few runs, UserError without scikit-learn.
    """
    runs, domains = mixtures.shape
    if runs < least_runs(domains):
        raise ConfigError(f"runs: {runs} finished runs cannot tell {domains} domains apart; {least_runs(domains)} can")
    try:
        from sklearn.linear_model import RidgeCV
        from sklearn.model_selection import LeaveOneOut, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler
    except ImportError as error:
        raise UserError('regmix needs scikit-learn: pip install "dataflex_mega[offline]"') from error
    features = PolynomialFeatures(degree, include_bias=False)
    model = make_pipeline(features, StandardScaler(), RidgeCV(alphas=RIDGES))
    held_out = cross_val_predict(model, mixtures, losses, cv=LeaveOneOut())
    return Fit(model.fit(mixtures, losses), np.asarray(held_out), losses)


def propose(found: Fit, draw: Draw, candidates: int, average: int, rng: np.random.Generator) -> np.ndarray:
    """[k] proportions: the mean of the `average` of `candidates` drawn mixtures with the lowest predicted loss."""
    tried = draw.mixtures(candidates, rng)
    best = np.argsort(found.predict(tried), kind="stable")[:average]
    mean = tried[best].mean(axis=0)
    return mean / mean.sum()
