"""LESS: select the samples whose gradients point in the direction of the target samples'.

Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning" (arXiv 2402.04333). Targets are the
samples of `eval_dataset`; with `eval_on_each_dataset: true` every evaluation set is a sub-task of its own.

    score_i = max over sub-tasks s of  sum over checkpoints c of  eta_c  mean over v in s of  cos(G_i^c, g_v^c)

G_i is Adam's update for the gradient of candidate i alone, with the moments and constants of the running optimizer, and g_v
the plain gradient of a target's mean token loss. Streamed scores are exact: signals/per_sample_gradients.py computes them
without a projection and without storing a gradient. Scores from a store are those of projected gradients: see
signals/projection.py.

The current model is one checkpoint; the paper sums over several. In a run every selection scores the model of its step, so
`checkpoints: K` sums over the last K selections, with eta_c the learning rate at each divided by the sum of the rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Selector
from dataflex_mega.algorithms.requests import GradientSignal, Request, StoredGradientSignal
from dataflex_mega.algorithms.selectors._ranking import cosines, max_cosines, select_highest
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import ProjectionSpec, SignalTable, UpdateContext


@dataclass(frozen=True)
class CosineRecord:
    """The cosines of one selection, whose model is a checkpoint in LESS's sense."""

    step: int  # optimizer steps done
    learning_rate: float  # for the step to come
    ids: Tensor  # [n] int64, ascending
    cosines: Tensor  # [n, S] float32


@dataclass
class CosineHistory:
    """The last `max_records` records, oldest first; equal on every rank."""

    max_records: int
    records: tuple[CosineRecord, ...] = ()

    def record(self, new: CosineRecord) -> Tensor:
        """Append a record -> [n, S] float64, `weighted_mean_cosines` of its candidates over all records.

        A record at the step of the last one takes its place. Raises DataError when earlier records have another S.
        """
        earlier = tuple(record for record in self.records if record.step < new.step)
        if any(record.cosines.shape[1] != new.cosines.shape[1] for record in earlier):
            found = f"{new.cosines.shape[1]} sub-tasks, records before have {earlier[-1].cosines.shape[1]}"
            raise DataError(f"checkpoints: step {new.step} compares with {found}")
        self.records = (*earlier, new)[-self.max_records :]
        return weighted_mean_cosines(self.records, new.ids)

    def state_dict(self) -> list[dict[str, Any]]:
        """The records as plain values and tensors."""
        return [dict(vars(record)) for record in self.records]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        self.records = tuple(CosineRecord(**record) for record in state)


def weighted_mean_cosines(records: Sequence[CosineRecord], ids: Tensor) -> Tensor:
    """[n] ids, each in at least one record -> [n, S] float64, the mean over the records that have the candidate.

    A record counts by its learning rate; where the rates of a candidate's records sum to 0, they count the same.
    """
    shape = (len(ids), records[-1].cosines.shape[1])
    weighted_sum, plain_sum = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    rate_sum, count = (torch.zeros(len(ids), 1, dtype=torch.float64) for _ in range(2))
    for record in records:
        if len(record.ids) == 0:
            continue
        positions = torch.searchsorted(record.ids, ids).clamp(max=len(record.ids) - 1)
        present = (record.ids[positions] == ids).nonzero().flatten()
        values = record.cosines[positions[present]].double()
        weighted_sum[present] += record.learning_rate * values
        plain_sum[present] += values
        rate_sum[present] += record.learning_rate
        count[present] += 1
    return torch.where(rate_sum > 0, weighted_sum / rate_sum, plain_sum / count)


@dataclass
class Less(Selector):
    """The candidates with the highest scores.

    Args:
        gradient_type: "adam" preconditions the candidates' gradients, "sgd" does not. Targets are never preconditioned.
        mode: "streaming": exact scores, nothing is stored; each sub-task costs a direction of the model's size. "store":
            projected gradients of all candidates on disk, and scores from them: for dozens of sub-tasks and more, or when
            the features have other uses too.
        projection: of a store. "two_sided": every layer by itself, cheap; "dense": one random matrix for all, as in the
            paper, which costs many times a training pass.
        side: two_sided: a layer's gradient becomes side x side numbers; a side of a layer that is shorter stays unprojected.
        proj_dim: dense: numbers per sample; None: 8192. With streaming it changes nothing, since nothing is projected.
        checkpoints: over how many selections, this one included, a candidate's cosines are averaged, weighted by the
            learning rates of their steps. A selection that did not score the candidate (`candidate_fraction`) is left out.
            Every process stores S numbers per candidate and selection.
        seed: of the projection; None: 0. With streaming it changes nothing.
        store_dir: where stores go, one folder for each state of the model; None: output_dir/gradient_store, where a store
            is removed when the next one is whole.
        store_block: samples between checksums: what a killed build computes again, at most, on each process.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    mode: Literal["streaming", "store"] = "streaming"
    projection: Literal["two_sided", "dense"] = "two_sided"
    side: Annotated[int, Range(ge=1)] = 16
    proj_dim: Annotated[int | None, Range(ge=1)] = None
    checkpoints: Annotated[int, Range(ge=1)] = 1
    seed: Annotated[int | None, Range(ge=0)] = None
    store_dir: str | None = None
    store_block: Annotated[int, Range(ge=1)] = 256
    _history: CosineHistory = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "streaming" and self.store_dir is not None:
            raise ConfigError("selector.less.store_dir: has no effect with mode: streaming; set mode: store")
        self._history = CosineHistory(self.checkpoints)

    def requests(self) -> tuple[Request, ...]:
        adam = self.gradient_type == "adam"
        if self.mode == "streaming":
            return (GradientSignal(adam),)
        size = self.side if self.projection == "two_sided" else self.proj_dim or 8192
        spec = ProjectionSpec(self.projection, size, self.seed or 0)
        return (StoredGradientSignal(adam, spec, self.store_dir, self.store_block),)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1; 0 for a candidate without a gradient (no target token in it).

        With several checkpoints [n, S], the cosines of each sub-task, of which `combine_updates` takes the largest.
        """
        return max_cosines(table) if self.checkpoints == 1 else cosines(table)

    def combine_updates(self, ids: Tensor, scores: Tensor, context: UpdateContext) -> Tensor:
        """[n] scores unchanged; [n, S] cosines -> [n] float32, the largest of the means over the last selections."""
        if self.checkpoints == 1:
            return scores
        record = CosineRecord(context.step, context.learning_rate, ids, scores.cpu())
        return self._history.record(record).max(dim=1).values.float()

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        return select_highest(scores, count, "selector.less")

    def state_dict(self) -> dict[str, Any]:
        """The cosines of the last selections; nothing with one checkpoint."""
        return {} if self.checkpoints == 1 else {"history": self._history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._history.load_state_dict(state.get("history", ()))
