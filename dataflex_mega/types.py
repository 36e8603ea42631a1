"""The data that flows through a step. Plain values: nothing here knows a process group, a model or a file.

Shapes: b rows of a micro-batch, S positions of a row, n samples of a micro-batch (n > b when rows are packed),
G samples of a global batch, k domains, N samples of the pool.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a label that carries no loss
TIMINGS = ("_runtime", "_samples_per_second", "_steps_per_second")  # ends of metrics that are never the same twice


def without_timings(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an evaluation that another run of the same model gives again."""
    return {name: value for name, value in metrics.items() if not name.endswith(TIMINGS)}


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank. Labels are already shifted: labels[r, s] is what follows position s."""

    input_ids: Tensor  # [b, S] int64
    labels: Tensor  # [b, S] int64, IGNORE_INDEX where there is no target
    segment_ids: Tensor  # [b, S] int64, index into `sample_ids` of the sample at a position, -1 on padding
    position_ids: Tensor  # [b, S] int64, counted from the start of each sample
    sample_ids: Tensor  # [n] int64, positions in the pool
    domain_ids: Tensor  # [n] int64, 0..k-1
    is_packed: bool = False  # whether a row may hold several samples, so attention needs `segment_ids`
    reference_losses: Tensor | None = None  # [b, S] float32 token losses of the reference model, aligned with `labels`
    # [b] float32, the sum of the reference model's token losses of each row; of pairs, see data.pairs
    row_references: Tensor | None = None
    # Further inputs of the model by name, such as the pixels of images; see llamafactory.media
    extra: dict[str, Tensor] = field(default_factory=dict)
    # [b, S] bool, positions that stand for images, videos or audio; None: there are none
    is_media: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        extra = {name: value.to(device, non_blocking=True) for name, value in self.extra.items()}
        return Batch(**moved, is_packed=self.is_packed, extra=extra)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name; without those of a reference and `is_media` where there are none."""
        names = ("input_ids", "labels", "segment_ids", "position_ids", "sample_ids", "domain_ids")
        fields = {name: getattr(self, name) for name in names}
        optional = {name: getattr(self, name) for name in ("reference_losses", "row_references", "is_media")}
        return {**fields, **{name: value for name, value in optional.items() if value is not None}}


@dataclass(frozen=True)
class SampleStats:
    """Per-sample results of a forward pass. No gradient flows through any of them."""

    sample_ids: Tensor  # [n] int64
    domain_ids: Tensor  # [n] int64
    loss_sum: Tensor  # [n] float32, summed over the sample's target tokens
    num_tokens: Tensor  # [n] int64, number of target tokens
    excess_loss_sum: Tensor | None = None  # [n] float32, sum over target tokens of max(loss - reference loss, 0)
    step_denominators: Tensor | None = None  # [k] float64, each domain's part of the loss denominator of the whole step
    # [n, h] float32, see EmbeddingSpec; for `Weighter.weights`, [n, m] the result of `Weighter.reduce`
    embeddings: Tensor | None = None
    report: Tensor | None = None  # [n, m] float32, see objective.SampleLoss.report

    def gathered_fields(self) -> dict[str, Tensor]:
        """The fields with one row per sample, which are gathered from all ranks before samples are weighed."""
        names = ("sample_ids", "domain_ids", "loss_sum", "num_tokens", "embeddings")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def concatenate(cls, micro_batches: Sequence[SampleStats], step_denominators: Tensor) -> SampleStats:
        """The samples of several micro-batches of a step, in their order."""
        fields = [samples.gathered_fields() for samples in micro_batches]
        joined = {name: torch.cat([f[name] for f in fields]) for name in fields[0]}
        return cls(**joined, step_denominators=step_denominators)

    @property
    def loss(self) -> Tensor:
        """[n] float32: mean loss of a sample's target tokens; 0 for a sample without targets."""
        return self.loss_sum / self.num_tokens.clamp(min=1)


