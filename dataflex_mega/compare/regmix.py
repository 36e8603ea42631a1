"""RegMix: proportions from a regression over many small runs, each on a random mixture.

Liu et al. 2024, "RegMix: Data Mixture as Regression for Language Model Pre-training" (arXiv 2407.01492). With q the
natural proportions of k domains:

    draw       p_i ~ Dirichlet(s_i r),  r ~ q^temperature,  s_i log-uniform in `strengths`       one p for each small run
    fit        loss(p) = b + sum_d w_d p_d + sum_{d <= e} w_de p_d p_e                           ridge, degree 2
    propose    the mean of the `average` best of `candidates` further draws, by the fitted loss

The paper fits a linear model or boosted trees. The optimum of a linear model always lies on one domain, and trees need
more runs than the quadratic here, whose optimum can lie inside the simplex. Features are standardised; the
strength of the ridge is the one with the smallest leave-one-out error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex_mega.errors import ConfigError, UserError

RIDGES = np.logspace(-8, 3, 34)


@dataclass(frozen=True)
class MixtureSampler:
    """The random mixtures of a study: Dirichlet distributions around the natural proportions."""

    natural: np.ndarray  # [k] > 0, sums to 1
    strengths: tuple[float, float] = (
        0.1,
        5.0,
    )  # a small value puts most weight on one domain, a large one stays near q
    temperature: float = 0.5  # below 1 raises small domains

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count, k] float64, rows sum to 1."""
        centre = self.natural**self.temperature
        centre = centre / centre.sum()
        low, high = np.log(self.strengths)
        gammas = rng.standard_gamma(np.exp(rng.uniform(low, high, size=(count, 1))) * centre)
        gammas = np.maximum(gammas, 1e-300)  # a row of zeros has no proportions
        return gammas / gammas.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class RegMixFit:
    """A regression from proportions to loss."""

    model: Any  # a scikit-learn pipeline
    leave_one_out: np.ndarray  # [n] prediction for each run by a fit to the other n - 1
    losses: np.ndarray  # [n]

    def predict(self, mixtures: np.ndarray) -> np.ndarray:
        """[m, k] proportions -> [m] predicted losses."""
        return self.model.predict(mixtures)

    @property
    def error(self) -> float:
        """Root mean square of the leave-one-out error, in nats."""
        return float(np.sqrt(np.mean((self.leave_one_out - self.losses) ** 2)))

    @property
    def correlation(self) -> float:
        """Spearman's correlation of leave-one-out predictions and losses.

        At 0 or below the proposal is meaningless: predicting the mean of the other runs gives -1.
        """
        return float(np.corrcoef(average_ranks(self.leave_one_out), average_ranks(self.losses))[0, 1])


def average_ranks(values: np.ndarray) -> np.ndarray:
    """[n] -> [n] ranks from 0 in ascending order; ties get their mean rank, as scipy.stats.rankdata does."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[group]


def min_runs(num_domains: int) -> int:
    """The smallest number of runs that can be fitted; a reliable fit needs several times as many."""
    return num_domains + 2


def fit(mixtures: np.ndarray, losses: np.ndarray, degree: int = 2) -> RegMixFit:
    """[n, k] proportions, [n] losses -> the regression.

    Raises ConfigError for too few runs, UserError without scikit-learn.
    """
    num_runs, num_domains = mixtures.shape
    if num_runs < (needed := min_runs(num_domains)):
        raise ConfigError(f"runs: {num_runs} finished runs cannot tell {num_domains} domains apart; {needed} can")
    try:
        from sklearn.linear_model import RidgeCV
        from sklearn.model_selection import LeaveOneOut, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler
    except ImportError as error:
        raise UserError('regmix needs scikit-learn: pip install "dataflex_mega[offline]"') from error
    features = PolynomialFeatures(degree, include_bias=False)
    model = make_pipeline(features, StandardScaler(), RidgeCV(alphas=RIDGES))
    predicted = cross_val_predict(model, mixtures, losses, cv=LeaveOneOut())
    return RegMixFit(model.fit(mixtures, losses), np.asarray(predicted), losses)


def propose(
    fitted: RegMixFit, sampler: MixtureSampler, candidates: int, average: int, rng: np.random.Generator
) -> np.ndarray:
    """[k] proportions: the mean of the `average` mixtures with the lowest predicted loss among `candidates` random ones."""
    mixtures = sampler.sample(candidates, rng)
    best = np.argsort(fitted.predict(mixtures), kind="stable")[:average]
    mean = mixtures[best].mean(axis=0)
    return mean / mean.sum()
