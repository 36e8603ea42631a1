"""LESS: train on what moves the model as the target samples would.

Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning" (arXiv 2402.04333). Targets are the
samples of `eval_dataset`; with `eval_on_each_dataset: true` every evaluation set is a sub-task of its own.

    score_i = max over sub-tasks s of  sum over checkpoints c of  eta_c  mean over v in s of  cos(G_i^c, g_v^c)

G_i is Adam's update for the gradient of candidate i alone, with the moments and constants of the running optimizer, and g_v
the plain gradient of a target's mean token loss. Streamed scores are exact: see signals/gradients.py for how they are
computed without a projection and without storing a gradient. From a store they are those of projected gradients: see
signals/projection.py.

The model of now is one checkpoint; the paper sums over several. In a run every selection scores the model of its time, so
`checkpoints: K` adds up the last K selections, eta_c the learning rate at each, divided by the sum of the rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import Clock, FeatureSpec, SignalTable, UsesStore


@dataclass(frozen=True)
class Round:
    """What one selection gave: the model of that time is a checkpoint."""

    step: int  # optimizer steps done
    rate: float  # learning rate of the step to come
    ids: Tensor  # [n] int64, ascending
    values: Tensor  # [n, S] float32


@dataclass
class Rounds:
    """The last `keep` rounds, oldest first; equal on every rank."""

    keep: int
    kept: tuple[Round, ...] = ()

    def add(self, new: Round) -> Tensor:
        """Take a round -> [n, S] float64 for its candidates: the mean of their values over the kept rounds that have them.

        A round counts by its learning rate, and a candidate's rates are divided by their sum; where that is 0 its rounds
        count the same. A round at the step of the last one takes its place.

        Raises DataError when earlier rounds have another S.
        """
        earlier = tuple(each for each in self.kept if each.step < new.step)
        if any(each.values.shape[1] != new.values.shape[1] for each in earlier):
            found = f"{new.values.shape[1]} sub-tasks, rounds before have {earlier[-1].values.shape[1]}"
            raise DataError(f"checkpoints: step {new.step} compares with {found}")
        self.kept = (*earlier, new)[-self.keep :]
        return mean_of(self.kept, new.ids)

    def state(self) -> list[dict[str, Any]]:
        """The rounds as plain values and tensors."""
        return [{"step": r.step, "rate": r.rate, "ids": r.ids, "values": r.values} for r in self.kept]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """The inverse of `state`."""
        self.kept = tuple(Round(r["step"], r["rate"], r["ids"], r["values"]) for r in state)


def mean_of(rounds: Sequence[Round], ids: Tensor) -> Tensor:
    """[n] ids, each in at least one round -> [n, S] float64, see Rounds.add."""
    shape = (len(ids), rounds[-1].values.shape[1])
    weighed, plain = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    rates, count = (torch.zeros(len(ids), 1, dtype=torch.float64) for _ in range(2))
    for each in rounds:
        if len(each.ids) == 0:
            continue
        places = torch.searchsorted(each.ids, ids).clamp(max=len(each.ids) - 1)
        there = (each.ids[places] == ids).nonzero().flatten()
        values = each.values[places[there]].double()
        weighed[there] += each.rate * values
        plain[there] += values
        rates[there] += each.rate
        count[there] += 1
    return torch.where(rates > 0, weighed / rates, plain / count)


@dataclass
class Less(Selector, UsesStore):
    """The candidates with the highest scores.

    Args:
        gradient_type: "adam" preconditions the candidates' gradients, "sgd" does not. Targets are never preconditioned.
        mode: "streaming": exact scores, nothing is stored; each sub-task costs a direction of the model's size. "store":
            projected gradients of all candidates on disk, and scores from them: for dozens of sub-tasks and more, or when
            the features are wanted for something else too.
        projection: of a store. "two_sided": every layer by itself, cheap; "dense": one random matrix for all, as in the
            paper, which costs many times a training pass.
        side: two_sided: a layer's gradient becomes side x side numbers; a shorter side of a layer is kept as it is.
        proj_dim: dense: numbers a sample; None: 8192. With streaming it changes nothing, since nothing is projected.
        checkpoints: how many selections back, this one included, the cosines of a candidate are added up, by the learning
            rates of those steps over their sum. A candidate that a selection did not score (`candidates`) has no entry of
            it and is divided by the rates of those that it has. Every process keeps S numbers a candidate and selection.
        seed: of the projection; None: 0. With streaming it changes nothing.
        store_dir: where stores go, one folder for each state of the model; None: output_dir/gradient_store, where a store
            is removed when the next one is whole.
        store_block: samples between checksums: what a killed build computes again, at most, on each process.
        cache_dir: where step_N.json goes; None: output_dir/selections.
        save_interval: stands in DataFlex's files; it changes nothing.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    mode: Literal["streaming", "store"] = "streaming"
    projection: Literal["two_sided", "dense"] = "two_sided"
    side: int = 16
    proj_dim: int | None = None
    checkpoints: int = 1
    seed: int | None = None
    store_dir: str | None = None
    store_block: int = 256
    cache_dir: str | None = None
    save_interval: int | None = None
    _rounds: Rounds = field(init=False, repr=False, compare=False)

    needs: ClassVar[frozenset[str]] = frozenset({"gradient_adam"})

    def __post_init__(self) -> None:
        for name in ("side", "proj_dim", "store_block", "checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"selector.less.{name}: must be at least 1, found {value}")
        if self.mode == "streaming" and self.store_dir is not None:
            raise ConfigError("selector.less.store_dir: has no effect with mode: streaming; set mode: store")
        self._rounds = Rounds(self.checkpoints)
        kind = "gradient" if self.mode == "streaming" else "store"
        self.needs = frozenset({f"{kind}_{self.gradient_type}"})  # type: ignore[misc]  # of this instance

    def feature_spec(self) -> FeatureSpec:
        """Of a store."""
        size = self.side if self.projection == "two_sided" else self.proj_dim or 8192
        return FeatureSpec(self.projection, size, self.seed or 0)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1; 0 for a candidate without a gradient (no target token in it).

        With several checkpoints [n, S], the cosines of each sub-task, of which `accumulate` takes the largest.
        """
        norm = table["norm2"].sqrt().unsqueeze(1)
        cosines = torch.where(norm > 0, table["dot"] / norm, torch.zeros_like(table["dot"]))
        return cosines.max(dim=1).values if self.checkpoints == 1 else cosines

    def accumulate(self, ids: Tensor, scores: Tensor, clock: Clock) -> Tensor:
        """[n] scores as they are; [n, S] cosines -> [n] float32, the largest mean over the last selections."""
        if self.checkpoints == 1:
            return scores
        return self._rounds.add(Round(clock.step, clock.rate, ids, scores.cpu())).max(dim=1).values.float()

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        if count > len(scores):
            raise DataError(f"selector.less: {count} samples wanted, {len(scores)} candidates are there")
        ranked = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -torch.inf))
        return torch.sort(ranked, descending=True, stable=True).indices[:count]

    def state(self) -> dict[str, Any]:
        """The selections that are added up; nothing with one checkpoint."""
        return {} if self.checkpoints == 1 else {"rounds": self._rounds.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._rounds.restore(state.get("rounds", ()))