WeightFn = Callable[[SampleStats], Tensor]
"""Samples of one rank -> [n] float32 weights, without gradient; mean 1 over all ranks' samples of the step or micro-step."""


DomainLossNorm = Literal["token", "per_domain"]
"""How the weights w of k domains make a loss of a step in which domain d has the token-loss sum L_d and T_d tokens:

"token"        sum over d of (w_d / p_d) L_d, divided by the sum of (w_d / p_d) T_d; p are the drawn proportions
"per_domain"   sum over d of w_d L_d / T_d, divided by the sum of the w_d of domains that have tokens
"""


@dataclass(frozen=True)
class StepLossWeights:
    """Domain weights of the loss for the next step alone."""

    weights: Tensor  # [k] float64, sums to 1
    loss_norm: DomainLossNorm


@dataclass(frozen=True)
class EmbeddingSpec:
    """How a sample's hidden states become one vector; see signals.sample_embeddings."""

    # Weights of the positions: all equal, position t (from 1) weighs t, or the last target position alone.
    pooling: Literal["mean", "position_weighted", "last"] = "mean"
    layer: int = -1  # as transformers counts hidden states: 0 the embeddings, -1 the input of the output layer
    normalize: bool = True  # whether a vector is divided by its length
    tanh: bool = False  # whether hidden states go through tanh before they are averaged
    tokens: Literal["all", "media", "text"] = "all"  # of which positions; a sample without any has the vector 0


@dataclass(frozen=True)
class ClusterSpec:
    """How the pool is clustered by the samples' hidden states; see signals.clusters."""

    layers: tuple[int, ...] | None  # whose hidden states are a sample's features; None: five layers, evenly spaced
    num_clusters: int | None  # None: one for every 20 samples, at most 10000
    seed: int = 0
    iterations: int = 10  # of k-means, at most
    singleton_density: float = 1.0  # the density of a cluster with one member, which has no pair of members
    # Whether images and text have a mean each; "auto": where the pool has images.
    mode: Literal["auto", "text", "image_text"] = "text"


@dataclass(frozen=True)
class ProjectionSpec:
    """The random projection of per-sample gradients to features; see signals.projection."""

    kind: Literal["two_sided", "dense"] = "two_sided"
    size: int = 16  # two_sided: width of each of a layer's two sides; dense: width of the whole feature
    seed: int = 0


@dataclass(frozen=True)
class GenerationSpec:
    """How answers are generated: the parameters of transformers' GenerationConfig of these names."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0


@dataclass(frozen=True)
class Clusters:
    """The cluster of every sample of a pool; equal on every rank."""

    cluster_ids: Tensor  # [N] int64
    squared_distances: Tensor  # [N] float32, from a sample to the centre of its cluster


@dataclass(frozen=True)
class BatchGradients:
    """How the gradients of a global batch lie to those of targets and to each other; float32."""

    sample_ids: Tensor  # [G] int64
    dot: Tensor  # [G] inner products with the targets' mean gradient
    gram: Tensor  # [G, G] inner products with each other


@dataclass(frozen=True)
class TokenSelection:
    """Training on a fraction of the target tokens, those with the highest scores.

    `scores`: token losses of the model and of the reference model, float32 of one shape -> scores of that shape.
    """

    keep_ratio: float  # 0..1
    scores: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TokenWeightFn:
    """A WeightFn that also selects tokens; see objective.token_weights."""

    weight_fn: WeightFn
    selection: TokenSelection

    def __call__(self, samples: SampleStats) -> Tensor:
        return self.weight_fn(samples)


@dataclass
class RunPosition:
    """Where a process is in its run, for messages."""

    step: int = 0  # the step that is being made, or was made last
    phase: str = "the start"

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self.phase = phase


@dataclass(frozen=True)
class StepStats:
    """Additive sums of one optimizer step over all ranks and micro-batches, equal on every rank."""

    loss: float  # the objective that was differentiated: sum(w * token loss) / count
    grad_norm: float  # before clipping
    domain_loss: Tensor  # [k] float64, unweighted token-loss sums
    domain_tokens: Tensor  # [k] float64, target tokens
    domain_samples: Tensor  # [k] float64
    num_tokens: int  # all tokens of the step, without padding
    weights: WeightStats | None = None  # None when no weighter ran
    # [k] float64, sums of max(loss - reference loss, 0); None without a reference
    domain_excess_loss: Tensor | None = None
    # [layers, k, E] float64, tokens of a domain that went to an expert; None without an algorithm that reads it
    expert_load: Tensor | None = None
    stop_requested: bool = False  # whether a rank was asked to leave after this step
    # Means over the step's samples, by the names of objective.SampleLoss.report_names
    report: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_loss(self) -> float:
        """Unweighted mean loss of the step's target tokens; NaN without any."""
        tokens = float(self.domain_tokens.sum())
        return float(self.domain_loss.sum()) / tokens if tokens else math.nan


