"""The contract of every registered algorithm; a new file is tested here without an edit."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import Algorithm, Mixer, Reorder, Selector, Weighter
from dataflex_mega.algorithms.requests import TargetEmbeddingSignal, requests_of
from dataflex_mega.providers.registry import find_provider
from dataflex_mega.registry import build, list_builtin_names, load_class
from dataflex_mega.types import SampleStats
from tests.unit.algorithms.examples import DOMAINS, generator, observed, stats, table_for, update_context

SPECS: dict[str, dict[str, Any]] = {}  # "kind.name" -> parameters an algorithm cannot do without

ALL = [(kind, name) for kind in ("selector", "mixer", "reorder", "weighter") for name in list_builtin_names(kind)]
SELECTORS, MIXERS, WEIGHTERS = ([n for k, n in ALL if k == kind] for kind in ("selector", "mixer", "weighter"))


def made(kind: str, name: str) -> Any:
    algorithm = build(kind, {"name": name, **SPECS.get(f"{kind}.{name}", {})})
    algorithm.setup(DOMAINS)
    for request in requests_of(algorithm, TargetEmbeddingSignal):
        target = torch.nn.functional.normalize(torch.randn(5, generator=generator(5)), dim=0).double()
        algorithm.receive(request, target, 0)
    return algorithm


def plain(state: Any) -> Any:
    """A state as a checkpoint brings it back: tensors as they are, everything else through JSON."""
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {**json.loads(json.dumps({k: v for k, v in state.items() if k not in tensors})), **tensors}


def feed(mixer: Mixer, first: int, last: int) -> None:
    for step in range(first, last):
        losses = {d: 1.0 + ((step * 7 + d * 3) % 5) / 3 for d in range(3) if (step + d) % 4}
        mixer.observe(stats(losses), (0.5, 0.3, 0.2), step)


def test_the_first_algorithms_are_there() -> None:
    assert {("selector", "random"), ("selector", "loss"), ("weighter", "loss")} <= set(ALL)
    assert {("mixer", "static"), ("mixer", "random"), ("mixer", "odm")} <= set(ALL)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_class_says_what_it_is(kind: str, name: str) -> None:
    cls = load_class(kind, name)
    assert issubclass(cls, Algorithm) and (cls.__doc__ or "").strip()
    assert "Args:" in (cls.__doc__ or "")


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_requests_are_equal_values_that_a_provider_serves(kind: str, name: str) -> None:
    algorithm = made(kind, name)
    requests = algorithm.requests()
    assert requests == made(kind, name).requests(), "equal parameters, equal requests"
    assert len(set(requests)) == len(requests)
    entries = [find_provider(request, name) for request in requests]
    # A mixer or a weighter that asks for reference losses reads them beside the samples of a batch.
    assert kind == "selector" or all(entry.scope != "candidates" or entry.needs_reference for entry in entries)
    names = [request.name for request in requests]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", SELECTORS)
def test_selector_chooses_the_count_from_its_candidates(name: str) -> None:
    selector: Selector = made("selector", name)
    candidates = table_for(selector)
    before = copy.deepcopy(candidates)
    scores = selector.score(candidates)
    assert scores.shape[0] == 75 and scores.dim() in (1, 2) and scores.dtype == torch.float32
    kept = scores.clone()
    for count in (1, 20, 75):
        first = selector.select(scores, count, update_context(), generator())
        assert first.shape == (count,) and first.dtype == torch.int64
        assert int(first.min()) >= 0 and int(first.max()) < 75
        assert len(set(first.tolist())) == count
        assert torch.equal(first, selector.select(scores, count, update_context(), generator()))
    assert torch.equal(scores, kept)
    assert all(torch.equal(candidates[s], before[s]) for s in before.signals)


@pytest.mark.parametrize("name", SELECTORS)
def test_scores_of_a_share_are_the_scores_of_the_whole(name: str) -> None:
    selector: Selector = made("selector", name)
    candidates = table_for(selector)
    parts = []
    for rows in (slice(0, 31), slice(31, 75)):
        signals = {key: value[rows] for key, value in candidates.signals.items()}
        parts.append(
            selector.score(type(candidates)(candidates.sample_ids[rows], candidates.domain_ids[rows], signals))
        )
    assert torch.equal(torch.cat(parts), selector.score(candidates))


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_gives_proportions_again_and_again(name: str) -> None:
    mixer: Mixer = made("mixer", name)
    for last in (1, 2, 30):
        feed(mixer, 1, last)
        shares = mixer.proportions(update_context(last), generator(last))
        assert shares.shape == (3,) and shares.dtype == torch.float64
        assert bool((shares >= 0).all()) and float(shares.sum()) == pytest.approx(1, abs=1e-12)
        assert torch.equal(shares, mixer.proportions(update_context(last), generator(last)))
        json.dumps(mixer.report(), allow_nan=False)
        weights = mixer.loss_weights()
        assert weights is None or weights.shape == (3,)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_leaves_its_inputs_as_they_were(name: str) -> None:
    mixer: Mixer = made("mixer", name)
    given = stats({0: 2.0, 2: 1.0})
    before = copy.deepcopy(given)
    mixer.proportions(update_context(), generator()).zero_()
    assert float(mixer.proportions(update_context(), generator()).sum()) == pytest.approx(1)
    mixer.observe(given, (0.5, 0.3, 0.2), 1)
    mixer.proportions(update_context(), generator()).zero_()  # not a view of what the mixer keeps
    assert torch.equal(given.domain_loss, before.domain_loss) and torch.equal(given.domain_tokens, before.domain_tokens)
    assert float(mixer.proportions(update_context(), generator()).sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_with_one_domain_draws_it(name: str) -> None:
    mixer = build("mixer", {"name": name, **SPECS.get(f"mixer.{name}", {})})
    assert isinstance(mixer, Mixer)
    mixer.setup(type(DOMAINS)(("only",), (4,), (1.0,)))
    mixer.observe(stats({0: 2.0}, domains=1), (1.0,), 1)
    assert mixer.proportions(update_context(), generator()).tolist() == [1.0]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_state_through_json_continues_bit_by_bit(kind: str, name: str) -> None:
    whole, resumed = made(kind, name), made(kind, name)
    if kind == "mixer":
        feed(whole, 1, 12)
    resumed.load_state_dict(plain(whole.state_dict()))
    assert str(plain(resumed.state_dict())) == str(plain(whole.state_dict()))
    if kind == "mixer":
        assert torch.equal(
            whole.proportions(update_context(), generator()), resumed.proportions(update_context(), generator())
        )
        feed(whole, 12, 20)
        feed(resumed, 12, 20)
        assert torch.equal(
            whole.proportions(update_context(), generator()), resumed.proportions(update_context(), generator())
        )
        assert whole.report() == resumed.report()


@pytest.mark.parametrize("name", list_builtin_names("reorder"))
@pytest.mark.parametrize("count", [0, 1, 2, 31, 1000])
def test_reorder_has_each_rank_once(name: str, count: int) -> None:
    reorder: Reorder = made("reorder", name)
    ranks = reorder.rank_order(count, 5)
    assert ranks.dtype == torch.int64 and sorted(ranks.tolist()) == list(range(count))
    assert torch.equal(ranks, made("reorder", name).rank_order(count, 5))


@pytest.mark.parametrize("name", WEIGHTERS)
@pytest.mark.parametrize("losses", [[2.0], [1.0, 1.0], [1.0, 2.0, 3.0, 5.0, 0.1], [1e-8, 3e4, 7.0]])
def test_weighter_gives_weights_with_mean_one(name: str, losses: list[float]) -> None:
    weighter: Weighter = made("weighter", name)
    samples = weighter.reduce(observed(losses))
    before = copy.deepcopy(samples)
    weights = weighter.weights(samples, 3, 100)
    assert weights.shape == (len(losses),) and not weights.requires_grad
    assert bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())
    assert float(weights.double().mean()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights, weighter.weights(samples, 3, 100))
    assert (
        samples.embeddings is not None
        and before.embeddings is not None
        and torch.equal(samples.embeddings, before.embeddings)
    )
    assert torch.equal(samples.loss_sum, before.loss_sum) and torch.equal(samples.num_tokens, before.num_tokens)


@pytest.mark.parametrize("name", WEIGHTERS)
def test_weights_move_with_their_samples(name: str) -> None:
    weighter: Weighter = made("weighter", name)
    samples = weighter.reduce(observed(torch.rand(20, generator=generator()) * 5))
    order = torch.randperm(20, generator=generator(1))
    moved = SampleStats(**{field: rows[order] for field, rows in samples.gathered_fields().items()})
    expected = weighter.weights(samples, 3, 100)[order]
    torch.testing.assert_close(weighter.weights(moved, 3, 100), expected, rtol=1e-6, atol=0)
