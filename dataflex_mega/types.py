"""The data that flows through a step. Plain values: no process group, no model, no file is known here.

Shapes: b rows of a micro-batch, S positions of a row, n samples of a micro-batch (n > b when rows are packed),
G samples of a global batch, k domains, N samples of the pool.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

IGNORED = -100  # a label that carries no loss


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank. Labels are already shifted: labels[r, s] is what follows position s."""

    input_ids: Tensor  # [b, S] int64
    labels: Tensor  # [b, S] int64, IGNORED where there is no target
    segment: Tensor  # [b, S] int64, index into `sample_id` of the sample a position belongs to, -1 on padding
    position_ids: Tensor  # [b, S] int64, counted from each sample's own start
    sample_id: Tensor  # [n] int64, global ids of the pool
    domain: Tensor  # [n] int64
    packed: bool = False  # whether some row holds more than one sample, so attention needs the segments
    reference: Tensor | None = None  # [b, S] float32 token losses of the reference model, aligned with `labels`

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        return Batch(**moved, packed=self.packed)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        names = ("input_ids", "labels", "segment", "position_ids", "sample_id", "domain")
        there = {name: getattr(self, name) for name in names}
        return there if self.reference is None else {**there, "reference": self.reference}


@dataclass(frozen=True)
class SampleObs:
    """What is known of samples after their forward pass. No gradient flows through any of it."""

    sample_id: Tensor  # [n] int64
    domain: Tensor  # [n] int64
    loss_sum: Tensor  # [n] float32, summed over the sample's target tokens
    tokens: Tensor  # [n] int64, number of target tokens
    excess_sum: Tensor | None = None  # [n] float32, sum over target tokens of max(loss - reference loss, 0)
    step_count: Tensor | None = None  # [k] float64, each domain's part of the loss denominator of the whole step
    # [n, h] float32, see HiddenSpec; for `weights`, [n, m] what NeedsHidden.compare made of it
    hidden: Tensor | None = None

    def weighed(self) -> dict[str, Tensor]:
        """The fields by which samples are weighed, one row a sample; those that are there."""
        names = ("sample_id", "domain", "loss_sum", "tokens", "hidden")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def joined(cls, parts: Sequence[SampleObs], step_count: Tensor) -> SampleObs:
        """Micro-batches of a step as one."""
        fields = [part.weighed() for part in parts]
        return cls(**{name: torch.cat([f[name] for f in fields]) for name in fields[0]}, step_count=step_count)

    @property
    def loss(self) -> Tensor:
        """[n] float32: mean loss of a sample's target tokens; 0 for a sample without targets."""
        return self.loss_sum / self.tokens.clamp(min=1)


Weigh = Callable[[SampleObs], Tensor]
"""Samples of one rank -> their weights, [n] float32, no gradient, mean 1 over all samples of the step (or micro-step)."""


LossNorm = Literal["token", "per_domain"]


class NeedsReference:
    """Marks an algorithm that compares token losses with those of a reference model."""


class NeedsGradients(ABC):
    """A mixer that learns, before each of its updates, from inner products of the domains' gradients."""

    probe_samples: int  # of each domain
    against: Literal["others", "eval"]  # whether the gradient of the evaluation sets is wanted too

    @abstractmethod
    def learn(self, gram: Tensor) -> None:
        """[m, m] float64 inner products; see signals.gram.DomainGram."""


class NeedsLoads:
    """Marks a mixer that learns from where a mixture of experts sends tokens; see StepStats.expert_load."""


@dataclass(frozen=True)
class HiddenSpec:
    """How one vector is made of a sample's hidden states; see signals.hidden."""

    pooling: Literal["mean", "late", "last"] = (
        "mean"  # over positions: equal weights, position t weighs t, the last alone
    )
    layer: int = -1  # as transformers counts hidden states: 0 the embeddings, -1 what the output layer gets
    unit: bool = True  # whether a vector is divided by its length
    squash: bool = False  # whether states go through tanh before they are averaged


class NeedsHidden(ABC):
    """A weighter that compares the hidden states of samples, from the training forward, with those of target samples."""

    @property
    @abstractmethod
    def hidden(self) -> HiddenSpec:
        """The vectors it wants."""

    @property
    def target_samples(self) -> int:
        """How many target samples are looked at, spread evenly over the evaluation sets; 0: all of them."""
        return 0

    @abstractmethod
    def stale(self, step: int) -> bool:
        """Whether it wants the targets' vectors anew before the step after `step` steps."""

    @abstractmethod
    def learn(self, target: Tensor, step: int) -> None:
        """[h] float64, the mean vector of the target samples under the model of now."""

    @abstractmethod
    def compare(self, hidden: Tensor) -> Tensor:
        """[n, h] vectors of one rank's samples -> [n, m] what travels to all ranks of it, and reaches `weights`."""


