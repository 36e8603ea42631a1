"""The four contracts. An algorithm is one dataclass in one file: its fields are its parameters, its methods are pure.

A file `algorithms/mixers/my_mixer.py` with one subclass of `Mixer` is known as `mixer: my_mixer`; a class elsewhere as
`mixer: package.module:Class`. An algorithm sees data of the whole job, already reduced over ranks, and never asks which
rank it runs on: the same inputs give the same outputs everywhere. Randomness comes from the generator argument.

An algorithm's state between calls is what `state_dict` returns and `load_state_dict` takes: numbers, strings, lists and
dicts of them (written as JSON), and tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataflex_mega.algorithms.requests import Request
from dataflex_mega.schema.constraints import Distinct as Distinct
from dataflex_mega.schema.constraints import NotEmpty as NotEmpty
from dataflex_mega.schema.constraints import Range as Range
from dataflex_mega.schema.constraints import RelativeWeights as RelativeWeights
from dataflex_mega.schema.constraints import check_fields
from dataflex_mega.types import SampleStats, SignalTable, StepLossWeights, StepStats, TokenSelection, UpdateContext


@dataclass(frozen=True)
class DomainInfo:
    """The domains of the pool, in the order of the `dataset` key."""

    names: tuple[str, ...]
    num_samples: tuple[int, ...]
    initial_proportions: tuple[float, ...]  # proportions before any update, sums to 1

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Algorithm(ABC):
    """What all roles share. A subclass with a `__post_init__` of its own calls this one first."""

    role: ClassVar[str] = ""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of parameters and their successors: a configuration may have either, the former with a note."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a parameter outside the range that its annotation declares."""
        check_fields(self, f"{self.role}.{self._name()}.")

    @classmethod
    def _name(cls) -> str:
        """The name in the configuration: that of the file for an algorithm of the package, else that of the class."""
        package, _, module = cls.__module__.rpartition(".")
        return module if package.startswith("dataflex_mega.algorithms") else cls.__name__

    def setup(self, domains: DomainInfo) -> None:
        """Called once, before training, with the pool's domains. Check parameters against them here (ConfigError)."""

    def requests(self) -> tuple[Request, ...]:
        """All that the algorithm may ask a run to compute for it; see algorithms.requests. Called after `setup` too."""
        return ()

    def is_due(self, request: Request, step: int) -> bool:
        """Whether the value of a request is wanted now, after `step` steps. Not asked for columns of candidates."""
        return True

    def receive(self, request: Request, value: Any, step: int) -> None:
        """Take the value of a request, computed after `step` steps with the current model; equal on every rank."""
        raise NotImplementedError(f"{type(self).__name__} makes the request {request} and has no `receive`")

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, called after `setup`."""


@dataclass
class Selector(Algorithm):
    """Chooses which samples are trained until the next update.

    Args:
        cache_dir: where step_N.json of each selection goes; None: output_dir/selections.
    """

    role: ClassVar[str] = "selector"
    cache_dir: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def score(self, table: SignalTable) -> Tensor:
        """Candidates of one rank, n rows with the columns of its requests -> their scores, [n] float32; or [n, m] where
        `select` needs m numbers of each. NaN: the candidate has no score; not all may be NaN.

        Called on every rank with the candidates of that rank: a row depends on that candidate alone.
        """

    def combine_updates(self, ids: Tensor, scores: Tensor, context: UpdateContext) -> Tensor:
        """[n] ascending ids and their scores -> the scores that `select` gets.

        Called once per update, between `score` and `select`, on every rank with the candidates of all ranks. A selector that
        combines the scores of several updates does it here.
        """
        return scores

    @abstractmethod
    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """Scores of all candidates, [N] (or [N, m]) float32 -> [count] int64 positions in 0..N-1, the samples to train on.

        None comes twice, unless the selector has a parameter `replacement` that is true or there are fewer than `count`
        candidates.

        With a mixer this is called once per domain, with the candidates of that domain and its part of the count.
        """


class Mixer(Algorithm):
    """Decides in which proportions the domains are drawn."""

    role: ClassVar[str] = "mixer"

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """Called after every step: its reduced sums, the proportions it was drawn with, and its number from 1 on."""

    @abstractmethod
    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64, non-negative, sums to 1: the proportions to draw from this update on."""

    def loss_weights(self) -> Tensor | None:
        """[k] weights of the domains in the loss, or None for no weighting."""
        return None

    def step_loss_weights(self) -> StepLossWeights | None:
        """Weights of the domains in the loss of the next step, for a mixer whose weights change after every step and not
        only with the plan. They act while `loss_weights` of the plan is set."""
        return None

    def average_weights(self) -> tuple[int, Tensor] | None:
        """(number of updates, [k] float64 that sums to 1): the mean of the weights over the run, for a mixer whose result
        is the proportions of a later run."""
        return None

    def report(self) -> dict[str, Any]:
        """Further fields of a line of `<name>_weights.jsonl`."""
        return {}


class Weighter(Algorithm):
    """Gives every sample of a batch its weight in the loss."""

    role: ClassVar[str] = "weighter"

    def token_selection(self) -> TokenSelection | None:
        """Which target tokens are trained on; None: all."""
        return None

    def reduce(self, samples: SampleStats) -> SampleStats:
        """The samples of one rank -> what travels to all ranks and reaches `weights`. Called before the gathering, so that
        wide fields can be made narrow."""
        return samples

    @abstractmethod
    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """All n samples of the data-parallel batch, in an order that is the same on all ranks -> [n] weights,
        finite and >= 0, with mean 1 over the samples of a step."""


class Reorder(Algorithm):
    """Orders samples: says which rank by score stands at which position of a pass over them.

    A pattern knows only the number of samples, so the same pass can continue after they were scored again.
    """

    role: ClassVar[str] = "reorder"

    uses_scores: ClassVar[bool] = True
    """Whether ranks are by score; False: by sample id, and nothing is scored."""

    @abstractmethod
    def rank_order(self, count: int, seed: int) -> Tensor:
        """[count] int64, each of 0..count-1 once: the rank of the sample at every position, 0 for the lowest score."""
