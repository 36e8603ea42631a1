"""Who makes the signals that a selector asks for.

The scorer itself makes losses and gradient scores. For anything else an entry of ENTRIES says how it is made for a run: a
function of the run and its engine that returns a signals.scorer.Provider. A new signal is a function and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.signals.clusters import Ranks, signals
from dataflex_mega.signals.hidden import unit
from dataflex_mega.signals.scorer import GRADIENTS, KNOWN, Provider, Scorer
from dataflex_mega.types import HiddenSpec, NeedsClusters

if TYPE_CHECKING:
    from dataflex_mega.wiring.run import Build


@dataclass(frozen=True)
class Entry:
    """A signal beyond those of the scorer."""

    make: Callable[[Build, Any], Provider]  # (run, engine) -> provider
    engines: tuple[str, ...] = ("fsdp", "megatron")  # that have it
    targets: bool = False  # whether candidates are compared with the samples of eval_dataset


def clusters(run: Build, engine: Any) -> Provider:
    """See signals.clusters; features from the model of now."""
    selector = run.roles.selector
    assert isinstance(selector, NeedsClusters)
    spec = selector.cluster_spec()
    layers = spec.layers if spec.layers is not None else spaced(engine.depth)
    specs = [HiddenSpec("mean", layer, squash=True) for layer in layers]
    ranks = Ranks(run.mesh.dp_rank, run.mesh.dp_size, run.ranks.sum, run.ranks.exchange, run.mesh.device)

    def make(scorer: Scorer, ids: np.ndarray) -> dict[str, Tensor]:
        found = [engine.embed(scorer.collate(samples), *specs).cpu() for samples, _ in scorer.batches(ids)]
        features = unit(torch.cat(found)[: len(ids)])
        first = sum(scorer.shares()[: scorer.rank])
        return signals(features, first, sum(scorer.shares()), spec, ranks)

    return make


def spaced(depth: int, count: int = 5) -> tuple[int, ...]:
    """Hidden states 1 .. depth, `count` of them evenly spaced, or all where there are fewer."""
    return tuple(sorted({round(1 + (depth - 1) * i / (count - 1)) for i in range(count)}))


ENTRIES: dict[str, Entry] = {
    "clusters": Entry(clusters),
}


def check(engine: str, selector: Selector | None, entries: Mapping[str, Entry] = ENTRIES) -> None:
    """Raises ConfigError for a signal that nobody makes, or that the engine does not have."""
    for name in sorted(selector.needs if selector is not None else ()):
        who = type(selector).__name__
        if name not in KNOWN and name not in entries:
            known = sorted({*KNOWN, *entries})
            hint = did_you_mean(name, known) or f"; there is {', '.join(known)}"
            raise ConfigError(f"selector: {who} needs a signal {name!r}, which nobody makes{hint}")
        if name in entries and engine not in entries[name].engines:
            others = ", ".join(f"engine: {other}" for other in entries[name].engines)
            raise ConfigError(
                f"selector: {who} needs the signal {name!r}, which engine: {engine} does not have; {others} has"
            )


def wants_targets(selector: Selector | None, entries: Mapping[str, Entry] = ENTRIES) -> bool:
    """Whether a selector compares candidates with target samples."""
    needs = selector.needs if selector is not None else frozenset()
    return any(name in GRADIENTS or (name in entries and entries[name].targets) for name in needs)


def providers(run: Build, engine: Any) -> dict[str, Provider]:
    """The providers that the selectors of a run ask for, by signal."""
    needs = frozenset().union(*(selector.needs for selector in run.measured))
    return {name: ENTRIES[name].make(run, engine) for name in sorted(needs & set(ENTRIES))}