@dataclass(frozen=True)
class ClusterSpec:
    """How a pool is cut into groups of samples that are alike; see signals.clusters."""

    layers: tuple[int, ...] | None  # hidden states that make a sample's features; None: five, evenly spaced
    clusters: int | None  # None: one for every 20 samples, at most 10000
    seed: int = 0
    iterations: int = 10  # at most
    single_density: float = 1.0  # of a cluster with one member


class NeedsClusters(ABC):
    """A selector that wants the signals "clusters"."""

    @abstractmethod
    def cluster_spec(self) -> ClusterSpec:
        """Of which kind."""


class CutsTargets:
    """Marks a selector that may cut the evaluation samples into tasks of its own."""

    task_boundaries: list[int] | None  # sizes of the tasks, in the order of the evaluation sets


@dataclass(frozen=True)
class FeatureSpec:
    """Which projection makes features of gradients; see signals.projection."""

    kind: Literal["two_sided", "dense"] = "two_sided"
    size: int = 16  # two_sided: numbers a side of each layer; dense: numbers in all
    seed: int = 0


class UsesStore(ABC):
    """A selector that may have gradient features on disk; see store.gradients."""

    store_dir: str | None  # None: output_dir/gradient_store
    store_block: int  # samples

    @abstractmethod
    def feature_spec(self) -> FeatureSpec:
        """The projection of its features."""


class NeedsBatchGradients(ABC):
    """A weighter that looks at the gradients of the whole batch before the step that trains it; see
    providers.batch_gradients."""

    target_batch: int  # target samples compared with at a step; 0: all

    @property
    @abstractmethod
    def preconditioned(self) -> bool:
        """Whether the samples' gradients are Adam's updates; the targets' never are."""

    @abstractmethod
    def feature_spec(self) -> FeatureSpec:
        """The projection in which gradients are compared."""

    @abstractmethod
    def look(self, ids: Tensor, dot: Tensor, gram: Tensor) -> None:
        """[G] ids of the step to come, [G] inner products with the targets' mean gradient, [G, G] with each other."""


@dataclass(frozen=True)
class SamplingSpec:
    """How answers are drawn from a model."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0  # 0: any token
    top_p: float = 1.0


class UsesPolicy(ABC):
    """A selector whose targets are rewards of what the model of now answers; see providers.policy_gradients."""

    reward: str
    mc_samples: int
    max_prompt_length: int
    seed: int

    @abstractmethod
    def sampling(self) -> SamplingSpec:
        """How answers are drawn."""

    @abstractmethod
    def factors(self, rewards: Tensor) -> Tensor:
        """[P, mc_samples] rewards -> [P, mc_samples] factors of the answers' log-probabilities."""


@dataclass(frozen=True)
class Clusters:
    """Which samples of a pool belong together; equal on every rank."""

    own: Tensor  # [N] int64, number of a sample's cluster
    distance: Tensor  # [N] float32, squared, from its centre


class UsesClusters(ABC):
    """A selector that scores clusters of samples by some of their members; see wiring.clusters."""

    cluster_count: int
    samples_per_cluster: int
    clustering_method: Literal["kmeans", "spherical_kmeans", "random"]
    clustering_max_iter: int
    representative_strategy: Literal["random", "nearest", "farthest", "mixed"]
    embedding_layer: int
    combine: Literal["mean", "direction"]
    seed: int
    clusters: Clusters | None  # None before the first selection

    @abstractmethod
    def feature_spec(self) -> FeatureSpec:
        """The projection for `combine: direction`."""

    @abstractmethod
    def keep(self, clusters: Clusters) -> None:
        """Take the clusters that were found; they are part of its state."""


class StepWeighing(ABC):
    """A mixer whose domain weights of the loss change after every step, not only with the plan."""

    loss_norm: LossNorm
    """How the weights w of k domains make a loss of a step in which domain d has the token-loss sum L_d and T_d tokens:

    "token"        sum over d of (w_d / p_d) L_d, divided by the sum of (w_d / p_d) T_d; p are the drawn proportions
    "per_domain"   sum over d of w_d L_d / T_d, divided by the sum of the w_d of domains that have tokens
    """

    @abstractmethod
    def domain_weights(self) -> Tensor:
        """[k] float64, sums to 1, of the step to come."""


