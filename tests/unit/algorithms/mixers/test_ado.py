"""ADO: golden policy, an independent simulation, fits of laws that are known, and a history that stays small."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.mixers import ado
from dataflex_mega.algorithms.mixers.ado import Ado, LossHistory, huber_objective, preference, speeds
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.types import StepStats
from tests.unit.algorithms.examples import DOMAINS, generator, stats, update_context

LAWS = [[1.0, 0.5, 0.5], [2.0, 0.3, 0.3], [0.5, 0.8, 0.02]]  # a, e, alpha
SHARE = [0.4, 0.4, 0.2]
SHORT: dict[str, Any] = {"start_step": 20, "refit_every": 30, "ignore_steps": 0}


def made(domains: DomainInfo = DOMAINS, **parameters: Any) -> Ado:
    mixer = Ado(**parameters)
    mixer.setup(domains)
    return mixer


def shares(mixer: Ado) -> list[float]:
    return mixer.proportions(update_context(), generator()).tolist()


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(losses: dict[int, float], samples: list[float]) -> StepStats:
    return replace(stats(losses), domain_samples=double(samples))


def with_laws(mixer: Ado, seen: float, laws: list[Any] = LAWS) -> Ado:
    mixer.load_state_dict({**mixer.state_dict(), "laws": laws, "mean_share": SHARE, "seen": [seen * s for s in SHARE]})
    return mixer


def loss_of(law: list[float], n: float) -> float:
    return math.exp(law[1]) + math.exp(law[0]) * n ** -law[2]


def fit(n: torch.Tensor, losses: torch.Tensor, weight: torch.Tensor, floor: float) -> torch.Tensor | None:
    """One domain."""
    found = ado.fit(n.unsqueeze(0), losses.unsqueeze(0), weight.unsqueeze(0), floor)[0]
    return found if bool(torch.isfinite(found).all()) else None


# -- the policy --------------------------------------------------------------------------------------------------------


def test_golden_preference_and_policy() -> None:
    speed = speeds(double(LAWS), double([1e4] * 3))
    rho = preference(speed, double(DOMAINS.initial_proportions), double(SHARE), "share", 0.01)
    assert rho.tolist() == pytest.approx([0.1162608813, 0.7178448573, 0.1658942614], abs=5.1e-11)
    mixer = with_laws(made(), 1e4 - 8)
    mixer.observe(
        drawn({}, [3.2, 3.2, 1.6]), (0.4, 0.4, 0.2), 5000 + 1
    )  # keeps SHARE, brings n to 1e4, no step to refit at
    assert shares(mixer) == pytest.approx([0.4616260881, 0.3417844857, 0.1965894261], abs=5.1e-11)


def test_spread_is_the_credit_of_the_official_code() -> None:
    speed = speeds(double(LAWS), double([1e4] * 3))
    rho = preference(speed, double(DOMAINS.initial_proportions), double(SHARE), "spread", 0.01)
    assert rho.tolist() == pytest.approx([0.11335183, 0.69988311, 0.18676507], abs=5.1e-9)


@pytest.mark.parametrize("count", ["all", "own"])
def test_policy_in_plain_python(count: Any) -> None:
    mixer = with_laws(made(start_step=1, refit_every=10**9, ignore_steps=0, count=count), 1000.0)
    share, seen = list(SHARE), [1000.0 * s for s in SHARE]
    mean = list(DOMAINS.initial_proportions)
    for t in range(2, 60):
        samples = [1.0 + (t * (d + 3)) % 7 for d in range(3)]
        mixer.observe(drawn({0: 2.0}, samples), (0.5, 0.3, 0.2), t)
        total = sum(samples)
        share = [0.9 * h + 0.1 * x / total for h, x in zip(share, samples, strict=True)]
        seen = [a + b for a, b in zip(seen, samples, strict=True)]
        n = seen if count == "own" else [sum(seen)] * 3
        slope = [max(law[2], 0.05) * (loss_of(law, m) - math.exp(law[1])) / m for law, m in zip(LAWS, n, strict=True)]
        raw = [s * p * math.sqrt(h) for s, p, h in zip(slope, DOMAINS.initial_proportions, share, strict=True)]
        cut = [max(0.01, r / sum(raw)) for r in raw]
        rho = [c / sum(cut) for c in cut]
        policy = [0.9 * m + 0.1 * r for m, r in zip(mean, rho, strict=True)]
        mean = [(1 - 1 / (t + 1)) * m + r / (t + 1) for m, r in zip(mean, rho, strict=True)]
        assert shares(mixer) == pytest.approx(policy, rel=1e-11)
        assert mixer.report()["mean_policy"] == pytest.approx(mean, rel=1e-11)


def test_a_domain_without_a_law_keeps_the_least_share() -> None:
    mixer = with_laws(made(start_step=1, refit_every=10**9, ignore_steps=0), 1e4, [LAWS[0], None, LAWS[2]])
    mixer.observe(drawn({}, [3.2, 3.2, 1.6]), (0.4, 0.4, 0.2), 2)
    rho = [(p - 0.9 * mu) / 0.1 for p, mu in zip(shares(mixer), DOMAINS.initial_proportions, strict=True)]
    assert rho[1] == pytest.approx(0.01 / 1.01) and sum(rho) == pytest.approx(1)
    json.dumps(mixer.report(), allow_nan=False)


def test_without_any_speed_the_prior_is_preferred() -> None:
    found = preference(double([0, 0, 0]), double(DOMAINS.initial_proportions), double(SHARE), "share", 0.01)
    assert found.tolist() == pytest.approx([0.5, 0.3, 0.2])
    alone = preference(double([3.0]), double([1.0]), double([1.0]), "spread", 0.01)  # h (1 - h) is 0
    assert alone.tolist() == [1.0]


def test_before_the_start_the_initial_proportions_are_drawn() -> None:
    mixer = made(**SHORT)
    for step in range(1, 20):
        mixer.observe(drawn({0: 9 / step, 1: 3.0, 2: 3.0}, [4, 2, 2]), DOMAINS.initial_proportions, step)
        assert shares(mixer) == pytest.approx([0.5, 0.3, 0.2], abs=1e-15)
    assert mixer.report()["scaling_laws"] == [None] * 3


# -- fits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [[2.0, 0.7, 0.4], [3.0, 0.9, 0.2]])
def test_a_fit_finds_the_law_behind_exact_losses(law: list[float]) -> None:
    n = double([64.0 * 50 * (i + 1) for i in range(80)])
    losses = double([loss_of(law, float(x)) for x in n])
    found = fit(n, losses, torch.ones_like(n), 0.5)
    assert found is not None and found.tolist() == pytest.approx(law, abs=1e-3)


def test_a_fit_of_noisy_losses_is_as_good_as_the_law_behind_them_and_as_all_its_neighbours() -> None:
    law, n = double([3.0, 0.8, 0.3]), torch.linspace(1e4, 1e6, 100, dtype=torch.float64)
    noise = 1 + 0.02 * torch.randn(100, generator=generator(), dtype=torch.float64)
    losses, weight = double([loss_of(law.tolist(), float(x)) for x in n]) * noise, torch.full_like(n, 20.0)
    found = fit(n, losses, weight, 0.5)
    assert found is not None

    def value(laws: torch.Tensor) -> torch.Tensor:
        return huber_objective(laws, n.log(), losses.log(), weight, 0.5)

    assert float(value(found)) <= float(value(law))
    for size in (1e-3, 1e-2, 1e-1):
        around = found + size * torch.randn(2000, 3, generator=generator(1), dtype=torch.float64)
        assert float(value(around).min()) >= float(value(found)) - 1e-7


def test_huber_objective_in_plain_python() -> None:
    law, n, losses, weight = [7.0, 0.2, 0.9], [100.0, 1000.0], [2.0, 2.1], [0.5, 3.0]
    expected = (7.0 - 6.5) + (0.5 - 0.2) + (0.9 - 0.8) - 0.001
    for x, y, w in zip(n, losses, weight, strict=True):
        error = abs(math.log(loss_of(law, x)) - math.log(y))
        expected += w * (1e-3 * (error - 5e-4) if error > 1e-3 else error**2 / 2)
    found = huber_objective(double(law), double(n).log(), double(losses).log(), double(weight), 0.5)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_losses_below_the_penalty_need_a_smaller_irreducible_loss() -> None:
    """A domain that ends at a loss of 0.6: with the paper's penalty its law cannot go there."""
    law = [3.0, -0.5, 0.3]
    n = torch.linspace(1e4, 1e6, 60, dtype=torch.float64)
    losses, weight = double([loss_of(law, float(x)) for x in n]), torch.full((60,), 3.0, dtype=torch.float64)
    held, free = fit(n, losses, weight, 0.5), fit(n, losses, weight, -3.0)
    assert held is not None and float(held[1]) > 0.3
    assert free is not None and free.tolist() == pytest.approx(law, abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_fits_of_noisy_losses_come_near_the_law_and_do_not_end_where_a_penalty_sets_in(seed: int) -> None:
    n = torch.linspace(1e4, 1e6, 100, dtype=torch.float64)
    noise = 1 + 0.01 * torch.randn(100, generator=generator(seed), dtype=torch.float64)
    losses, weight = double([loss_of([3.0, 0.8, 0.3], float(x)) for x in n]) * noise, torch.full_like(n, 5 / 3)
    found = fit(n, losses, weight, 0.5)
    assert found is not None and found.tolist() == pytest.approx([3.0, 0.8, 0.3], abs=0.5)
    assert float(found[1]) == pytest.approx(0.8, abs=0.06) and float(found[2]) == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize(("points", "seed"), [(20, 0), (100, 0), (100, 1)])
@pytest.mark.parametrize("law", [[3.0, 0.8, 0.3], [2.0, -0.5, 0.1]])
def test_the_last_bits_of_losses_do_not_move_a_fit_even_where_a_penalty_sets_in(
    points: int, seed: int, law: list[float]
) -> None:
    """Sums over other numbers of processes differ by about 3e-8; plans of all of them must stay alike."""
    n = torch.linspace(1e6 / points, 1e6, points, dtype=torch.float64)
    noise = 1 + 0.01 * torch.randn(points, generator=generator(seed), dtype=torch.float64)
    bits = 1 + 3e-8 * torch.randn(points, generator=generator(9), dtype=torch.float64)
    losses, weight = double([loss_of(law, float(x)) for x in n]) * noise, torch.full_like(n, points / 60)
    found = [fit(n, x, weight, 0.5) for x in (losses, losses * bits)]
    speed = [float(speeds(x.unsqueeze(0), n[-1:])) for x in found if x is not None]
    assert len(speed) == 2 and speed[0] == pytest.approx(speed[1], rel=1e-5)


# -- what was observed -------------------------------------------------------------------------------------------------


def test_the_history_stays_bounded_and_loses_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ado, "MAX_POINTS", 16)
    history, losses = LossHistory(2), [3 + math.sin(i) for i in range(1000)]
    for i, loss in enumerate(losses):
        history.add([float(i + 1), 2.0 * i + 2], [4 * loss, 0.0], [4.0, 0.0])
        assert len(history.groups) <= 16
    n, means, weight = history.points(0)
    assert history.width == 64 and weight[:-1].tolist() == [6.4] * (len(weight) - 1)
    assert float(weight.sum()) == pytest.approx(100)
    assert float((n * weight).sum()) * 10 == pytest.approx(sum(range(1, 1001)))
    expected = [sum(losses[i : i + 64]) / len(losses[i : i + 64]) for i in range(0, 1000, 64)]
    assert means.tolist() == pytest.approx(expected)
    assert len(history.points(1)[0]) == 0  # never drawn


