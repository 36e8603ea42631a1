"""RegMix: the fit recovers known optima, mixtures are Dirichlet draws, and bad studies are refused."""

import json

import numpy as np
import pytest
import yaml

from dataflex_mega.compare import regmix, study
from dataflex_mega.config import proportions
from dataflex_mega.errors import ConfigError

NATURAL = np.asarray([0.5, 0.3, 0.2])
OPTIMUM = np.asarray([0.25, 0.30, 0.45])


def bowl(mixtures):
    """A loss with a known lowest point: 2 + sum of c_d (p_d - o_d)^2."""
    return 2.0 + ((mixtures - OPTIMUM) ** 2 @ np.asarray([1.0, 2.0, 0.5]))


def test_it_recovers_the_optimum_of_a_quadratic_from_noisy_runs():
    sampler, rng = regmix.MixtureSampler(NATURAL), np.random.default_rng(0)
    tried = sampler.sample(40, rng)
    found = regmix.fit(tried, bowl(tried) + rng.normal(scale=1e-3, size=40))
    best = regmix.propose(found, sampler, 100_000, 128, rng)
    assert np.abs(best - OPTIMUM).max() < 0.02 and best.sum() == pytest.approx(1)
    assert found.correlation > 0.99 and found.error < 0.005


def test_a_fit_of_noise_says_so():
    rng = np.random.default_rng(1)
    tried = regmix.MixtureSampler(NATURAL).sample(40, rng)
    assert regmix.fit(tried, rng.normal(size=40)).correlation < 0.3


def test_a_linear_fit_goes_to_the_domain_with_the_lowest_loss():
    sampler, rng = regmix.MixtureSampler(NATURAL), np.random.default_rng(2)
    tried = sampler.sample(20, rng)
    found = regmix.fit(tried, tried @ np.asarray([3.0, 2.0, 4.0]), degree=1)
    assert regmix.propose(found, sampler, 20_000, 16, rng)[1] > 0.99


def test_drawn_mixtures_have_the_moments_of_the_dirichlet():
    fixed = regmix.MixtureSampler(NATURAL, strengths=(4.0, 4.0), temperature=1.0).sample(
        200_000, np.random.default_rng(3)
    )
    assert fixed.sum(axis=1) == pytest.approx(1) and fixed.min() >= 0
    assert fixed.mean(axis=0) == pytest.approx(NATURAL, abs=2e-3)
    assert fixed.var(axis=0) == pytest.approx(NATURAL * (1 - NATURAL) / 5, abs=1e-3)
    flat = regmix.MixtureSampler(NATURAL, strengths=(4.0, 4.0)).sample(200_000, np.random.default_rng(3))
    assert flat.mean(axis=0) == pytest.approx(np.sqrt(NATURAL) / np.sqrt(NATURAL).sum(), abs=2e-3)


def test_very_weak_draws_are_still_mixtures():
    drawn = regmix.MixtureSampler(NATURAL, strengths=(1e-4, 1e-4)).sample(1000, np.random.default_rng(4))
    assert np.isfinite(drawn).all() and drawn.sum(axis=1) == pytest.approx(1)


def test_the_first_mixtures_stay_the_same_for_a_seed():
    first, again = (regmix.MixtureSampler(NATURAL).sample(5, np.random.default_rng([1, 0])) for _ in range(2))
    assert (first == again).all()


def test_ranks_agree_with_scipys():
    from scipy.stats import rankdata

    values = np.asarray([3.0, 1.0, 3.0, -2.0, 1.0, 7.0])
    assert (regmix.average_ranks(values) == rankdata(values) - 1).all()


def test_too_few_runs_are_refused():
    with pytest.raises(ConfigError, match="4 finished runs cannot tell 3 domains apart; 5 can"):
        regmix.fit(np.full((4, 3), 1 / 3), np.zeros(4))


# -- the study file ----------------------------------------------------------------------------------------------------

BASE = {"model_name_or_path": "m", "max_steps": 4, "dataset": "a,b,c", "eval_dataset": "a_v,b_v", "mixer": "odm"}


def read(folder, *overrides, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, "output_dir": str(folder / "out")} | changes))
    return study.read(str(path), overrides)


def test_every_mixture_is_a_static_run_of_its_own(tmp_path):
    found = read(tmp_path, "runs=6", natural=[5, 3, 2])
    natural = study.natural_proportions(found)
    assert natural == pytest.approx([0.5, 0.3, 0.2])
    mixtures = regmix.MixtureSampler(natural).sample(6, found.generator(0))
    chosen = study.build_suite(found, mixtures, "study.yaml")
    assert [run.key for run in chosen.runs][:2] == ["mix-000/seed-1", "mix-001/seed-1"]
    for run, mixture in zip(chosen.runs, mixtures, strict=True):
        assert run.config["mixer"] == "static"
        assert run.config["init_mixture_proportions"] == pytest.approx(mixture.tolist(), rel=1e-8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": 3}, "unknown key 'run' (did you mean 'runs'?)"),
        ({"runs": 3}, "runs: expected >= 5 for 3 domains, found 3"),
        ({"runs": True}, "runs: expected a whole number >= 1, found True"),
        ({"degree": 3}, "degree: expected 1 or 2, found 3"),
        ({"average": 10, "candidates": 5}, "average: expected at most candidates, found 10"),
        ({"strengths": [5.0, 0.1]}, "strengths: expected two numbers > 0, the smaller first"),
        ({"temperature": 0}, "temperature: expected a number > 0, found 0"),
        ({"target": "a_w"}, "found 'a_w' (did you mean 'a_v'?)"),
        ({"base": BASE | {"dataset": "a"}}, "at least two domains"),
        ({"output_dir": None}, "output_dir: expected a folder"),
    ],
)
def test_mistakes_name_the_key_and_what_is_allowed(tmp_path, change, said):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, **change)
    assert said in str(error.value)


def test_natural_needs_a_number_for_each_domain(tmp_path):
    with pytest.raises(ConfigError, match="natural: expected a number > 0 for each of a, b, c"):
        study.natural_proportions(read(tmp_path, natural=[1, 2]))


def test_what_is_written_is_what_init_mixture_proportions_file_reads(tmp_path):
    found = read(tmp_path, natural=[5, 3, 2])
    sampler = regmix.MixtureSampler(NATURAL)
    tried = sampler.sample(40, found.generator(0))
    fitted = regmix.fit(tried, bowl(tried))
    best = regmix.propose(fitted, sampler, 10_000, 64, found.generator(1))
    target = tmp_path / study.PROPORTIONS_FILE
    target.write_text(json.dumps(study.proportions_record(found, sampler, fitted, best)))
    assert proportions.read(str(target)) == best.tolist()
    proportions.check_names(str(target), ["a", "b", "c"])