class TokenChoice(ABC):
    """A weighter that keeps a share of the target tokens, the ones with the highest scores, and drops the others."""

    keep: float  # 0..1

    @abstractmethod
    def token_scores(self, token_loss: Tensor, reference: Tensor) -> Tensor:
        """Token losses and those of the reference, one shape, float32 -> scores of that shape."""


@dataclass(frozen=True)
class TokenWeigh:
    """A Weigh that weighs tokens too; see objective.token_weights."""

    samples: Weigh
    choice: TokenChoice

    def __call__(self, obs: SampleObs) -> Tensor:
        return self.samples(obs)


class Averages(ABC):
    """A mixer whose result is the mean of its weights over the run, for another run to draw by."""

    @abstractmethod
    def average_weights(self) -> tuple[int, Tensor]:
        """(how many updates, [k] float64 that sums to 1)."""


@dataclass(frozen=True)
class StepStats:
    """Additive sums of one optimizer step over all ranks and micro-batches, equal on every rank."""

    loss: float  # the objective that was differentiated: sum(w * token loss) / count
    grad_norm: float  # before clipping
    domain_loss: Tensor  # [k] float64, unweighted token-loss sums
    domain_tokens: Tensor  # [k] float64, target tokens
    domain_samples: Tensor  # [k] float64
    tokens: int  # all tokens of the step, padding left out
    weights: WeightStats | None = None  # None when no weighter ran
    domain_excess: Tensor | None = None  # [k] float64, sums of max(loss - reference loss, 0); None without a reference
    expert_load: Tensor | None = (
        None  # [layers, k, E] float64, tokens of a domain that went to an expert; None unless asked
    )

    @property
    def mean_loss(self) -> float:
        """Unweighted mean loss of the step's target tokens."""
        return float(self.domain_loss.sum() / self.domain_tokens.sum().clamp(min=1))


@dataclass(frozen=True)
class WeightStats:
    """How uneven the sample weights of a step were."""

    entropy: float  # of w / sum(w), divided by log n: 1 is uniform, 0 is one sample
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Plan:
    """What to draw from step `start` on. Equal on every rank; small, except for `chosen`.

    `cursor` counts what each domain has given before `start` (of the pool, or of `chosen` when that is set) and `credit`
    is what the proportions still owe it (target minus drawn, in samples), so a plan continues the one before it exactly.
    With `order` the samples are those and no others; proportions and credit say how they were come by.
    """

    start: int
    proportions: tuple[float, ...]  # [k], sums to 1
    cursor: tuple[int, ...]  # [k]
    credit: tuple[float, ...]  # [k], sums to 0
    chosen: Tensor | None = None  # [m] int64 sorted global ids, duplicates allowed; None means the whole pool
    pool_cursor: tuple[int, ...] = ()  # [k], kept while `chosen` is served
    loss_weights: tuple[float, ...] | None = None  # [k], optional domain weights of the loss, from the mixer
    phase: str = "train"  # "warmup" before the first update of a cycle, for the log
    order: Tensor | None = None  # [m] int64 global ids in the order in which the steps from `start` on take them

    def digest(self) -> str:
        """A hash of everything that decides what is drawn; ranks compare it."""
        sha = hashlib.sha256()
        floats = (self.proportions, self.credit, self.loss_weights or ())
        sha.update(repr((self.start, self.cursor, self.pool_cursor)).encode())
        sha.update(repr([[float(x).hex() for x in group] for group in floats]).encode())
        for name, ids in (("chosen", self.chosen), ("order", self.order)):
            if ids is not None:
                sha.update(name.encode() + ids.contiguous().numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class SignalTable:
    """What a selector sees of candidates: one row a candidate. Only the signals it asked for are there."""

    sample_id: Tensor  # [n] int64
    domain: Tensor  # [n] int64
    signals: dict[str, Tensor] = field(default_factory=dict)  # name -> [n] or [n, S]

    def __getitem__(self, name: str) -> Tensor:
        return self.signals[name]


@dataclass(frozen=True)
class Clock:
    """When a re-plan happens."""

    step: int  # optimizer steps done
    total_steps: int
    update: int  # 0 for the first re-plan
    seed: int
    total_updates: int = 0  # re-plans of the whole run; 0 when they go on until its end
    rate: float = 0.0  # learning rate of the step to come


@dataclass
class TrainState:
    """The loop's own variables."""

    step: int
    plan: Plan
    tokens_seen: int = 0
    samples_seen: int = 0
