"""LESS: train on what moves the model as the target samples would.

Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning" (arXiv 2402.04333). Targets are the
samples of `eval_dataset`; with `eval_on_each_dataset: true` every evaluation set is a sub-task of its own.

    score_i = max over sub-tasks s of  mean over v in s of  cos(G_i, g_v)

G_i is Adam's update for the gradient of candidate i alone, with the moments and constants of the running optimizer, and g_v
the plain gradient of a target's mean token loss. Streamed scores are exact: see signals/gradients.py for how they are
computed without a projection and without storing a gradient. From a store they are those of projected gradients: see
signals/projection.py. The model of now is one checkpoint; the paper sums over several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import Clock, FeatureSpec, SignalTable, UsesStore


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
    seed: int | None = None
    store_dir: str | None = None
    store_block: int = 256
    cache_dir: str | None = None
    save_interval: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"gradient_adam"})

    def __post_init__(self) -> None:
        for name in ("side", "proj_dim", "store_block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"selector.less.{name}: must be at least 1, found {value}")
        if self.mode == "streaming" and self.store_dir is not None:
            raise ConfigError("selector.less.store_dir: has no effect with mode: streaming; set mode: store")
        kind = "gradient" if self.mode == "streaming" else "store"
        self.needs = frozenset({f"{kind}_{self.gradient_type}"})  # type: ignore[misc]  # of this instance

    def feature_spec(self) -> FeatureSpec:
        """Of a store."""
        size = self.side if self.projection == "two_sided" else self.proj_dim or 8192
        return FeatureSpec(self.projection, size, self.seed or 0)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1; 0 for a candidate without a gradient (no target token in it)."""
        norm = table["norm2"].sqrt().unsqueeze(1)
        cosines = torch.where(norm > 0, table["dot"] / norm, torch.zeros_like(table["dot"]))
        return cosines.max(dim=1).values

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        if count > len(scores):
            raise DataError(f"selector.less: {count} samples wanted, {len(scores)} candidates are there")
        ranked = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -torch.inf))
        return torch.sort(ranked, descending=True, stable=True).indices[:count]
