"""What an algorithm asks a run to compute for it, as frozen values.

`Algorithm.requests` returns them; a provider (one class in one file of `dataflex_mega.providers`, or of a plug-in) serves
each kind of request. Requests are compared by value.

A request that its provider serves for candidates fills columns of the table that `Selector.score` gets; its `name` is how
the log calls it. The value of any other request is handed to `Algorithm.receive`. Fields that hold functions or texts do
not take part in comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from dataflex_mega.types import Clusters, ClusterSpec, EmbeddingSpec, GenerationSpec, ProjectionSpec


@dataclass(frozen=True)
class Request:
    """Base of all requests.

    `name` is the name of the signal in logs and selection files. `excluded_from_products` says why a weighter with this
    request cannot be one of several ("" when it can).
    """

    excluded_from_products: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The signal's name in `selections/step_N.json`; the class's name in snake case unless overridden."""
        kind = type(self).__name__
        return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(kind))


R = TypeVar("R", bound=Request)


def requests_of(algorithm: Any, kind: type[R]) -> tuple[R, ...]:
    """The requests of one kind that an algorithm makes; () for None."""
    if algorithm is None:
        return ()
    return tuple(request for request in algorithm.requests() if isinstance(request, kind))


# -- columns of the candidates' table --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSignal(Request):
    """Column "loss" [n] float32: the mean loss of the sample's target tokens under the current model."""

    @property
    def name(self) -> str:
        return "loss"


@dataclass(frozen=True)
class ReferenceLossSignal(Request):
    """Column "reference_loss" [n] float32: the mean loss under the reference model, 0 for a sample without targets.

    Also asks that batches carry `reference_losses`, token by token, in training.
    """

    excluded_from_products: ClassVar[str] = "compares tokens with a reference model"

    @property
    def name(self) -> str:
        return "reference_loss"


@dataclass(frozen=True)
class GradientSignal(Request):
    """Columns "dot" [n, S], inner products of the sample's gradient with the mean of the normalised target gradients of
    each of S groups, and "norm2" [n], its squared norm; float32.

    Args:
        adam: whether the sample's gradient is Adam's update for it.
        task_boundaries: sizes of the groups that the evaluation samples are cut into; None: each evaluation set is one.
    """

    adam: bool = True
    task_boundaries: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return "gradient_adam" if self.adam else "gradient_sgd"


@dataclass(frozen=True)
class StoredGradientSignal(Request):
    """The columns of GradientSignal from projected gradients in a gradient store on disk.

    Args:
        store_dir: None: output_dir/gradient_store.
        block_size: samples between checksums.
    """

    adam: bool
    projection: ProjectionSpec
    store_dir: str | None = None
    block_size: int = 256

    @property
    def name(self) -> str:
        return "store_adam" if self.adam else "store_sgd"


@dataclass(frozen=True)
class PolicyGradientSignal(Request):
    """The columns of GradientSignal, where the targets are policy gradients of rewards of generated answers.

    Args:
        reward: a built-in reward or package.module:function.
        num_answers: to each prompt.
        answer_weights: [P, num_answers] rewards -> [P, num_answers] factors of the answers' log-probabilities.
    """

    adam: bool
    reward: str
    num_answers: int
    max_prompt_length: int
    seed: int
    generation: GenerationSpec
    answer_weights: Callable[[Tensor], Tensor] = field(compare=False)

    @property
    def name(self) -> str:
        return "policy_adam" if self.adam else "policy_sgd"


@dataclass(frozen=True)
class ClusterSignal(Request):
    """Columns "cluster" and "order" [n] int64, "density" and "transferability" [n]: groups of samples with similar hidden
    states; see signals.clusters. `layer_parameter`: the algorithm's parameter that names the layers, for messages."""

    spec: ClusterSpec
    layer_parameter: str = field(default="embedding_layers", compare=False)

    @property
    def name(self) -> str:
        return "clusters"


@dataclass(frozen=True)
class ClusterGradientSignal(Request):
    """The columns of GradientSignal, one row for all members of a cluster, measured on representatives.

    Args:
        samples_per_cluster: representatives of each cluster.
        strategy: which members represent a cluster.
        combine: "mean": the cosines of representatives are averaged; "direction": their normalised, projected gradients.
        projection: for combine "direction".
        clusters: returns the clusters that the algorithm has received (see PoolClusterRequest).
    """

    adam: bool
    num_clusters: int
    samples_per_cluster: int
    strategy: Literal["random", "nearest", "farthest", "mixed"]
    combine: Literal["mean", "direction"]
    projection: ProjectionSpec
    seed: int
    clusters: Callable[[], Clusters | None] = field(compare=False)

    @property
    def name(self) -> str:
        return "cluster_adam" if self.adam else "cluster_sgd"


# -- before an update ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolClusterRequest(Request):
    """`types.Clusters` of the whole pool, by the mean hidden states of the current model."""

    num_clusters: int
    method: Literal["kmeans", "spherical_kmeans", "random"]
    max_iterations: int
    embedding_layer: int
    seed: int


@dataclass(frozen=True)
class DomainGradientSignal(Request):
    """[m, m] float64 inner products of the gradients of the domains' mean losses, each on a probe of its samples.

    m is the number of domains, one more, the last, with `against_targets`: the evaluation sets together.
    """

    probe_samples: int  # of each domain
    against_targets: bool = False


# -- before a step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetEmbeddingSignal(Request):
    """[h] float64: the mean vector of target samples under the current model.

    Args:
        num_targets: spread evenly over the evaluation sets; 0: all.
    """

    spec: EmbeddingSpec
    num_targets: int = 0


@dataclass(frozen=True)
class BatchGradientSignal(Request):
    """`types.BatchGradients` of the samples that the step is about to train.

    Args:
        num_targets: target samples drawn for the step; 0: all.
        adam: whether the samples' gradients are Adam's updates; the targets' never are.
    """

    projection: ProjectionSpec
    num_targets: int
    adam: bool

    excluded_from_products: ClassVar[str] = "chooses samples"


# -- in the training forward pass ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddingSignal(Request):
    """`SampleStats.embeddings` [n, h] of the samples in training, from the forward pass that trains them.

    `layer_parameter`: the algorithm's parameter that names the layer, for messages.
    """

    spec: EmbeddingSpec
    layer_parameter: str = field(default="embed_layer", compare=False)


@dataclass(frozen=True)
class RouterLoadSignal(Request):
    """`StepStats.expert_load`: how many tokens of each domain each expert of a mixture of experts was given."""
