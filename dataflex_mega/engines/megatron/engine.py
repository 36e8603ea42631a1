"""The Megatron engine: megatron-core's schedules, buckets and optimizer around our weighted objective."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

import dataflex_mega.objective as objective
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.megatron import checkpoint, cpu
from dataflex_mega.engines.megatron.capabilities import CAPABILITIES
from dataflex_mega.engines.megatron.gradient_gram import gradient_gram
from dataflex_mega.engines.megatron.gradient_scorer import MegatronGradientScorer
from dataflex_mega.engines.megatron.lr_adapter import LRSchedulerAdapter
from dataflex_mega.engines.megatron.runner import MegatronModelRunner, ScheduleLoss
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.engines.per_sample import PerSampleFn, per_sample_values, stack_values, width_of
from dataflex_mega.engines.stats import StepAccumulator
from dataflex_mega.engines.step import (
    StepLoss,
    check_has_targets,
    domain_denominators,
    non_finite_sample_ids,
    not_finite_message,
    precompute_weights,
)
from dataflex_mega.errors import ConfigError, NotFinite
from dataflex_mega.losses.base import TokenLosses
from dataflex_mega.types import Batch, EmbeddingSpec, GenerationSpec, ProjectionSpec, SampleStats, StepStats, WeightFn


@dataclass
class MegatronEngine:
    """Implements engines.base.Engine.

    Attributes:
        score_micro_batch_rows: rows of a micro-batch of gradient scores; what a training step has room for.
        exporter: (chunks, folder) writes the model in Hugging Face layout.
    """

    runner: MegatronModelRunner
    optimizer: Any  # megatron-core's
    lr_scheduler: LRSchedulerAdapter
    options: StepOptions
    score_micro_batch_rows: int
    exporter: Callable[[list[Any], Path], None]

    def __post_init__(self) -> None:
        """Tell megatron-core's schedules about reductions and the loss scale."""
        chunks, config = self.runner.model_chunks, self.runner.config
        ddp = chunks[0].ddp_config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if ddp.overlap_grad_reduce:
            pauses = [chunk.no_sync for chunk in chunks]
            starts = [chunk.start_grad_sync for chunk in chunks]
            config.no_sync_func = pauses[0] if len(pauses) == 1 else pauses
            config.grad_sync_func = starts[0] if len(starts) == 1 else starts
        if ddp.overlap_param_gather:  # nothing is to be gathered before the first step
            for chunk in chunks:
                chunk.disable_forward_pre_hook(param_sync=False)

    @property
    def name(self) -> str:
        return "megatron"

    @property
    def capabilities(self) -> frozenset[str]:
        return CAPABILITIES

    @property
    def parallel_info(self) -> ParallelInfo:
        return self.runner.parallel_info

    @property
    def collectives(self) -> TorchCollectives:
        return self.runner.collectives

    @property
    def model(self) -> Any:
        return self.runner.model

    @property
    def scheduler(self) -> Any:
        return self.lr_scheduler.scheduler

    @property
    def num_layers(self) -> int:
        return self.runner.config.num_layers

    # -- training ------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch], weight_fn: WeightFn | None) -> StepStats:
        runner, options = self.runner, self.options
        with cpu.cuda_calls_on_cpu():
            micro_batches = runner.equalize_shapes([batch.to(runner.device) for batch in micro_batches])
            routers = runner.routers
            loads = None if routers is None else routers.new_counter(options.num_domains, runner.device)
            accumulator = StepAccumulator(options.num_domains, runner.device, loads)
            denominators = domain_denominators(micro_batches, options, self.collectives)
            step = StepLoss(options, self.collectives, weight_fn, denominators, accumulator, divides=False)
            if weight_fn is not None and step.needs_precompute(len(micro_batches)):
                results = self._forward_all(micro_batches)
                if runner.is_last_stage:
                    step.precomputed = precompute_weights(
                        results, micro_batches, weight_fn, denominators, self.collectives
                    )
            runner.zero_grad(self.optimizer)

            def loss_fn(number: int, batch: Batch, embeddings: Tensor | None, losses: TokenLosses) -> ScheduleLoss:
                count = objective.loss_denominator(batch, options.normalization).int()
                trained = None if options.loss_form is None else losses.trained
                return step(number, batch, embeddings, losses.plain, trained), count, {}

            with routers.recording(loads) if routers and loads else contextlib.nullcontext():
                runner.forward_backward(micro_batches, loss_fn, False, step.embedding_spec)
            grad_norm = self._update(accumulator, denominators)
            return accumulator.reduce(self.collectives, grad_norm, weight_fn is not None, self.options.stop_requested)

    def _forward_all(self, micro_batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor | None]]:
        """Losses and embeddings of all micro-batches, with the dropout masks that training will draw; on the last stage."""
        state = self.rng_state()
        results = self.runner.forward_losses(micro_batches, self.options.embedding_spec)
        self.set_rng_state(state)
        return results

    def _update(self, accumulator: StepAccumulator, denominators: Tensor) -> float:
        """Clip and step -> the gradient norm before clipping. A step that is not finite changes nothing."""
        overflow = self.optimizer.prepare_grads()
        norm = math.inf if overflow else float(self.optimizer.get_grad_norm() or 0.0)
        finite = math.isfinite(norm)
        sample_ids = [] if finite else non_finite_sample_ids(accumulator, self.collectives)
        has_targets = check_has_targets(norm, denominators, accumulator, self.collectives, self.options)
        if finite and not has_targets:
            pass  # skipped
        elif finite:
            self._clip(norm)
            self.optimizer.step_with_ready_grads()
            self.runner.gather_in_forward()
        elif self.options.on_non_finite == "stop" and (sample_ids or not self.runner.config.fp16):
            raise NotFinite(not_finite_message(norm, sample_ids), sample_ids)
        self.lr_scheduler.step()
        return norm

    def _clip(self, norm: float) -> None:
        if self.options.max_grad_norm <= 0:
            return
        for optimizer in self.optimizer.chained_optimizers:
            parameters = optimizer.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.options.max_grad_norm, total_norm=norm)

    def learning_rate(self) -> float:
        return self.lr_scheduler.learning_rate

    def adapt_learning_rate(self, metric: float) -> None:
        self.lr_scheduler.step_by_metric(metric)

    # -- forward only: where there is a pipeline, a batch goes through it in micro-batches -----------------------

    def token_losses(self, batch: Batch) -> Tensor:
        batch = batch.to(self.runner.device)
        with cpu.cuda_calls_on_cpu():
            results = self._evaluate(batch, None)
            losses = torch.zeros(batch.input_ids.shape, device=self.runner.device)
            if self.runner.is_last_stage:
                losses = self._whole_batch(results, batch)
            return self.runner.from_last_stage(losses)

    def sample_losses(self, batch: Batch) -> SampleStats:
        batch = batch.to(self.runner.device)
        with cpu.cuda_calls_on_cpu():
            results = self._evaluate(batch, None)
            loss_sum = torch.zeros(len(batch.sample_ids), device=self.runner.device)
            if self.runner.is_last_stage:
                loss_sum = objective.sample_sums(self._whole_batch(results, batch), batch)
            return objective.make_sample_stats(self.runner.from_last_stage(loss_sum), batch)

    def embed(self, batch: Batch, *specs: EmbeddingSpec) -> Tensor:
        batch = batch.to(self.runner.device)
        with cpu.cuda_calls_on_cpu():
            return torch.cat([self._embed(batch, spec) for spec in specs], dim=1)

    def _embed(self, batch: Batch, spec: EmbeddingSpec) -> Tensor:
        results = self._evaluate(batch, spec)
        embeddings = torch.zeros(len(batch.sample_ids), self.runner.config.hidden_size, device=self.runner.device)
        # Each micro-batch knows all samples of the batch, and adds what it has of them.
        for _, of_micro_batch in results if self.runner.is_last_stage else ():
            assert of_micro_batch is not None
            embeddings += of_micro_batch
        return self.runner.from_last_stage(embeddings)

    def per_sample(self, batch: Batch, fn: PerSampleFn) -> Tensor:
        runner = self.runner
        values: dict[int, Tensor] = {}  # on the last stage
        batch = batch.to(runner.device)

        def consume(micro_batch: Batch, logits: Tensor) -> None:
            values.update(per_sample_values(logits, micro_batch, fn, runner.gather_vocabulary))

        with cpu.cuda_calls_on_cpu(), runner.evaluation_mode():
            runner.forward_logits(runner.split_for_pipeline(batch), consume)
            width = int(runner.from_last_stage(torch.tensor(width_of(values), device=runner.device)))
            table = stack_values(values, len(batch.sample_ids), width, runner.device)
            return runner.from_last_stage(table)

    def _evaluate(self, batch: Batch, spec: EmbeddingSpec | None) -> list[tuple[Tensor, Tensor | None]]:
        """Losses and embeddings of a batch in evaluation mode, by micro-batch; on the last stage."""
        with self.runner.evaluation_mode():
            return self.runner.forward_losses(self.runner.split_for_pipeline(batch), spec)

    @staticmethod
    def _whole_batch(results: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        """[b, S] token losses of all micro-batches, without their padding."""
        rows, width = batch.input_ids.shape
        return torch.cat([losses for losses, _ in results])[:rows, :width]

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        uniforms: np.ndarray,
        spec: GenerationSpec,
        end_ids: Sequence[int],
        pad_id: int,
    ) -> list[np.ndarray]:
        raise ConfigError("engine: megatron cannot generate answers; engine: fsdp can")

    # -- gradients -----------------------------------------------------------------------------------------------

    def gradient_scorer(self, adam: bool) -> MegatronGradientScorer:
        return MegatronGradientScorer(self.runner, self.optimizer, adam, self.score_micro_batch_rows)

    def feature_maker(self, spec: ProjectionSpec, adam: bool) -> Any:
        raise ConfigError("gradient features are not supported by engine: megatron; use engine: fsdp")

    def gradient_gram(self, groups: list[list[Batch]]) -> Tensor:
        return gradient_gram(self.runner, self.optimizer, groups)

    # -- state ---------------------------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        with cpu.cuda_calls_on_cpu(), self.runner.gathered_parameters():
            checkpoint.save(self.runner, self.optimizer, self.lr_scheduler, folder)

    def load_state(self, folder: Path) -> None:
        with cpu.cuda_calls_on_cpu(), self.runner.gathered_parameters():
            checkpoint.load(self.runner, self.optimizer, self.lr_scheduler, folder)

    def export(self, folder: Path) -> None:
        with cpu.cuda_calls_on_cpu(), self.runner.gathered_parameters():
            self.exporter(self.runner.model_chunks, folder)

    def rng_state(self) -> dict[str, Tensor]:
        return self.runner.rng_state()

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        self.runner.set_rng_state(state)
