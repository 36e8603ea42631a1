"""Gradient scores on the FSDP engine: target directions through an ordinary backward pass, candidates through hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import dataflex_mega.objective as objective
from dataflex_mega.engines.fsdp.experts import WEIGHTS, ExpertGradientHooks, trained_experts
from dataflex_mega.engines.fsdp.language_model import check_only_tokens_train
from dataflex_mega.engines.fsdp.parallel import set_gradient_sync
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.layer_cache import CACHE_BYTES, LayerCache
from dataflex_mega.engines.per_sample import nonzero_targets
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.kernel_choice import choose_kernel
from dataflex_mega.signals.per_sample_gradients import (
    AdamMoments,
    GradientHooks,
    LayerOperands,
    sample_spans,
    trained_linears,
)
from dataflex_mega.types import IGNORE_INDEX, Batch

ADAM_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)


@dataclass
class FSDPTargetDirections:
    """One direction per group of targets, laid out over ranks as the parameters are."""

    by_layer: dict[str, Sequence[Tensor] | Tensor]  # layer -> S tensors like its weight (DTensors under FSDP2)
    cache: LayerCache = field(default_factory=lambda: LayerCache(CACHE_BYTES // 2))

    def __len__(self) -> int:
        return len(next(iter(self.by_layer.values())))

    def for_layer(self, name: str) -> Tensor:
        """[S, d_out, d_in] as they are stored, gathered for this layer alone."""
        parts = self.by_layer[name]
        if isinstance(parts, Tensor):
            return parts
        return self.cache.get(name, self._gather, parts[0].element_size() * len(parts) * parts[0].numel())

    def _gather(self, name: str) -> Tensor:
        return torch.stack([full_tensor(tensor) for tensor in self.by_layer[name]])


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece; every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[union-attr]


class FSDPGradientScorer:
    """Scores candidates against target directions with the current model and optimizer state."""

    def __init__(self, runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, adam: bool) -> None:
        """`adam`: precondition candidates with the optimizer's moments. Raises ConfigError when it has none."""
        if adam and not isinstance(optimizer, ADAM_OPTIMIZERS):
            name = type(optimizer).__name__
            raise ConfigError(f"gradient_type: adam needs optim: adamw_torch, found {name}; use gradient_type: sgd")
        self.runner, self.optimizer, self.adam = runner, optimizer, adam
        check_only_tokens_train(runner.model)
        runner.reshard()
        self.linears, self.experts = trained_linears(runner.model), trained_experts(runner.model)
        # The optimizer's parameters. Inside a pass, FSDP2 shows a module its gathered weight instead.
        self.weights: dict[str, Tensor] = {name: linear.weight for name, linear in self.linears.items()}
        self.weights.update(
            {f"{n}.{weight}": getattr(m, weight) for n, m in self.experts.items() for weight in WEIGHTS}
        )
        if not self.weights:
            raise ConfigError("gradient scores need a linear layer that trains, and the model has none")
        self.cache = LayerCache(CACHE_BYTES // 2)
        self.choice = choose_kernel(runner.device)  # torch's operations or the kernel
        self.kernel_message = self.choice.message

    # -- directions ----------------------------------------------------------------------------------------------

    def directions(self, groups: Sequence[Sequence[Batch]]) -> FSDPTargetDirections:
        """Groups of this rank's target batches -> the mean over all ranks of the targets' normalised gradients.

        Every rank passes equally many groups and batches; rows without a target token (fillers) do not count.
        """
        directions: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for batches in groups:
            lengths = [self._score_pass(_norms_only, batch, 0)[1].sqrt() for batch in batches]
            count = self._count_nonzero(lengths)
            self._backward(batches, [torch.where(n > 0, 1 / (n * count), 0.0) for n in lengths])
            for name, weight in self.weights.items():
                assert weight.grad is not None
                directions[name].append(weight.grad.detach())  # not copied: the buffer is released below
            self.optimizer.zero_grad(set_to_none=True)
        # Taken out one by one, so that there are not two copies of all.
        return FSDPTargetDirections({name: _stack_or_keep(directions.pop(name)) for name in list(directions)})

    def policy_directions(self, groups: Sequence[Sequence[tuple[Batch, Tensor]]]) -> FSDPTargetDirections:
        """Groups of prompts, each (this rank's answers [n], [n] factors) -> the mean over prompts of the normalised
        gradient of sum over the answers of all ranks of factor * (summed token loss of the answer).

        Every rank passes equally many prompts. A prompt whose gradient is zero does not count.
        """
        directions: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for prompts in groups:
            sums = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
            count = 0
            for batch, factors in prompts:
                tokens = objective.sample_sums((batch.labels != IGNORE_INDEX).long(), batch)
                weights = (factors * tokens).float().to(self.runner.device)
                self._backward([batch], [weights], of_likelihood=True)
                grads = {name: weight.grad.detach() for name, weight in self.weights.items() if weight.grad is not None}
                length = float(full_tensor(torch.nn.utils.get_total_norm(list(grads.values()))))
                if length > 0:
                    count += 1
                    for name, grad in grads.items():
                        sums[name] += grad / length
                self.optimizer.zero_grad(set_to_none=True)
            for name, total in sums.items():
                directions[name].append(total / max(count, 1))
        return FSDPTargetDirections({name: _stack_or_keep(parts) for name, parts in directions.items()})

    def _count_nonzero(self, lengths: list[Tensor]) -> Tensor:
        local = torch.stack([(n > 0).sum() for n in lengths]).sum()
        return nonzero_targets(self.runner.collectives.all_reduce_sum(local))

    def _backward(self, batches: Sequence[Batch], weights: Sequence[Tensor], of_likelihood: bool = False) -> None:
        """Gradient of sum_v weight_v * (mean token loss of v) over all ranks, into the parameters' own buffers. The loss is
        what training differentiates, or the cross-entropy where a gradient `of_likelihood` is asked for.

        What would reach the embeddings' weight is set to zero: where that is the output layer's weight too, the targets'
        gradients are to count the same use of it as the candidates'.
        """
        runner = self.runner
        with self._evaluating(_zero_embedding_grad):
            for number, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
                set_gradient_sync(runner.module, last=number == len(batches) - 1)
                loss = self._weighted(batch.to(runner.device), weight, of_likelihood)
                (loss * runner.parallel_info.dp_size).backward()  # the wrappers average over ranks

    def _weighted(self, batch: Batch, weights: Tensor, of_likelihood: bool = False) -> Tensor:
        """Weighted sum of the samples' mean token losses."""
        runner = self.runner
        losses = runner.token_losses(batch) if of_likelihood else runner.training_losses(batch).trained
        return (losses * objective.mean_weights(weights, batch)).sum()

    @contextmanager
    def _evaluating(self, at_embeddings: Any) -> Iterator[None]:
        """Dropout off, and a hook on the output of the embeddings."""
        embeddings: nn.Module = self.runner.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(at_embeddings)
        try:
            with self.runner.evaluation_mode():
                yield
        finally:
            handle.remove()

    # -- candidates ----------------------------------------------------------------------------------------------

    def score(self, batch: Batch, directions: FSDPTargetDirections) -> tuple[Tensor, Tensor]:
        """A batch of n samples -> ([n, S] inner products with each direction, [n] squared norms)."""

        def layer(name: str, expert: int | None = None) -> LayerOperands:
            moments = partial(self._moments, name, expert) if self.adam else None
            return LayerOperands(partial(_direction, directions, name, expert), moments)

        return self._score_pass(layer, batch, len(directions))

    def _score_pass(self, layer: Callable[..., LayerOperands], batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """Forward and activation gradients only: autograd is asked for the embeddings' gradient, never a weight's."""
        runner = self.runner
        spans = sample_spans(batch.segment_ids)
        batch = batch.to(runner.device)
        samples = len(batch.sample_ids)
        dtype = torch.float64 if next(iter(self.weights.values())).dtype == torch.float64 else torch.float32
        layers = {name: layer(name) for name in self.linears}
        hooks = GradientHooks(self.linears, layers, self.choice.accumulator_class)
        expert_hooks = ExpertGradientHooks(self.experts, layer)
        entries: list[Tensor] = []
        with (
            self._weights_frozen(),
            self._evaluating(lambda _m, _a, output: mark_graph_entry(entries, output)),
            hooks.recording(samples, count, runner.device, spans, dtype) as sums,
            expert_hooks.recording(batch.segment_ids, sums),
        ):
            ones = torch.ones(samples, device=runner.device, dtype=dtype)
            torch.autograd.grad(self._weighted(batch, ones), entries[:1])
        return sums.dot, sums.norm2

    @contextmanager
    def _weights_frozen(self) -> Iterator[None]:
        """Layers do not keep their inputs for a weight gradient that is not needed; what the hooks store is enough.

        Wrapped models are left alone: FSDP2 makes the gathered parameters itself, DDP has hooks on its parameters.
        """
        wrapped = self.runner.module is not self.runner.model or isinstance(self.runner.module, FSDPModule)
        weights = [] if wrapped else [linear.weight for linear in self.linears.values()]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    def _moments(self, name: str, expert: int | None) -> AdamMoments:
        state: dict[str, Any] = self.optimizer.state.get(self.weights[name], {})
        sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
        moments: AdamMoments = self.cache.get(
            name, self._gather_moments, 8 * self.weights[name].numel() if sharded else 0
        )
        return (
            moments if expert is None else replace(moments, first=moments.first[expert], second=moments.second[expert])
        )

    def _gather_moments(self, name: str) -> AdamMoments:
        """Adam's state of a weight, zero before the first step."""
        optimizer, weight = self.optimizer, self.weights[name]
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        state: dict[str, Any] = optimizer.state.get(weight, {})
        if not state:
            zeros = torch.zeros((), device=self.runner.device).expand(weight.shape)
            return AdamMoments(zeros, zeros, 0, group["betas"], group["eps"])
        first, second = full_tensor(state["exp_avg"]), full_tensor(state["exp_avg_sq"])
        return AdamMoments(
            first, second, int(full_tensor(torch.as_tensor(state["step"]))), group["betas"], group["eps"]
        )


def _norms_only(_name: str, _expert: int | None = None) -> LayerOperands:
    return LayerOperands(None)


def _direction(directions: FSDPTargetDirections, name: str, expert: int | None) -> Tensor:
    """[S, d_out, d_in] of a linear layer, or of one of a layer's experts."""
    direction = directions.for_layer(name)
    return direction if expert is None else direction[:, expert]


def _stack_or_keep(parts: list[Tensor]) -> Sequence[Tensor] | Tensor:
    """S unsharded tensors as one [S, d_out, d_in]; sharded ones stay as they are."""
    if hasattr(parts[0], "full_tensor"):
        return parts
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _zero_embedding_grad(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Hook of the embeddings: nothing flows back into their weight."""
    if output.requires_grad:  # it does not under LoRA
        output.register_hook(torch.zeros_like)


def mark_graph_entry(entries: list[Tensor], output: Any) -> Any:
    """Hook of the embeddings: append their output, where the backward pass ends; under LoRA it must be made to need one."""
    entry = output if output.requires_grad else output.detach().requires_grad_(True)
    entries.append(entry)
    return entry
