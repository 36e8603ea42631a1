"""Random proportions: new ones at every update, with the moments of a Dirichlet distribution."""

from __future__ import annotations

import math

import pytest
import torch

from dataflex_mega.algorithms.mixers.random import RandomMixer
from dataflex_mega.errors import ConfigError
from tests.unit.algorithms.examples import DOMAINS, generator, update_context


def draws(mixer: RandomMixer, count: int) -> torch.Tensor:
    """[count, 3] the proportions of `count` updates."""
    mixer.setup(DOMAINS)
    return torch.stack([mixer.proportions(update_context(n), generator(n)) for n in range(count)])


def test_every_update_draws_new_proportions() -> None:
    assert len(draws(RandomMixer(), 50).unique(dim=0)) == 50


@pytest.mark.parametrize("concentration", [0.2, 1.0, 8.0])
def test_mean_and_variance_are_those_of_a_dirichlet(concentration: float) -> None:
    found = draws(RandomMixer(concentration), 6000)
    variance = (1 / 3) * (2 / 3) / (3 * concentration + 1)
    assert found.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=4.5 * math.sqrt(variance / 6000))
    assert found.var(0).tolist() == pytest.approx([variance] * 3, rel=0.1)


def test_a_tiny_concentration_does_not_underflow() -> None:
    found = draws(RandomMixer(1e-4), 300)
    assert bool(torch.isfinite(found).all()) and torch.allclose(found.sum(1), torch.ones(300).double())
    assert float((found.max(1).values > 0.99).double().mean()) > 0.95


def test_a_seed_gives_other_proportions_each_reproducible() -> None:
    runs = [draws(RandomMixer(seed=seed), 5) for seed in (None, 1, 2, 0, 2**70)]
    assert len(torch.stack(runs)[:, 0].unique(dim=0)) == 5
    assert torch.equal(runs[1], draws(RandomMixer(seed=1), 5))
    assert len(runs[1].unique(dim=0)) == 5  # a seed does not freeze the proportions


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_wrong_concentration_is_refused(wrong: float) -> None:
    with pytest.raises(
        ConfigError, match=r"mixer\.random\.concentration: (must be (finite and )?> 0|expected a number)"
    ):
        RandomMixer(wrong)
