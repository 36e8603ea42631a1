"""The FSDP engine: a Hugging Face model, one optimizer step at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dataflex_mega.objective as objective
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.fsdp import checkpoint
from dataflex_mega.engines.fsdp.auxiliary_loss import AuxiliaryLoss
from dataflex_mega.engines.fsdp.capabilities import CAPABILITIES
from dataflex_mega.engines.fsdp.feature_maker import FSDPFeatureMaker
from dataflex_mega.engines.fsdp.generate import generate_answers
from dataflex_mega.engines.fsdp.gradient_gram import gradient_gram
from dataflex_mega.engines.fsdp.gradient_scorer import FSDPGradientScorer
from dataflex_mega.engines.fsdp.hidden_states import capture_hidden_states, layers_of
from dataflex_mega.engines.fsdp.parallel import set_gradient_sync
from dataflex_mega.engines.fsdp.precision import LossScaler
from dataflex_mega.engines.fsdp.routers import FSDPRouterCounter
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.engines.per_sample import PerSampleFn, per_sample_values, stack_values, width_of
from dataflex_mega.engines.schedules import follows_evaluations
from dataflex_mega.engines.stats import StepAccumulator
from dataflex_mega.engines.step import (
    StepLoss,
    check_has_targets,
    domain_denominators,
    non_finite_sample_ids,
    not_finite_message,
    precompute_weights,
)
from dataflex_mega.errors import NotFinite
from dataflex_mega.signals.sample_embeddings import sample_embeddings
from dataflex_mega.types import Batch, EmbeddingSpec, GenerationSpec, ProjectionSpec, SampleStats, StepStats, WeightFn


@dataclass
class FSDPEngine:
    """A Hugging Face model on one process, under DistributedDataParallel or FSDP2, as engines.base.Engine."""

    runner: FSDPModelRunner
    optimizer: torch.optim.Optimizer
    scheduler: Any  # torch's
    options: StepOptions
    loss_scaler: LossScaler = field(init=False)
    routers: FSDPRouterCounter | None = field(init=False)
    auxiliary: AuxiliaryLoss | None = field(init=False)

    def __post_init__(self) -> None:
        self.loss_scaler = LossScaler(self.runner.layout.precision == "fp16", self.runner.layout.loss_scale)
        self.routers = FSDPRouterCounter(self.model) if self.options.count_router_loads else None
        self.runner.loss_form = self.options.loss_form
        self.auxiliary = AuxiliaryLoss(self.model) if self.options.moe_aux_loss_coef else None

    @property
    def name(self) -> str:
        return "fsdp"

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
    def num_layers(self) -> int:
        return len(layers_of(self.model))

    # -- training ------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch], weight_fn: WeightFn | None) -> StepStats:
        runner, options = self.runner, self.options
        micro_batches = [batch.to(runner.device) for batch in micro_batches]
        loads = None if self.routers is None else self.routers.new_counter(options.num_domains, runner.device)
        accumulator = StepAccumulator(options.num_domains, runner.device, loads, options.sample_loss.report_names)
        denominators = domain_denominators(micro_batches, options, self.collectives)
        step = StepLoss(options, self.collectives, weight_fn, denominators, accumulator, divides=True)
        if weight_fn is not None and step.needs_precompute(len(micro_batches)):
            results = self._forward_all(micro_batches)
            step.precomputed = precompute_weights(
                results, micro_batches, weight_fn, denominators, self.collectives, options.sample_loss
            )
        for number, batch in enumerate(micro_batches):
            set_gradient_sync(runner.module, last=number == len(micro_batches) - 1)
            with (
                self.routers.counting(batch, loads) if self.routers and loads else contextlib.nullcontext(),
                self.auxiliary.recording() if self.auxiliary else contextlib.nullcontext([]) as recorded,
            ):
                logits, embeddings = runner.forward(batch, step.embedding_spec)
            losses = runner.losses_of(logits, batch)
            trained = None if options.loss_form is None else losses.trained
            balance = self.auxiliary.loss(recorded, batch) * options.moe_aux_loss_coef if self.auxiliary else None
            loss = step(number, batch, embeddings, losses.plain, trained, balance)
            # The wrappers average gradients over ranks; the loss is a sum over them.
            (loss * (self.parallel_info.dp_size * self.loss_scaler.value)).backward()
        grad_norm = self._update(accumulator, denominators)
        return accumulator.reduce(self.collectives, grad_norm, weight_fn is not None, self.options.stop_requested)

    def _forward_all(self, micro_batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor | None]]:
        """Losses and embeddings of all micro-batches, with the dropout masks that training will draw."""
        state = self.rng_state()
        with torch.no_grad():
            results = [self._forward(batch) for batch in micro_batches]
        self.set_rng_state(state)
        return results

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        logits, embeddings = self.runner.forward(batch, self.options.embedding_spec)
        return objective.token_losses(logits, batch.labels), embeddings

    def _update(self, accumulator: StepAccumulator, denominators: Tensor) -> float:
        """Clip and step -> the gradient norm before clipping. A step that is not finite changes nothing."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.loss_scaler.enabled:
            for parameter in trained:
                parameter.grad.div_(self.loss_scaler.value)  # type: ignore[union-attr]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[union-attr]
        value = float(norm)
        finite = math.isfinite(value)
        sample_ids = [] if finite else non_finite_sample_ids(accumulator, self.collectives)
        self.loss_scaler.update(finite)
        try:
            has_targets = check_has_targets(value, denominators, accumulator, self.collectives, self.options)
        except NotFinite:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        if finite and not has_targets:
            pass  # skipped
        elif finite:
            if self.options.max_grad_norm > 0:
                max_norm, device = self.options.max_grad_norm, self.runner.device
                torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm.to(device))
            self.optimizer.step()
        elif self.options.on_non_finite == "stop" and (sample_ids or not self.loss_scaler.enabled):
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFinite(not_finite_message(value, sample_ids), sample_ids)
        if not follows_evaluations(self.scheduler):
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def adapt_learning_rate(self, metric: float) -> None:
        if follows_evaluations(self.scheduler):
            self.scheduler.step(metric)

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    # -- forward only --------------------------------------------------------------------------------------------

    def token_losses(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self.runner.evaluation_mode():
            return self.runner.token_losses(batch.to(self.runner.device))

    def sample_losses(self, batch: Batch) -> SampleStats:
        batch, of = batch.to(self.runner.device), self.options.sample_loss
        losses = self.token_losses(batch)
        return objective.make_sample_stats(of.sums(losses, batch), batch, losses if of.report_names else None, of=of)

    def embed(self, batch: Batch, *specs: EmbeddingSpec) -> Tensor:
        batch = batch.to(self.runner.device)
        with capture_hidden_states(self.model, [spec.layer for spec in specs]) as captured:
            self.token_losses(batch)
        return torch.cat([sample_embeddings(captured[spec.layer], batch, spec) for spec in specs], dim=1)

    def per_sample(self, batch: Batch, fn: PerSampleFn) -> Tensor:
        batch = batch.to(self.runner.device)
        with torch.no_grad(), self.runner.evaluation_mode():
            values = per_sample_values(self.runner.logits(batch), batch, fn)
        return stack_values(values, len(batch.sample_ids), width_of(values), self.runner.device)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        uniforms: np.ndarray,
        spec: GenerationSpec,
        end_ids: Sequence[int],
        pad_id: int,
    ) -> list[np.ndarray]:
        return generate_answers(self.runner, prompts, uniforms, spec, end_ids, pad_id)

    # -- gradients -----------------------------------------------------------------------------------------------

    def gradient_scorer(self, adam: bool) -> FSDPGradientScorer:
        return FSDPGradientScorer(self.runner, self.optimizer, adam)

    def feature_maker(self, spec: ProjectionSpec, adam: bool) -> FSDPFeatureMaker:
        return FSDPFeatureMaker(self.runner, self.optimizer, spec, adam)

    def gradient_gram(self, groups: list[list[Batch]]) -> Tensor:
        return gradient_gram(self.runner, self.optimizer, groups, self.loss_scaler.value)

    # -- state ---------------------------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        checkpoint.save(self.runner, self.optimizer, self.scheduler, self.loss_scaler, folder)

    def load_state(self, folder: Path) -> None:
        checkpoint.load(self.runner, self.optimizer, self.scheduler, self.loss_scaler, folder)

    def export(self, folder: Path) -> None:
        checkpoint.export(self.runner, folder)

    def rng_state(self) -> dict[str, Tensor]:
        return self.runner.rng_state()

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        self.runner.set_rng_state(state)
