"""The interface of an engine, which alone knows how parameters, gradients and optimizer state are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.engines.per_sample import PerSampleFn
from dataflex_mega.types import Batch, EmbeddingSpec, GenerationSpec, ProjectionSpec, SampleStats, StepStats, WeightFn


class GradientScorer(Protocol):
    """Scores candidates against target directions with the model and optimizer state at its creation."""

    kernel_message: str  # what it computes with, for the user; "" for nothing to say

    def directions(self, groups: Sequence[Sequence[Batch]]) -> Any:
        """Groups of this rank's target batches -> one direction per group, laid out as the engine likes."""
        ...

    def policy_directions(self, groups: Sequence[Sequence[tuple[Batch, Tensor]]]) -> Any:
        """Groups of prompts, each (answers of this rank, [n] weights) -> one direction per group.

        Raises ConfigError without Capability.POLICY_GRADIENTS.
        """
        ...

    def score(self, batch: Batch, directions: Any) -> tuple[Tensor, Tensor]:
        """Unpacked batch of n samples -> ([n, S] dots with the directions, [n] squared norms)."""
        ...


class FeatureMaker(Protocol):
    """Computes projected gradients of the current model; see engines.fsdp.feature_maker."""

    adam: bool  # whether features are of Adam's updates
    width: int  # of a feature vector

    def features(self, batch: Batch, plain: bool = False) -> Tensor:
        """Unpacked batch of n samples -> [n, width]. `plain`: of the gradient itself, whatever `adam` says."""
        ...

    def refresh(self) -> None:
        """Take the optimizer's current moments; every rank must call it."""
        ...

    def fingerprint(self) -> str:
        """A hash of the parameters and moments that features depend on."""
        ...


class Engine(Protocol):
    """One model, its optimizer and its learning-rate scheduler.

    Every rank must call each method that takes a batch equally often: ranks communicate inside.
    """

    optimizer: Any  # torch's or megatron-core's

    @property
    def name(self) -> str:
        """The value of `engine:` in the YAML."""
        ...

    @property
    def capabilities(self) -> frozenset[str]:
        """Which of engines.capabilities.Capability this engine has."""
        ...

    @property
    def parallel_info(self) -> ParallelInfo:
        """How data-parallel ranks share samples."""
        ...

    @property
    def collectives(self) -> Collectives:
        """Collective operations among the processes of `parallel_info`."""
        ...

    @property
    def model(self) -> Any:
        """The Hugging Face or PEFT model, or this pipeline stage's first chunk."""
        ...

    @property
    def scheduler(self) -> Any:
        """torch's learning-rate scheduler."""
        ...

    @property
    def num_layers(self) -> int:
        """The number of transformer layers of the whole model."""
        ...

    # -- training

    def train_step(self, micro_batches: Sequence[Batch], weight_fn: WeightFn | None) -> StepStats:
        """Forward, weigh, backward, reduce, clip and update. `micro_batches` are this rank's of the step.

        Raises NotFinite, before the parameters change, when the loss or the gradient is not finite.
        """
        ...

    def learning_rate(self) -> float:
        """Of the first parameter group, for the step to come."""
        ...

    def adapt_learning_rate(self, metric: float) -> None:
        """After an evaluation: move a schedule that goes by its result; others are left alone."""
        ...

    # -- forward only, in evaluation mode, without gradient

    def token_losses(self, batch: Batch) -> Tensor:
        """[b, S] float32, 0 where there is no target."""
        ...

    def sample_losses(self, batch: Batch) -> SampleStats:
        """Losses of this rank's samples."""
        ...

    def embed(self, batch: Batch, *specs: EmbeddingSpec) -> Tensor:
        """[n, sum of h] float32: the embeddings of each spec side by side for every sample.

        Raises ConfigError for a layer whose hidden states the engine cannot capture.
        """
        ...

    def per_sample(self, batch: Batch, fn: PerSampleFn) -> Tensor:
        """[n, m] float32, equal on the ranks that share the batch: `fn` of each sample's own positions.

        `fn(logits, labels)` gets the [s, V] float32 logits (float64 of a float64 model) of one sample's s positions, padding
        left out, and their [s] labels, and returns a scalar (m = 1) or [m]. It must be deterministic: several ranks may call
        it for one sample. A sample without positions gets zeros.
        """
        ...

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        uniforms: np.ndarray,
        spec: GenerationSpec,
        end_ids: Sequence[int],
        pad_id: int,
    ) -> list[np.ndarray]:
        """n prompts of token ids, [n, max_new_tokens] numbers in 0..1 that decide the tokens -> n answers.

        Raises ConfigError without Capability.GENERATION.
        """
        ...

    # -- gradients

    def gradient_scorer(self, adam: bool) -> GradientScorer:
        """Of the current model. `adam`: precondition candidates with the optimizer's moments.

        Raises ConfigError for a layout or optimizer that has no gradient scores.
        """
        ...

    def feature_maker(self, spec: ProjectionSpec, adam: bool) -> FeatureMaker:
        """Raises ConfigError without Capability.GRADIENT_FEATURES, or for another optimizer than Adam with `adam`."""
        ...

    def gradient_gram(self, groups: list[list[Batch]]) -> Tensor:
        """m groups, this rank's batches of each -> [m, m] float64 inner products of the groups' mean gradients."""
        ...

    # -- state

    def save_state(self, folder: Path) -> None:
        """Write parameters, optimizer and scheduler below `folder`; every rank calls it."""
        ...

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote, on any number of ranks."""
        ...

    def rng_state(self) -> dict[str, Any]:
        """Tensors that restore this process's random generators."""
        ...

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Restore what `rng_state` returned."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; every rank calls it."""
        ...
