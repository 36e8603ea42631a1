"""The four contracts. An algorithm is one dataclass in one file: its fields are its parameters, its methods are pure.

A file `algorithms/mixers/my_mixer.py` with one subclass of `Mixer` is known as `mixer: my_mixer`; a class elsewhere as
`mixer: package.module:Class`. An algorithm sees data of the whole job, already reduced over ranks, and never asks which
rank it runs on: the same inputs give the same outputs everywhere. Randomness comes from the generator it is handed.

What an algorithm remembers between calls lives in attributes that `state` returns and `restore` takes: numbers, strings,
lists and dicts of them (written as JSON) and tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataflex_mega.errors import ConfigError
from dataflex_mega.types import Clock, SampleObs, SignalTable, StepStats


@dataclass(frozen=True)
class Domains:
    """The domains of the pool, in the order of the `dataset` key."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # samples
    initial: tuple[float, ...]  # proportions before any update, sums to 1

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Algorithm(ABC):
    """What all roles share."""

    def setup(self, domains: Domains) -> None:
        """Called once, before training, with the pool's domains. Check parameters against them here (ConfigError)."""

    def state(self) -> dict[str, Any]:
        """Everything that must survive a restart."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, called after `setup`."""


class Selector(Algorithm):
    """Chooses which samples are trained until the next update."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Signals to compute for every candidate, n rows of them:

    "loss"            "loss" [n] float32, mean loss of the sample's target tokens
    "gradient_adam"   "dot" [n, S] float32, inner products of the sample's gradient with the mean of the normalised target
    "gradient_sgd"    gradients of each of S groups, and "norm2" [n], its squared norm; with Adam's moments or without
    "store_adam"      the same two, of projected gradients that lie in a store; the selector is a types.UsesStore
    "store_sgd"
    "clusters"        "cluster", "turn" [n] int64, "density", "transfer" [n]: groups of samples that are alike by the model's
                      hidden states; see signals.clusters
    """

    @abstractmethod
    def score(self, table: SignalTable) -> Tensor:
        """Candidates of one rank, n rows -> their scores, [n] float32, or [n, m] where `choose` needs m numbers of each.

        Called on every rank with that rank's share: a row depends on that candidate alone.
        """

    def accumulate(self, ids: Tensor, scores: Tensor, clock: Clock) -> Tensor:
        """Once an update, between `score` and `choose`, on every rank with the candidates of all: [n] ascending ids and what
        `score` gave them -> what `choose` gets of them. A selector that adds up what several updates gave does it here."""
        return scores

    @abstractmethod
    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """Scores of all candidates, [N] (or [N, m]) float32 -> [count] int64 positions in 0..N-1, the ones to train on.

        With a mixer beside it this is called once a domain, with that domain's candidates and its share of the count.
        """


class Mixer(Algorithm):
    """Decides in which proportions the domains are drawn."""

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """After every step: the reduced sums, the proportions it was drawn with, and its number from 1 on."""

    @abstractmethod
    def proportions(self, clock: Clock, rng: torch.Generator) -> Tensor:
        """[k] float64, non-negative, sums to 1: what to draw from now on."""

    def loss_weights(self) -> Tensor | None:
        """[k] weights of the domains in the loss, or None for no weighting."""
        return None

    def report(self) -> dict[str, Any]:
        """What to write beside the proportions in `<name>_weights.jsonl`."""
        return {}


class Weighter(Algorithm):
    """Gives every sample of a batch its weight in the loss."""

    @abstractmethod
    def weights(self, obs: SampleObs, step: int, total_steps: int) -> Tensor:
        """All n samples of the data-parallel batch, in an order that is the same on all ranks -> [n] weights, mean 1."""


class Reorder(Algorithm):
    """Orders samples: says which rank by score stands at which place of a pass over them.

    A pattern knows only how many samples there are, so the same pass can go on after they were scored anew.
    """

    reads_scores: ClassVar[bool] = True
    """Whether ranks are by score; False: by sample id, and nothing is scored."""

    @abstractmethod
    def ranks(self, count: int, seed: int) -> Tensor:
        """[count] int64, each of 0..count-1 once: the rank of the sample at every place, 0 for the lowest score."""


def layered(ranks: Tensor, layers: int, turning: bool) -> Tensor:
    """[n] -> [n]: every `layers`-th entry from the first on, then from the second on, ...; `turning`: every other of
    these layers backwards, so that one begins where the layer before it ended."""
    parts = [ranks[layer::layers] for layer in range(layers)]
    return torch.cat([part.flip(0) if turning and number % 2 else part for number, part in enumerate(parts)])


def check_borders(where: str, sections: int, ratio: float, layers: int) -> None:
    """What `layered_at_borders` can do. Raises ConfigError naming the parameter of the pattern `where`."""
    for key, value in (("num_sections", sections), ("layers", layers)):
        if value < 1:
            raise ConfigError(f"{where}.{key}: must be >= 1, found {value}")
    if not 0 <= 2 * ratio < 1 / sections:
        most = f"{0.5 / sections:g} with num_sections {sections}"
        raise ConfigError(f"{where}.folding_ratio: must be >= 0 and below {most}, found {ratio}")


def layered_at_borders(count: int, sections: int, ratio: float, layers: int, turning: bool) -> Tensor:
    """[count] int64: 0, 1, 2, ... but `layered` within round(count * ratio) places of each border of `sections` equal
    sections. The stretches do not overlap while 2 * ratio < 1 / sections."""
    ranks = torch.arange(count)
    radius = round(count * ratio)
    for number in range(1, sections):
        border = round(count * number / sections)
        here = slice(max(border - radius, 0), min(border + radius, count))
        ranks[here] = layered(ranks[here], layers, turning)
    return ranks
