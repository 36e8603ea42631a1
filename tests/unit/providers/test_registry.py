"""Which provider serves a request, and what is refused before a model is built, with the remedy named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dataflex_mega.algorithms.base import Selector, Weighter
from dataflex_mega.algorithms.requests import GradientSignal, LossSignal, Request, RouterLoadSignal
from dataflex_mega.engines.capabilities import Capability, capabilities_of, describe_missing
from dataflex_mega.errors import ConfigError
from dataflex_mega.providers import registry
from dataflex_mega.providers.losses import LossProvider
from dataflex_mega.providers.registry import EngineInfo, Provider, check_requests, find_provider, provides
from dataflex_mega.registry import build

FSDP, MEGATRON = (EngineInfo(name, capabilities_of(name)) for name in ("fsdp", "megatron"))


@dataclass(frozen=True)
class LengthSignal(Request):
    """Column "length"."""


@dataclass(frozen=True)
class LosSignal(Request):
    """Nearly the name of another request."""


@dataclass(frozen=True)
class ScaledLossSignal(LossSignal):
    """A request that derives from another one."""

    scale: float = 1.0


class Asks(Selector):
    """A selector with any requests."""

    def __init__(self, *requests):
        self._requests = requests

    def requests(self):
        return self._requests

    def score(self, table):
        return table["length"]

    def select(self, scores, count, context, rng):
        return torch.arange(count)


@pytest.fixture
def entries(monkeypatch):
    """The registry, without what a test enters once the test is over."""
    find_provider(LossSignal(), "a test")  # the package's own are entered
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))


def test_an_unknown_request_is_named_with_the_nearest_or_with_all(entries):
    with pytest.raises(
        ConfigError, match=r"selector Asks makes the request LosSignal, .*\(did you mean 'LossSignal'\?\)"
    ):
        check_requests("selector", Asks(LossSignal(), LosSignal()), FSDP)

    @dataclass(frozen=True)
    class Zebra(Request):
        """Nothing is called like this."""

    with pytest.raises(
        ConfigError, match=r"request Zebra, which no provider serves; available requests: Batch"
    ) as found:
        check_requests("selector", Asks(Zebra()), FSDP)
    assert all(kind.__name__ in str(found.value) for kind in (LossSignal, GradientSignal, RouterLoadSignal))
    assert "\n" not in str(found.value)


def test_a_capability_that_an_engine_lacks_is_named_with_the_engine_and_the_remedy(entries):
    provides(LengthSignal, scope="candidates", requires={Capability.PER_SAMPLE}, needs_targets=True)(Provider)
    check_requests("selector", Asks(LengthSignal(), LossSignal()), FSDP)
    check_requests("selector", Asks(), MEGATRON)
    bare = EngineInfo("bare", frozenset())
    with pytest.raises(
        ConfigError,
        match="^selector Asks needs logits of single samples, not supported by engine: bare; use engine: fsdp or megatron$",
    ):
        check_requests("selector", Asks(LengthSignal()), bare)
    assert registry.needs_targets(Asks(LengthSignal())) and registry.needs_targets(Asks(GradientSignal(adam=False)))
    assert not registry.needs_targets(Asks(LossSignal())) and not registry.needs_targets(Asks())


@pytest.mark.parametrize(
    ("kind", "spec", "what"),
    [
        ("selector", {"name": "less", "mode": "store"}, "projected gradients"),
        ("selector", {"name": "cluster_less"}, "projected gradients"),
        ("selector", {"name": "nice"}, "generation"),
        ("weighter", {"name": "greats"}, "projected gradients"),
    ],
)
def test_what_megatron_lacks_is_refused_for_every_algorithm_that_asks(kind, spec, what):
    algorithm = build(kind, spec)
    check_requests(kind, algorithm, FSDP)
    message = f"^{kind} {spec['name']} needs {what}, not supported by engine: megatron; use engine: fsdp$"
    with pytest.raises(ConfigError, match=message):
        check_requests(kind, algorithm, MEGATRON)


def test_a_capability_that_no_engine_has_is_named_without_a_remedy():
    assert describe_missing(frozenset({"telepathy"}), "fsdp") == "telepathy, not supported by engine: fsdp"


def test_a_stage_that_a_signal_does_not_know_is_refused():
    nice = build("selector", "nice")
    with pytest.raises(ConfigError, match="^stage: selector nice needs stage: sft, found dpo$"):
        check_requests("selector", nice, EngineInfo("fsdp", capabilities_of("fsdp"), "dpo"))
    check_requests("selector", build("selector", "less"), EngineInfo("fsdp", capabilities_of("fsdp"), "pt"))


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("selector", {"name": "coincide"}, r"selector\.coincide\.embedding_layers: .* set \[-1\], found null"),
        ("selector", {"name": "coincide", "embedding_layers": [1, -1]}, r"found \[1, -1\]"),
        (
            "weighter", {"name": "joint_update_aware", "embed_layer": 2},
            r"weighter\.joint_update_aware\.embed_layer: .* set -1, found \[2\]",
        ),
    ],
)  # fmt: skip
def test_layers_that_megatron_cannot_capture_are_refused_by_name(kind, spec, message):
    algorithm = build(kind, spec)
    check_requests(kind, algorithm, FSDP)
    with pytest.raises(ConfigError, match=message):
        check_requests(kind, algorithm, MEGATRON)


def test_the_last_layer_and_algorithms_without_layers_are_fine_on_megatron():
    last = {"name": "coincide", "embedding_layers": [-1]}
    for kind, spec in (("selector", last), ("weighter", {"name": "adapt"}), ("selector", {"name": "loss"})):
        check_requests(kind, build(kind, spec), MEGATRON)


def test_a_request_is_served_by_the_provider_of_the_nearest_class(entries):
    assert find_provider(ScaledLossSignal(2.0), "a test").provider is LossProvider
    provides(ScaledLossSignal, scope="plan")(Provider)
    assert find_provider(ScaledLossSignal(2.0), "a test").provider is Provider
    assert find_provider(LossSignal(), "a test").provider is LossProvider


def test_two_providers_of_a_request_are_refused(entries):
    class Length(Provider):
        """One of them."""

    class Other(Provider):
        """The other one."""

    entered = provides(LengthSignal, scope="candidates")
    assert entered(Length) is Length
    entered(Length)  # a module that is imported again
    with pytest.raises(
        ConfigError, match=r"LengthSignal is provided by .*test_registry.*Length and by .*Other; keep one"
    ):
        entered(Other)
    with pytest.raises(
        ConfigError, match=r"LossSignal is provided by dataflex_mega\.providers\.losses\.LossProvider and"
    ):
        provides(LossSignal, scope="candidates")(Length)
    Other.__qualname__, Other.__module__ = Length.__qualname__, "another_package"
    with pytest.raises(ConfigError, match=r"and by another_package\..*Length; keep one"):
        entered(Other)


def test_a_scope_that_is_none_is_refused(entries):
    with pytest.raises(
        ConfigError, match="provider Provider: scope must be one of candidates, plan, batch, forward, found 'step'"
    ):
        provides(LengthSignal, scope="step")(Provider)


def test_a_provider_without_compute_says_so():
    with pytest.raises(NotImplementedError, match="Provider lacks compute"):
        Provider(None).compute(LengthSignal(), None)


def test_what_requests_need_is_known_before_a_run():
    doge, against = build("mixer", "doge"), build("mixer", {"name": "doge", "against": "eval"})
    assert not registry.needs_targets(doge) and registry.needs_targets(against)
    for kind, name in (("mixer", "doremi"), ("selector", "rho_loss"), ("weighter", "rho1")):
        assert registry.needs_reference(build(kind, name))
    assert not registry.needs_reference(build("selector", "less"))
    assert registry.needs_whole_pool(build("selector", "coincide"))
    assert not registry.needs_whole_pool(build("selector", "cluster_less"))


def test_equal_requests_are_one_value():
    first, second = build("selector", "cluster_less"), build("selector", "cluster_less")
    assert first.requests() == second.requests(), "what they are called with does not count"
    assert len({GradientSignal(), GradientSignal(adam=True), GradientSignal(adam=False)}) == 2
    assert LengthSignal().name == "length_signal" and GradientSignal().name == "gradient_adam"


def test_a_request_that_its_role_is_never_served_is_refused():
    class Wrong(Weighter):
        def requests(self):
            return (LossSignal(),)

        def weights(self, samples, step, total_steps):
            return samples.loss_sum

    with pytest.raises(
        ConfigError, match="weighter Wrong makes the request LossSignal, which is served to a selector only"
    ):
        check_requests("weighter", Wrong(), FSDP)
