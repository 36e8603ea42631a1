"""The FSDP engine: a Hugging Face model, one optimizer step at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataflex_mega import objective
from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.distributed.mesh import Mesh
from dataflex_mega.engines.fsdp import checkpoint as disk
from dataflex_mega.engines.fsdp import gram
from dataflex_mega.engines.fsdp.hidden import layers_of, listening
from dataflex_mega.engines.fsdp.parallel import Layout, set_gradient_sync, unwrap
from dataflex_mega.engines.fsdp.precision import LossScale
from dataflex_mega.engines.fsdp.routers import Routers
from dataflex_mega.engines.options import Options
from dataflex_mega.engines.stats import StepSums
from dataflex_mega.errors import NotFinite
from dataflex_mega.signals import hidden
from dataflex_mega.types import Batch, HiddenSpec, SampleObs, StepStats, Weigh


@dataclass
class FSDPEngine:
    """Implements engines.base.Engine. `module` is what parallel.parallelize returned."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    mesh: Mesh
    layout: Layout
    options: Options
    scale: LossScale = field(init=False)
    routers: Routers | None = field(init=False)
    collectives: Collectives = field(init=False)

    def __post_init__(self) -> None:
        self.scale = LossScale(self.layout.precision == "fp16")
        self.routers = Routers(self.model) if self.options.loads else None
        self.collectives = Collectives(self.mesh)
        self.module.train()

    # -- training ------------------------------------------------------------------------------------------------

    def train_step(self, micros: Sequence[Batch], weigh: Weigh | None) -> StepStats:
        """See engines.base.Engine."""
        micros = [batch.to(self.mesh.device) for batch in micros]
        loads = None if self.routers is None else self.routers.sums(self.options.domains, self.mesh.device)
        sums = StepSums(self.options.domains, self.mesh.device, loads)
        counts = self._denominators(micros)
        count = counts.sum().clamp(min=1).long()
        ahead = self._weights_of_step(micros, weigh, counts) if weigh and self._looks_ahead(micros) else None
        for number, batch in enumerate(micros):
            set_gradient_sync(self.module, last=number == len(micros) - 1)
            with self.routers.counting(batch, loads) if self.routers and loads else contextlib.nullcontext():
                token_loss, vectors = self._forward(batch, self.options.hidden if weigh and ahead is None else None)
            obs = objective.observe(objective.sample_sums(token_loss, batch), batch, token_loss, counts, vectors)
            if ahead is not None:
                weights, by_token = ahead[number]
            else:
                weights = weigh(obs) if weigh else None
                by_token = (objective.token_weights([(token_loss, batch)], weigh, self.collectives.sum) or [None])[0]
            loss_sum = objective.sample_sums(token_loss if by_token is None else token_loss * by_token, batch)
            loss = objective.weighted_loss(loss_sum, obs.tokens, weights, count, self.options.normalization)
            # The wrappers average gradients over ranks; the loss is a sum over them.
            (loss * (self.mesh.dp_size * self.scale.value)).backward()
            sums.add(obs, batch, loss.detach(), weights)
        grad_norm = self._update(micros, sums)
        return sums.reduce(self.collectives, grad_norm, weigh is not None)

    def _denominators(self, micros: Sequence[Batch]) -> Tensor:
        """[k] float64: each domain's part of the loss denominator, over all micro-batches and ranks."""
        k, normalization = self.options.domains, self.options.normalization
        return self.collectives.sum(torch.stack([objective.domain_counts(b, k, normalization) for b in micros]).sum(0))

    def _looks_ahead(self, micros: Sequence[Batch]) -> bool:
        return self.options.lookahead == "exact" and len(micros) > 1

    def _weights_of_step(
        self, micros: Sequence[Batch], weigh: Weigh, counts: Tensor
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Weights of samples, and of tokens if any, from a forward pass over all micro-batches with the dropout masks that
        training will draw."""
        state = self.rng_state()
        with torch.no_grad():
            passed = [self._forward(batch, self.options.hidden) for batch in micros]
        self.set_rng_state(state)
        parts = [(loss, batch) for (loss, _), batch in zip(passed, micros, strict=True)]
        seen = [
            objective.observe(objective.sample_sums(loss, batch), batch, hidden=vectors)
            for (loss, vectors), batch in zip(passed, micros, strict=True)
        ]
        by_sample = weigh(SampleObs.joined(seen, counts)).split([len(obs.sample_id) for obs in seen])
        by_token = objective.token_weights(parts, weigh, self.collectives.sum) or [None] * len(micros)
        return list(zip(by_sample, by_token, strict=True))

    def _forward(self, batch: Batch, spec: HiddenSpec | None) -> tuple[Tensor, Tensor | None]:
        """(token losses [b, S], differentiable; the samples' vectors [n, h] when `spec` asks for them, without gradient)."""
        if spec is None:
            return self.token_losses(batch), None
        with listening(self.model, [spec.layer]) as heard:
            losses = self.token_losses(batch)
        return losses, hidden.vectors(heard[spec.layer], batch, spec)

    def token_losses(self, batch: Batch) -> Tensor:
        """[b, S] float32, differentiable."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.packed:
            inputs["position_ids"] = batch.position_ids
            inputs["attention_mask"] = attention_mask(batch.segment, self._mask_dtype())
        # Unpacked rows are padded on the right: under causal attention no token sees the padding, so no mask is needed.
        with self.autocast():
            logits = self.module(**inputs).logits
        return objective.token_losses(logits, batch.labels)

    def _mask_dtype(self) -> torch.dtype:
        return self.layout.dtype

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of forward passes."""
        if self.layout.precision == "fp32" or self.layout.mode == "fsdp2":  # FSDP2 casts by its own policy
            yield
        else:
            with torch.autocast(self.mesh.device.type, dtype=self.layout.dtype):
                yield

    def _update(self, micros: Sequence[Batch], sums: StepSums) -> float:
        """Clip and step -> the gradient norm before clipping. A step that is not finite changes nothing."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.scale.enabled:
            for parameter in trained:
                parameter.grad.div_(self.scale.value)  # type: ignore[union-attr]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[union-attr]
        value = float(norm)
        finite = math.isfinite(value)
        bad = [] if finite else self._not_finite(sums)
        self.scale.update(finite)
        if finite:
            if self.options.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(trained, self.options.max_grad_norm, norm.to(self.mesh.device))
            self.optimizer.step()
        elif self.options.on_nan == "stop" and (bad or not self.scale.enabled):
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFinite(fault_text(value, bad), bad)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _not_finite(self, sums: StepSums) -> list[int]:
        """Ids of the step's samples, of all ranks, whose loss is not finite."""
        return sorted(i for ids in self.collectives.gather_objects(sums.not_finite()) for i in ids)

    def gradient_gram(self, groups: list[list[Batch]]) -> Tensor:
        """See gram.gradient_gram."""
        return gram.gradient_gram(self, groups)

    # -- forward only --------------------------------------------------------------------------------------------

    def sample_losses(self, batch: Batch) -> SampleObs:
        """See engines.base.Engine."""
        batch = batch.to(self.mesh.device)
        self.module.eval()
        with torch.no_grad():
            obs = objective.observe(objective.sample_sums(self.token_losses(batch), batch), batch)
        self.module.train()
        return obs

    def embed(self, batch: Batch, *specs: HiddenSpec) -> Tensor:
        """See engines.base.Engine."""
        batch = batch.to(self.mesh.device)
        self.module.eval()
        with torch.no_grad(), listening(self.model, [spec.layer for spec in specs]) as heard:
            self.token_losses(batch)
        self.module.train()
        return torch.cat([hidden.vectors(heard[spec.layer], batch, spec) for spec in specs], dim=1)

    @property
    def depth(self) -> int:
        """See engines.base.Engine."""
        return len(layers_of(self.model))

    # -- state ---------------------------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """See engines.base.Engine."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def model(self) -> Any:
        """The Hugging Face or PEFT model."""
        return unwrap(self.module)

    def save_state(self, folder: Path) -> None:
        """See engines.base.Engine."""
        disk.save(self, folder)

    def load_state(self, folder: Path) -> None:
        """See engines.base.Engine."""
        disk.load(self, folder)

    def export(self, folder: Path) -> None:
        """See engines.base.Engine."""
        disk.export(self, folder)

    def rng_state(self) -> dict[str, Tensor]:
        """See engines.base.Engine."""
        state = {"cpu": torch.get_rng_state()}
        if self.mesh.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.mesh.device)
        return state

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        """See engines.base.Engine."""
        torch.set_rng_state(state["cpu"])
        if self.mesh.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.mesh.device)


def attention_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, S] segments -> [b, 1, S, S] additive mask: causal within a sample, closed between samples.

    Padding attends to itself, because a row of a softmax that is closed everywhere is not a number.
    """
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    allowed = (same & causal).unsqueeze(1)
    return torch.zeros(allowed.shape, dtype=dtype, device=segment.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def fault_text(norm: float, bad: list[int]) -> str:
    """What is not finite; the trainer adds the step and where the samples come from."""
    return "the loss is not finite" if bad else f"every loss is finite but the gradient norm is {norm}"