def run(mixer: Ado, first: int, last: int) -> list[list[float]]:
    """Domain 0 learns fast, 1 slowly, 2 not at all; some steps lack a domain. -> the proportions after every step"""
    found = []
    for step in range(first, last):
        losses = {0: 2 + 60 * (8 * step) ** -0.6, 1: 2 + 3 * (8 * step) ** -0.1, 2: 3.0}
        losses.pop(step % 5, None)
        mixer.observe(drawn(losses, [4.0 * (step % 5 != 0), 2, 2]), DOMAINS.initial_proportions, step)
        found.append(shares(mixer))
    return found


def test_what_learns_is_drawn_more_than_what_does_not() -> None:
    mixer = made(**SHORT)
    run(mixer, 1, 60)
    gain = [p / mu for p, mu in zip(shares(mixer), DOMAINS.initial_proportions, strict=True)]
    assert gain[0] > gain[1] > gain[2]


def test_a_resumed_run_goes_on_bit_by_bit_through_the_next_fit() -> None:
    whole, resumed = made(**SHORT), made(**SHORT)
    run(whole, 1, 30)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    assert run(whole, 30, 55) == run(resumed, 30, 55)
    assert whole.report() == resumed.report() and whole.state_dict() == resumed.state_dict()


def test_a_state_does_not_change_with_what_comes_after_it() -> None:
    mixer = made(**SHORT)
    run(mixer, 1, 25)
    state = mixer.state_dict()
    kept = json.dumps(state)
    run(mixer, 25, 55)
    assert json.dumps(state) == kept


