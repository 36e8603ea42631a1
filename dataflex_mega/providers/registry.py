"""Who makes the signals that a selector asks for.

The scorer itself makes losses and gradient scores. For anything else an entry of ENTRIES says how it is made for a run: a
function of the run, its engine and the selector, which returns a signals.computer.Provider. A new signal is a function and a
line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector, Weighter
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.providers import cluster_gradients as representatives
from dataflex_mega.providers import policy_gradients as policy
from dataflex_mega.providers import stored_gradients as store
from dataflex_mega.signals import rewards
from dataflex_mega.signals.clusters import cluster_signals
from dataflex_mega.signals.computer import BUILT_IN_SIGNALS, GRADIENT_SIGNALS, Provider, SignalComputer
from dataflex_mega.signals.sample_embeddings import l2_normalize
from dataflex_mega.types import EmbeddingSpec, NeedsBatchGradients, NeedsClusters, NeedsHidden, UsesPolicy

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build


@dataclass(frozen=True)
class Entry:
    """A signal beyond those of the scorer."""

    make: Callable[[Build, Any, Any], Provider]  # (run, engine, the selector that asks) -> provider
    engines: tuple[str, ...] = ("fsdp", "megatron")  # that have it
    stage: str | None = None  # the only one that has it
    targets: bool = False  # whether candidates are compared with the samples of eval_dataset


def clusters(run: Build, engine: Any, selector: Any) -> Provider:
    """See signals.clusters; features from the model of now."""
    assert isinstance(selector, NeedsClusters)
    spec = selector.cluster_spec()
    layers = spec.layers if spec.layers is not None else spaced(engine.num_layers)
    specs = [EmbeddingSpec("mean", layer, tanh=True) for layer in layers]

    def make(computer: SignalComputer, ids: np.ndarray) -> dict[str, Tensor]:
        found = [engine.embed(computer.collate(samples), *specs).cpu() for samples, _ in computer.batches(ids)]
        features = l2_normalize(torch.cat(found)[: len(ids)])
        num_samples = sum(computer.rank_counts())
        return cluster_signals(features, computer.first_position(), num_samples, spec, run.collectives)

    return make


def spaced(depth: int, count: int = 5) -> tuple[int, ...]:
    """Hidden states 1 .. depth, `count` of them evenly spaced, or all where there are fewer."""
    return tuple(sorted({round(1 + (depth - 1) * i / (count - 1)) for i in range(count)}))


ENTRIES: dict[str, Entry] = {
    "clusters": Entry(clusters),
    "policy_adam": Entry(policy.provider(adam=True), engines=("fsdp",), targets=True, stage="sft"),
    "policy_sgd": Entry(policy.provider(adam=False), engines=("fsdp",), targets=True, stage="sft"),
    "store_adam": Entry(store.provider(adam=True), engines=("fsdp",), targets=True),
    "cluster_adam": Entry(representatives.provider(adam=True), engines=("fsdp",), targets=True),
    "cluster_sgd": Entry(representatives.provider(adam=False), engines=("fsdp",), targets=True),
    "store_sgd": Entry(store.provider(adam=False), engines=("fsdp",), targets=True),
}


def named(algorithm: Any) -> str:
    """The name that an algorithm has in a configuration; of one that is not of this package, its class."""
    module = type(algorithm).__module__
    ours = module.startswith("dataflex_mega.algorithms.")
    return module.rpartition(".")[2] if ours else type(algorithm).__name__


def check(
    engine: str, selector: Selector | None, entries: Mapping[str, Entry] = ENTRIES, stage: str | None = None
) -> None:
    """Raises ConfigError for a signal that nobody makes, or that the engine or the stage does not have."""
    for name in sorted(selector.signals if selector is not None else ()):
        who = named(selector)
        if name not in BUILT_IN_SIGNALS and name not in entries:
            known = sorted({*BUILT_IN_SIGNALS, *entries})
            hint = did_you_mean(name, known) or f"; there is {', '.join(known)}"
            raise ConfigError(f"selector: {who} needs a signal {name!r}, which nobody makes{hint}")
        if name in entries and engine not in entries[name].engines:
            others = ", ".join(f"engine: {other}" for other in entries[name].engines)
            raise ConfigError(
                f"selector: {who} needs the signal {name!r}, which engine: {engine} does not have; {others} has"
            )
        if name in entries and stage is not None and entries[name].stage not in (None, stage):
            raise ConfigError(f"stage: selector {who} needs stage: {entries[name].stage}, found {stage}")
    if isinstance(selector, UsesPolicy):
        rewards.load_reward(selector.reward)


def check_weighter(engine: str, weighter: Weighter | None) -> None:
    """Raises ConfigError for a weighter that the engine cannot serve."""
    if isinstance(weighter, NeedsBatchGradients) and engine != "fsdp":
        who = named(weighter)
        raise ConfigError(f"weighter: {who} needs gradients of the coming batch, which engine: {engine} does not have")


def check_layers(engine: str, kind: str, name: str, algorithm: Any) -> None:
    """Raises ConfigError for hidden states that the engine cannot hear: Megatron's has those of the last layer."""
    if engine != "megatron":
        return
    key, layers = "embed_layer", None
    if isinstance(algorithm, NeedsHidden):
        layers = (algorithm.hidden.layer,)
    elif isinstance(algorithm, NeedsClusters):
        key, layers = "embedding_layers", algorithm.cluster_spec().layers or "null"
    if layers is not None and layers != (-1,):
        only = "-1" if key == "embed_layer" else "[-1]"
        found = layers if isinstance(layers, str) else list(layers)
        raise ConfigError(f"{kind}.{name}.{key}: engine: megatron has the last layer only; set {only}, found {found}")


def wants_targets(selector: Selector | None, entries: Mapping[str, Entry] = ENTRIES) -> bool:
    """Whether a selector compares candidates with target samples."""
    needs = selector.signals if selector is not None else frozenset()
    return any(name in GRADIENT_SIGNALS or (name in entries and entries[name].targets) for name in needs)


def providers(run: Build, engine: Any) -> dict[str, Provider]:
    """The providers that the selectors of a run ask for, by signal. Raises ConfigError when two ask for one of them."""
    made: dict[str, Provider] = {}
    for selector in run.measured:
        for name in sorted(selector.signals & set(ENTRIES)):
            if name in made:
                raise ConfigError(
                    f"reorder: its scores and the selector both need the signal {name!r}; one of them may"
                )
            made[name] = ENTRIES[name].make(run, engine, selector)
    return made
