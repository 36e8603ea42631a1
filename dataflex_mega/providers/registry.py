"""Which class serves which request. A provider is one class in one file, entered by a decorator:

    @provides(LastTokenEntropy, scope="candidates", requires={Capability.PER_SAMPLE})
    class LastTokenEntropyProvider(Provider): ...

The files of this package are imported when a request is first looked up; a plug-in's module is imported as its algorithms
are (see `dataflex_mega.plugins`). Everything that a run must know before a model is built stands in the decorator, so what
cannot work is refused at once, with the name of what is missing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from dataflex_mega.algorithms.base import Algorithm
from dataflex_mega.algorithms.requests import Request
from dataflex_mega.engines.capabilities import describe_missing
from dataflex_mega.errors import ConfigError, UserCall, did_you_mean
from dataflex_mega.providers.context import SignalContext

Scope = Literal["candidates", "plan", "batch", "forward"]
SCOPES = ("candidates", "plan", "batch", "forward")
PAIR_STAGES = ("dpo",)  # whose samples are pairs of answers, see data.pairs
# The roles whose requests a scope serves. Reference losses lie beside the samples, whoever asks for them.
ROLES_AT: dict[str, tuple[str, ...]] = {
    "candidates": ("selector",),
    "plan": ("selector", "mixer"),
    "batch": ("weighter",),
    "forward": ("mixer", "weighter"),
}
T = TypeVar("T", bound=type)


class Provider:
    """Serves one kind of request for one run. Made once, when the engine is built."""

    def __init__(self, context: SignalContext) -> None:
        self.context = context

    def compute(self, request: Any, scope: Any) -> Any:
        """The value of a request; every rank calls it at the same time.

        Args:
            request: of the class that `provides` names.
            scope: `context.CandidateScope`, `PlanScope` or `BatchScope`, by the scope of the provider.

        Returns:
            Scope "candidates": columns by name, n rows each, on the CPU. Otherwise what `Algorithm.receive` gets.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks compute")

    @classmethod
    def step_options(cls, request: Any) -> dict[str, Any]:
        """Scope "forward": fields of engines.options.StepOptions that make the engine give the signal."""
        return {}

    @classmethod
    def check(cls, request: Any, engine: EngineInfo, who: str) -> None:
        """Raise ConfigError, before processes are joined, for a request that cannot be served. `who`: the algorithm, as
        messages name it: "selector less"."""


@dataclass(frozen=True)
class EngineInfo:
    """What is known of an engine before it is built."""

    name: str
    capabilities: frozenset[str]
    stage: str = "sft"
    not_adam: str | None = None  # how the optimizer was asked for, when it does not keep Adam's moments


@dataclass(frozen=True)
class ProviderSpec:
    """One provider and what it needs."""

    request: type[Request]
    provider: type[Provider]
    scope: Scope
    requires: frozenset[str]  # engine capabilities
    needs_targets: Callable[[Any], bool]  # whether a request compares with the samples of eval_dataset
    needs_reference: bool  # whether token losses of a reference model are read
    stages: tuple[str, ...]  # training stages that have it; (): all
    whole_pool: bool  # whether a row depends on the other candidates
    pairs: bool  # whether it serves samples that are pairs of answers


_specs: dict[type[Request], ProviderSpec] = {}  # decorators fill it while modules are imported