def test_early_steps_are_ignored_by_fits_but_counted() -> None:
    mixer = made(start_step=20, refit_every=30, ignore_steps=15)
    run(mixer, 1, 19)
    assert len(mixer.state_dict()["groups"]) == 3
    assert sum(mixer.state_dict()["seen"]) == pytest.approx(sum(8 if step % 5 else 4 for step in range(1, 19)))


def test_losses_that_are_not_finite_are_not_fitted() -> None:
    mixer = made(**SHORT)
    mixer.observe(drawn({0: math.nan, 1: math.inf, 2: 2.0}, [4, 2, 2]), DOMAINS.initial_proportions, 1)
    history = mixer._history
    assert [len(history.points(d)[0]) for d in range(3)] == [0, 0, 1]
    json.dumps(mixer.state_dict(), allow_nan=False)


def test_a_domain_with_few_points_is_not_fitted() -> None:
    mixer = made(start_step=20, refit_every=100, ignore_steps=0)
    for step in range(1, 21):
        losses = {0: 2 + 4 / step, 1: 2 + 2 / step} if step < ado.MIN_POINTS else {0: 2 + 4 / step}
        mixer.observe(drawn(losses, [4, 2, 2]), DOMAINS.initial_proportions, step)
    assert [law is None for law in mixer.report()["scaling_laws"]] == [False, True, True]


def test_state_of_other_domains_is_refused() -> None:
    with pytest.raises(CheckpointError, match="3 domains, this run has 1"):
        made(DomainInfo(("a",), (1,), (1.0,))).load_state_dict(made().state_dict())


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"start_step": 0}, "start_step"),
        ({"refit_every": 0}, "refit_every"),
        ({"ignore_steps": -1}, "ignore_steps"),
        ({"ignore_steps": 1000}, "ignore_steps"),
        ({"min_share": -0.1}, "min_share"),
        ({"min_share": 0.34}, "min_share"),
        ({"min_share": math.nan}, "min_share"),
        ({"min_irreducible": math.inf}, "min_irreducible"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mixer\.ado\.{key}: must be .*found"):
        made(**parameters)
