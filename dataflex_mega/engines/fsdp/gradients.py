"""Gradient scores on the FSDP engine: target directions through an ordinary backward pass, candidates through taps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dataflex_mega import objective
from dataflex_mega.engines.fsdp.experts import WEIGHTS, ExpertTaps, trained_experts
from dataflex_mega.engines.fsdp.parallel import set_gradient_sync
from dataflex_mega.engines.layer_cache import HELD, Held
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.gradients import Adam, Layer, Taps, spans, trained_linears
from dataflex_mega.signals.kernel_choice import choose
from dataflex_mega.types import IGNORED, Batch

if TYPE_CHECKING:
    from dataflex_mega.engines.fsdp.engine import FSDPEngine

ADAM_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)


@dataclass
class Directions:
    """One direction a group of targets, laid out over ranks as the parameters are."""

    by_layer: dict[str, Sequence[Tensor] | Tensor]  # layer -> S tensors like its weight (DTensors under FSDP2)
    held: Held = field(default_factory=lambda: Held(HELD // 2))

    def __len__(self) -> int:
        return len(next(iter(self.by_layer.values())))

    def of(self, name: str) -> Tensor:
        """[S, d_out, d_in] as they are stored, gathered for this layer alone."""
        parts = self.by_layer[name]
        if isinstance(parts, Tensor):
            return parts
        return self.held.get(name, self._gather, parts[0].element_size() * len(parts) * parts[0].numel())

    def _gather(self, name: str) -> Tensor:
        return torch.stack([whole(tensor) for tensor in self.by_layer[name]])


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece; every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[union-attr]


class GradientScorer:
    """Scores candidates against target directions with the model and optimizer state of now."""

    def __init__(self, engine: FSDPEngine, adam: bool) -> None:
        """`adam`: precondition candidates with the optimizer's moments. Raises ConfigError when it has none."""
        if adam and not isinstance(engine.optimizer, ADAM_OPTIMIZERS):
            name = type(engine.optimizer).__name__
            raise ConfigError(f"gradient_type: adam needs optim: adamw_torch, found {name}; use gradient_type: sgd")
        self.engine, self.adam = engine, adam
        for module in engine.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass alone, FSDP2 leaves the outermost group gathered
        self.linears, self.experts = trained_linears(engine.model), trained_experts(engine.model)
        # The optimizer's parameters. Inside a pass, FSDP2 shows a module its gathered weight instead.
        self.weights: dict[str, Tensor] = {name: linear.weight for name, linear in self.linears.items()}
        self.weights.update(
            {f"{n}.{weight}": getattr(m, weight) for n, m in self.experts.items() for weight in WEIGHTS}
        )
        if not self.weights:
            raise ConfigError("gradient scores need a linear layer that trains, and the model has none")
        self.held = Held(HELD // 2)
        self.choice = choose(engine.mesh.device)  # torch's operations or the kernel

    # -- directions ----------------------------------------------------------------------------------------------

    def directions(self, groups: Sequence[Sequence[Batch]]) -> Directions:
        """Groups of this rank's target batches -> the mean over all ranks of the targets' normalised gradients.

        Every rank passes equally many groups and batches; rows without a target token (fillers) count for nothing.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for batches in groups:
            lengths = [self._pass(_norms_only, batch, 0)[1].sqrt() for batch in batches]
            count = self._total(lengths)
            self._backward(batches, [torch.where(n > 0, 1 / (n * count), 0.0) for n in lengths])
            for name, weight in self.weights.items():
                assert weight.grad is not None
                found[name].append(weight.grad.detach())  # not copied: the buffer is given up below
            self.engine.optimizer.zero_grad(set_to_none=True)
        # Taken out one by one, so that there are not two copies of all.
        return Directions({name: _joined(found.pop(name)) for name in list(found)})

    def policy_directions(self, groups: Sequence[Sequence[tuple[Batch, Tensor]]]) -> Directions:
        """Groups of prompts, each (this rank's answers [n], [n] factors) -> the mean over prompts of the normalised
        gradient of sum over the answers of all ranks of factor * (summed token loss of the answer).

        Every rank passes equally many prompts. A prompt whose gradient is zero counts for nothing.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for prompts in groups:
            sums = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
            count = 0
            for batch, factors in prompts:
                tokens = objective.sample_sums((batch.labels != IGNORED).long(), batch)
                self._backward([batch], [(factors * tokens).float().to(self.engine.mesh.device)])
                grads = {name: weight.grad.detach() for name, weight in self.weights.items() if weight.grad is not None}
                length = float(whole(torch.nn.utils.get_total_norm(list(grads.values()))))
                if length > 0:
                    count += 1
                    for name, grad in grads.items():
                        sums[name] += grad / length
                self.engine.optimizer.zero_grad(set_to_none=True)
            for name, total in sums.items():
                found[name].append(total / max(count, 1))
        return Directions({name: _joined(parts) for name, parts in found.items()})

    def _total(self, lengths: list[Tensor]) -> Tensor:
        local = torch.stack([(n > 0).sum() for n in lengths]).sum()
        return self.engine.collectives.sum(local).clamp(min=1)

    def _backward(self, batches: Sequence[Batch], weights: Sequence[Tensor]) -> None:
        """Gradient of sum_v weight_v * (mean token loss of v) over all ranks, into the parameters' own buffers.

        What would reach the embeddings' weight is set to zero: where that is the output layer's weight too, the targets'
        gradients are to count the same use of it as the candidates'.
        """
        engine = self.engine
        with self._evaluating(_without_embeddings):
            for number, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
                set_gradient_sync(engine.module, last=number == len(batches) - 1)
                loss = self._weighted(batch.to(engine.mesh.device), weight)
                (loss * engine.mesh.dp_size).backward()  # the wrappers average over ranks

    def _weighted(self, batch: Batch, weights: Tensor) -> Tensor:
        """Weighted sum of the samples' mean token losses."""
        return (self.engine.token_losses(batch) * objective.mean_weights(weights, batch)).sum()

    @contextmanager
    def _evaluating(self, at_embeddings: Any) -> Iterator[None]:
        """Dropout off, and a hook on the embeddings' output."""
        embeddings: nn.Module = self.engine.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(at_embeddings)
        self.engine.module.eval()
        try:
            yield
        finally:
            handle.remove()
            self.engine.module.train()

    # -- candidates ----------------------------------------------------------------------------------------------

    def score(self, batch: Batch, directions: Directions) -> tuple[Tensor, Tensor]:
        """A batch of n samples -> ([n, S] inner products with each direction, [n] squared norms)."""

        def layer(name: str, expert: int | None = None) -> Layer:
            moments = partial(self._moments, name, expert) if self.adam else None
            return Layer(partial(_direction, directions, name, expert), moments)

        return self._pass(layer, batch, len(directions))

    def _pass(self, layer: Callable[..., Layer], batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """Forward and activation gradients only: autograd is asked for the embeddings' gradient, never a weight's."""
        engine = self.engine
        where = spans(batch.segment)
        batch = batch.to(engine.mesh.device)
        samples = len(batch.sample_id)
        dtype = torch.float64 if next(iter(self.weights.values())).dtype == torch.float64 else torch.float32
        taps, experts = (
            Taps(self.linears, {name: layer(name) for name in self.linears}, self.choice.adder),
            ExpertTaps(self.experts, layer),
        )
        first: list[Tensor] = []
        with (
            self._frozen(),
            self._evaluating(lambda _m, _a, output: _entered(first, output)),
            taps.listening(samples, count, engine.mesh.device, where, dtype) as sums,
            experts.listening(batch.segment, sums),
        ):
            ones = torch.ones(samples, device=engine.mesh.device, dtype=dtype)
            torch.autograd.grad(self._weighted(batch, ones), first[:1])
        return sums.dot, sums.norm2

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Layers do not keep their inputs for a weight gradient that nobody asks for; what the taps keep is enough.

        Wrapped models are left alone: FSDP2 makes the gathered parameters itself, DDP has hooks on its parameters.
        """
        wrapped = self.engine.module is not self.engine.model or isinstance(self.engine.module, FSDPModule)
        weights = [] if wrapped else [linear.weight for linear in self.linears.values()]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    def _moments(self, name: str, expert: int | None) -> Adam:
        state: dict[str, Any] = self.engine.optimizer.state.get(self.weights[name], {})
        sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
        found: Adam = self.held.get(name, self._gather_moments, 8 * self.weights[name].numel() if sharded else 0)
        return found if expert is None else replace(found, first=found.first[expert], second=found.second[expert])

    def _gather_moments(self, name: str) -> Adam:
        """Adam's state of a weight, zero before the first step."""
        optimizer, weight = self.engine.optimizer, self.weights[name]
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        state: dict[str, Any] = optimizer.state.get(weight, {})
        if not state:
            zeros = torch.zeros((), device=self.engine.mesh.device).expand(weight.shape)
            return Adam(zeros, zeros, 0, group["betas"], group["eps"])
        first, second = whole(state["exp_avg"]), whole(state["exp_avg_sq"])
        return Adam(first, second, int(whole(torch.as_tensor(state["step"]))), group["betas"], group["eps"])


def _norms_only(_name: str, _expert: int | None = None) -> Layer:
    return Layer(None)


def _direction(directions: Directions, name: str, expert: int | None) -> Tensor:
    """[S, d_out, d_in] of a linear layer, or of one of a layer's experts."""
    whole_one = directions.of(name)
    return whole_one if expert is None else whole_one[:, expert]


def _joined(parts: list[Tensor]) -> Sequence[Tensor] | Tensor:
    """S whole tensors as one [S, d_out, d_in]; sharded ones stay as they are."""
    if hasattr(parts[0], "full_tensor"):
        return parts
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _without_embeddings(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Hook of the embeddings: nothing flows back into their weight."""
    if output.requires_grad:  # it does not under LoRA
        output.register_hook(torch.zeros_like)


def _entered(first: list[Tensor], output: Any) -> Any:
    """The embeddings' output as the place where the backward pass ends; with LoRA it needs telling to have a gradient."""
    entered = output if output.requires_grad else output.detach().requires_grad_(True)
    first.append(entered)
    return entered