@dataclass(frozen=True)
class WeightStats:
    """How uneven the sample weights of a step were."""

    entropy: float  # of w / sum(w), divided by log n: 1 is uniform, 0 is one sample
    minimum: float
    maximum: float


@dataclass(frozen=True)
class SamplingPlan:
    """What to draw from step `start_step` on. Equal on every rank; small, except for `selected_ids` and `ordered_ids`.

    `cursors` counts what each domain has given before `start_step` (of the pool, or of `selected_ids` when they are set)
    and `credits` is what the proportions still owe it (target minus drawn, in samples), so a plan continues the previous
    one exactly. With `ordered_ids` these samples are drawn and no others; the other fields say how they were determined.
    """

    start_step: int
    proportions: tuple[float, ...]  # [k], sums to 1
    cursors: tuple[int, ...]  # [k]
    credits: tuple[float, ...]  # [k], sums to 0
    selected_ids: Tensor | None = None  # [m] int64 sorted sample ids, duplicates allowed; None: the whole pool
    pool_cursors: tuple[int, ...] = ()  # [k], where the pool stood when `selected_ids` were set
    domain_loss_weights: tuple[float, ...] | None = None  # [k], a mixer's weights of the loss
    phase: str = "train"  # "warmup" before the first update of a cycle; for logs
    ordered_ids: Tensor | None = None  # [m] int64 sample ids, in the order in which the steps draw them

    def digest(self) -> str:
        """SHA-256 of everything that decides what is drawn; all ranks must have the same."""
        sha = hashlib.sha256()
        floats = (self.proportions, self.credits, self.domain_loss_weights or ())
        sha.update(repr((self.start_step, self.cursors, self.pool_cursors)).encode())
        sha.update(repr([[float(x).hex() for x in group] for group in floats]).encode())
        # These names are part of the hash, which metrics.jsonl records.
        for name, ids in (("chosen", self.selected_ids), ("order", self.ordered_ids)):
            if ids is not None:
                sha.update(name.encode() + ids.contiguous().numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class SignalTable:
    """What a selector sees of the candidates: one row per candidate, and a column for each signal that it asked for."""

    sample_ids: Tensor  # [n] int64
    domain_ids: Tensor  # [n] int64
    signals: dict[str, Tensor] = field(default_factory=dict)  # name -> [n] or [n, S]

    def __getitem__(self, name: str) -> Tensor:
        return self.signals[name]


@dataclass(frozen=True)
class UpdateContext:
    """When in the run an update of a selector, mixer or reorder takes place."""

    step: int  # optimizer steps done
    total_steps: int
    update_index: int  # 0 for the first update
    seed: int
    total_updates: int = 0  # updates of the whole run; 0 when they continue until its end
    learning_rate: float = 0.0  # of the next step


@dataclass
class TrainState:
    """Step, plan and counters of the training loop; saved in checkpoints."""

    step: int
    plan: SamplingPlan
    tokens_seen: int = 0
    samples_seen: int = 0