def provides(
    request: type[Request],
    *,
    scope: Scope,
    requires: Iterable[str] = (),
    needs_targets: bool | Callable[[Any], bool] = False,
    needs_reference: bool = False,
    stages: tuple[str, ...] = (),
    whole_pool: bool = False,
    pairs: bool = False,
) -> Callable[[T], T]:
    """Enter a provider for a request. Raises ConfigError when another class serves the same request."""

    def decorate(cls: T) -> T:
        other = _specs.get(request)
        if other is not None and _full_name(other.provider) != _full_name(cls):
            names = f"{_full_name(other.provider)} and by {_full_name(cls)}"
            raise ConfigError(f"request {request.__name__} is provided by {names}; keep one")
        if scope not in SCOPES:
            raise ConfigError(f"provider {cls.__name__}: scope must be one of {', '.join(SCOPES)}, found {scope!r}")
        targets = needs_targets if callable(needs_targets) else (lambda _request, value=needs_targets: value)
        _specs[request] = ProviderSpec(
            request, cls, scope, frozenset(map(str, requires)), targets, needs_reference, stages, whole_pool, pairs
        )
        return cls

    return decorate


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _load_built_in() -> None:
    package = importlib.import_module("dataflex_mega.providers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def find_provider(request: Request, who: str) -> ProviderSpec:
    """The entry of a request, or of the nearest class that it derives from. `who`: see Provider.check.

    Raises ConfigError for a request that no provider serves.
    """
    _load_built_in()
    for kind in type(request).__mro__:
        if kind in _specs:
            return _specs[kind]
    names = sorted(kind.__name__ for kind in _specs)
    hint = did_you_mean(type(request).__name__, names) or f"; available requests: {', '.join(names)}"
    raise ConfigError(f"{who} makes the request {type(request).__name__}, which no provider serves{hint}")


def requests_at(algorithm: Algorithm, scope: Scope) -> tuple[tuple[Request, ProviderSpec], ...]:
    """The requests of an algorithm that are served at a scope, with their entries."""
    who = display_name(algorithm)
    pairs = ((request, find_provider(request, who)) for request in algorithm.requests())
    return tuple((request, entry) for request, entry in pairs if entry.scope == scope)


def display_name(algorithm: Any) -> str:
    """The name that an algorithm has in a configuration; of one that is not of this package, its class."""
    module = type(algorithm).__module__
    is_built_in = module.startswith("dataflex_mega.algorithms.")
    return module.rpartition(".")[2] if is_built_in else type(algorithm).__name__


def check_requests(role: str, algorithm: Algorithm, engine: EngineInfo) -> None:
    """Refuse what an engine or a stage does not have, for each request of an algorithm and so for combinations.

    Raises ConfigError naming the algorithm, the capability, and the engines that have it.
    """
    who = f"{role} {display_name(algorithm)}"
    for request in _checked_requests(algorithm, who):
        entry = find_provider(request, who)
        if role not in ROLES_AT[entry.scope] and not entry.needs_reference:
            roles = " or ".join(ROLES_AT[entry.scope])
            raise ConfigError(f"{who} makes the request {type(request).__name__}, which is served to a {roles} only")
        missing = entry.requires - engine.capabilities
        if missing:
            raise ConfigError(f"{who} needs {describe_missing(missing, engine.name)}")
        if entry.stages and engine.stage not in entry.stages:
            needed = " or ".join(entry.stages)
            raise ConfigError(f"stage: {who} needs stage: {needed}, found {engine.stage}")
        if engine.stage in PAIR_STAGES and not entry.pairs:
            measured = "only the loss of a pair of answers is measured, besides what needs no measurement"
            raise ConfigError(f"stage: {who} does not work with stage: {engine.stage}: {measured}; use another one")
        if engine.not_adam is not None and getattr(request, "adam", False):
            raise ConfigError(
                f"{who}: gradient_type: adam needs optim: adamw_torch, found {engine.not_adam}; use gradient_type: sgd"
            )
        entry.provider.check(request, engine, who)


def _checked_requests(algorithm: Algorithm, who: str) -> tuple[Request, ...]:
    """What an algorithm asks for. Raises ConfigError for anything but a tuple of requests."""
    with UserCall(f"{who}.requests"):
        requests = algorithm.requests()
    expected = "a tuple of requests of dataflex_mega.algorithms.requests, such as (LossSignal(),)"
    if not isinstance(requests, (tuple, list)):
        raise ConfigError(f"{who}.requests returned a {type(requests).__name__} ({requests!r}), expected {expected}")
    for request in requests:
        if not isinstance(request, Request):
            raise ConfigError(f"{who}.requests returned {request!r} among others, expected {expected}")
    return tuple(requests)


def needs_targets(algorithm: Any) -> bool:
    """Whether some request of an algorithm compares with target samples."""
    return any(find_provider(r, display_name(algorithm)).needs_targets(r) for r in algorithm.requests())


def needs_reference(algorithm: Any) -> bool:
    """Whether some request of an algorithm reads losses of a reference model."""
    return any(find_provider(r, display_name(algorithm)).needs_reference for r in algorithm.requests())


def needs_whole_pool(algorithm: Any) -> bool:
    """Whether a candidate's signals depend on the other candidates, so that old ones cannot be reused."""
    return any(find_provider(r, display_name(algorithm)).whole_pool for r in algorithm.requests())
