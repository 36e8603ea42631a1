"""DoGE: golden weights, a simulation in plain Python, and products of gradients against autograd."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.mixers.doge import Doge, alignment_scores
from dataflex_mega.algorithms.requests import DomainGradientSignal
from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.signals.gradient_gram import DomainGradientGram
from tests.distributed.layouts import samples_of, tiny_llama
from tests.unit.algorithms.examples import DOMAINS, generator, update_context
from tests.unit.engines.test_domain_weights import engine_of, token_losses
from tests.unit.engines.test_hidden_states import Rows

GRADIENTS = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
EQUAL = DomainInfo(("a", "b", "c"), (10, 10, 10), (1 / 3, 1 / 3, 1 / 3))


def gram_of(rows: list[list[float]]) -> torch.Tensor:
    found = torch.tensor(rows, dtype=torch.float64)
    return found @ found.T


def made(domains: DomainInfo = EQUAL, **parameters: Any) -> Doge:
    mixer = Doge(**parameters)
    mixer.setup(domains)
    return mixer


def learn(mixer: Doge, gram: torch.Tensor) -> None:
    (request,) = mixer.requests()
    mixer.receive(request, gram, 0)


def shares(mixer: Doge) -> list[float]:
    return mixer.proportions(update_context(), generator()).tolist()


def test_golden_weights() -> None:
    mixer = made(eta=1e-3 / 0.05)
    learn(mixer, gram_of(GRADIENTS))
    assert shares(mixer) == pytest.approx([0.3345623762, 0.3345623762, 0.3308752475], abs=1e-8)


@pytest.mark.parametrize("against", ["others", "eval"])
def test_updates_in_plain_python(against: Any) -> None:
    mixer, weights, total = (
        made(DOMAINS, eta=0.3, max_score=0.8, against=against),
        list(DOMAINS.initial_proportions),
        [0.0] * 3,
    )
    rng = np.random.default_rng(0)
    for number in range(1, 20):
        rows = rng.normal(size=(4, 6)).tolist()
        learn(mixer, gram_of(rows if against == "eval" else rows[:3]))
        length = sum(math.hypot(*row) for row in rows[:3]) / 3
        for i in range(3):
            others = [rows[3]] if against == "eval" else [rows[j] for j in range(3) if j != i]
            aligned = sum(a * sum(column) for a, column in zip(rows[i], zip(*others, strict=True), strict=True))
            weights[i] *= math.exp(0.3 * min(0.8, max(0.0, aligned / (length + 1e-6))))
        weights = [w / sum(weights) for w in weights]
        total = [a + b for a, b in zip(total, weights, strict=True)]
        assert shares(mixer) == pytest.approx(weights, rel=1e-11)
        updates, mean = mixer.average_weights()
        assert updates == number and mean.tolist() == pytest.approx([x / number for x in total], rel=1e-11)


def test_domains_at_right_angles_leave_the_weights_and_opposed_ones_gain_nothing() -> None:
    mixer = made(DOMAINS, eta=5.0)
    learn(mixer, gram_of([[1, 0, 0], [0, 2, 0], [0, 0, 3]]))
    assert shares(mixer) == pytest.approx(list(DOMAINS.initial_proportions))
    assert alignment_scores(gram_of([[1, 0], [-1, 0]]), 2, "others", 5.0).tolist() == [0.0, 0.0]


def test_products_that_are_not_finite_change_nothing() -> None:
    mixer = made(DOMAINS)
    learn(mixer, torch.full((3, 3), math.nan))
    assert shares(mixer) == pytest.approx(list(DOMAINS.initial_proportions))


def test_a_resumed_run_goes_on_bit_by_bit() -> None:
    whole, resumed = made(), made()
    learn(whole, gram_of(GRADIENTS))
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for mixer in (whole, resumed):
        learn(mixer, gram_of(GRADIENTS[::-1]))
    assert whole.state_dict() == resumed.state_dict() and whole.report() == resumed.report()
    with pytest.raises(CheckpointError, match="3 domains, this run has 1"):
        made(DomainInfo(("a",), (1,), (1.0,))).load_state_dict(whole.state_dict())


def test_what_it_asks_for() -> None:
    assert made(probe_samples=7).requests() == (DomainGradientSignal(7, against_targets=False),)
    assert made(against="eval").requests() == (DomainGradientSignal(64, against_targets=True),)


@pytest.mark.parametrize(("key", "value"), [("eta", 0.0), ("max_score", math.inf), ("probe_samples", 0)])
def test_wrong_parameters_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"mixer\.doge\.{key}: must be .*found"):
        made(**{key: value})


def test_products_are_those_of_autograd_in_any_batches_and_on_any_rank() -> None:
    parallel_info, model = init_distributed(), tiny_llama()
    domains = [samples_of(1), samples_of(2)]
    targets = [samples_of(3)[:3], samples_of(4)[:2]]
    expected = []
    for samples in (*domains, [sample for part in targets for sample in part]):
        model.zero_grad()
        count = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
        (sum(token_losses(model, sample).sum() for sample in samples) / count).backward()
        expected.append(torch.cat([p.grad.flatten().double().clone() for p in model.parameters()]))
    rows = torch.stack(expected)
    model.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = engine_of(parallel_info, model)
    pool = SamplePool([Domain(str(d), Rows(samples)) for d, samples in enumerate(domains)])
    held = [SamplePool([Domain("t", Rows(part))]) for part in targets]
    for size in (3, 16):
        parts = [
            DomainGradientGram(pool, held, lambda s: collate(s, 0), lambda groups: groups, size, rank, 2, 5)(
                16, True, 7
            )
            for rank in (0, 1)
        ]
        both = [one + other for one, other in zip(*parts, strict=True)]
        torch.testing.assert_close(engine.gradient_gram(both), rows @ rows.T, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and engine.runner.module.training
    shutdown_distributed(orderly=True)
