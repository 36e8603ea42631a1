"""Gradient scores on the Megatron engine: megatron-core's schedules with frozen weights, and taps on its linear layers.

directions   an ordinary backward pass of the weighted targets into megatron-core's own gradient buffers, without its
             reductions; then each weight's part is summed over data-parallel ranks and shared out among them
candidates   forward and backward with every weight frozen, so that only gradients of activations are computed
afterwards   one all-reduce of [n, S + 1]: inner products and squared norms of the parts of a weight, of stages and of
             experts add up
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from dataflex_mega import objective
from dataflex_mega.engines.layer_cache import HELD, Held
from dataflex_mega.engines.megatron import batches, cpu
from dataflex_mega.engines.megatron.checkpoint import bare
from dataflex_mega.engines.megatron.moments import Moments
from dataflex_mega.engines.megatron.taps import Micro, Part, Taps, parts_of
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.gradients import Layer, Sums, wide
from dataflex_mega.types import IGNORED, Batch

if TYPE_CHECKING:
    from dataflex_mega.engines.megatron.engine import MegatronEngine

REDUCTIONS = ("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func")


@dataclass
class Shared:
    """S tensors of one shape, cut end to end among the ranks of a group."""

    shape: torch.Size  # of one
    group: Any
    slices: list[Tensor] = field(default_factory=list)  # this rank's elements of each

    def add(self, tensor: Tensor) -> None:
        """Keep this rank's elements of the sum of `tensor` over the group."""
        total = wide(tensor).flatten().clone()
        size = dist.get_world_size(self.group)
        if size > 1:
            dist.all_reduce(total, group=self.group)
            width = -(-total.numel() // size)
            first = width * dist.get_rank(self.group)
            total = nn.functional.pad(total[first : first + width], (0, max(0, first + width - len(total))))[:width]
        self.slices.append(total.clone() if size > 1 else total)

    def whole(self) -> Tensor:
        """[S, *shape] on every rank of the group; all must ask."""
        mine = torch.stack(self.slices)
        size = dist.get_world_size(self.group)
        if size > 1:
            parts = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(parts, mine, group=self.group)
            mine = torch.cat(parts, dim=1)[:, : self.shape.numel()]
        return mine.view(-1, *self.shape)


@dataclass
class Directions:
    """One direction a group of targets, of this rank's parts of the weights."""

    count: int
    by_part: dict[str, Shared]
    held: Held = field(default_factory=lambda: Held(HELD // 2))

    def __len__(self) -> int:
        return self.count

    def of(self, name: str) -> Tensor:
        """[S, d_out, d_in] of this rank's part."""
        shared = self.by_part[name]
        return self.held.get(name, lambda _name: shared.whole(), 4 * len(self) * shared.shape.numel())


class GradientScorer:
    """Scores candidates against target directions with the model and optimizer state of now. Implements what
    signals.scorer asks for; every rank calls each method equally often."""

    def __init__(self, engine: MegatronEngine, adam: bool) -> None:
        """`adam`: precondition candidates with the optimizer's moments. Raises ConfigError where it cannot be done."""
        _check(engine)
        self.engine, self.adam = engine, adam
        self.parts = parts_of(engine.chunks)
        self.held = Held(HELD // 2)
        self.moments = Moments.of(engine.optimizer, engine.mesh.device) if adam else None

    # -- directions ----------------------------------------------------------------------------------------------

    def directions(self, groups: Sequence[Sequence[Batch]]) -> Directions:
        """Groups of this rank's target batches -> the mean over all ranks of the targets' normalised gradients.

        Every rank passes equally many groups and batches; rows without a target token (fillers) count for nothing.
        """
        norms = {part.name: Layer(None) for part in self.parts}
        found = {part.name: Shared(part.weight.shape, _replicas(part)) for part in self.parts}
        for members in groups:
            lengths = [self._pass(norms, batch, 0)[1].sqrt() for batch in members]
            local = torch.stack([(n > 0).sum() for n in lengths]).sum()
            count = self.engine.collectives.sum(local).clamp(min=1)
            self._zero()
            for batch, n in zip(members, lengths, strict=True):
                self._backward(batch, torch.where(n > 0, 1 / (n * count), 0.0))
            for part in self.parts:
                found[part.name].add(part.weight.main_grad)  # type: ignore[attr-defined]  # megatron-core's buffer
            self._zero()
        return Directions(len(groups), found)

    def _zero(self) -> None:
        self.engine.optimizer.zero_grad()  # after a step, a parameter's grad may be its part of the buffer
        for chunk in self.engine.chunks:
            chunk.zero_grad_buffer()

    def _backward(self, batch: Batch, weights: Tensor) -> None:
        """Add the gradient of sum_v weight_v * (mean token loss of v) to this rank's buffers.

        Nothing reaches the embeddings' weight: where that is the output layer's weight too, it counts by that use alone.
        """
        with cpu.redirected(), self._evaluating(_without_embeddings):
            micros, by_token = self._cut(batch, weights)
            self.engine.run(micros, _loss(by_token), forward_only=False)

    # -- candidates ----------------------------------------------------------------------------------------------

    def score(self, batch: Batch, directions: Directions) -> tuple[Tensor, Tensor]:
        """A batch of n samples -> ([n, S] inner products with each direction, [n] squared norms)."""
        layers = {
            part.name: Layer(partial(directions.of, part.name), partial(self._moments, part) if self.adam else None)
            for part in self.parts
        }
        return self._pass(layers, batch, len(directions))

    def _moments(self, part: Part) -> Any:
        assert self.moments is not None
        moments = self.moments
        return self.held.get(part.name, lambda _name: moments(part.weight), 8 * part.weight.numel())

    def _pass(self, layers: dict[str, Layer], batch: Batch, directions: int) -> tuple[Tensor, Tensor]:
        """Forward and activation gradients only, then the sum over all parts of the model."""
        engine = self.engine
        with cpu.redirected(), self._evaluating(_entered), _frozen(engine.chunks):
            total, first = self._places(len(batch.sample_id))
            ones = torch.ones(len(batch.sample_id), device=engine.mesh.device)
            micros, by_token = self._cut(batch, ones)
            seen = [Micro.of(torch.where(m.segment >= 0, m.segment + first, -1)) for m in micros]
            sums = Sums.zeros(total, directions, engine.mesh.device)
            with Taps(self.parts, layers, seen, sums) as taps:
                engine.run(micros, _loss(by_token), forward_only=False, watch=taps)
        whole = torch.cat([sums.dot, sums.norm2.unsqueeze(1)], dim=1)
        group: Any = None if engine.layout.expert > 1 else parallel_state.get_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(whole, group=group)
        own = whole[first : first + len(batch.sample_id)]
        return own[:, :-1], own[:, -1]

    def _places(self, samples: int) -> tuple[int, int]:
        """(how many places for samples, the first of this rank's). Where experts are shared over data-parallel ranks, a rank
        adds to samples of the others too."""
        if self.engine.layout.expert == 1:
            return samples, 0
        mesh = self.engine.mesh
        most = int(self.engine.collectives.gather(torch.tensor([samples])).amax())
        return most * mesh.dp_size, most * mesh.dp_rank

    def _cut(self, batch: Batch, weights: Tensor) -> tuple[list[Batch], list[Tensor]]:
        """A batch as the schedule wants it: micro-batches, equally many on all data-parallel ranks, and the [b, S] weights
        of their tokens."""
        engine = self.engine
        batch = batch.to(engine.mesh.device)
        by_token = objective.mean_weights(weights, batch)
        whole = engine.same_shape([batch])[0]
        rows = len(whole.input_ids)
        if engine.mesh.dp_size > 1:
            rows = int(engine.collectives.gather(torch.tensor([rows])).amax())
            whole = batches.level([whole], rows, whole.input_ids.shape[1])[0]
        each = engine.micro_rows if engine.layout.pipeline > 1 else rows
        micros = batches.cut(whole, each, engine.layout.pipeline if engine.layout.interleaved > 1 else 1)
        grown = by_token.new_zeros(each * len(micros), whole.input_ids.shape[1])
        grown[: by_token.shape[0], : by_token.shape[1]] = by_token
        return micros, list(grown.split(each))

    @contextmanager
    def _evaluating(self, at_embeddings: Any) -> Iterator[None]:
        """Dropout and megatron-core's reductions off, and a hook on the embeddings' output."""
        engine, config = self.engine, self.engine.config
        saved = {name: getattr(config, name) for name in REDUCTIONS}
        with engine.parameters_whole(), ExitStack() as stack:
            for chunk in engine.chunks:
                model = bare(chunk)
                stack.enter_context(chunk.no_sync())
                if model.pre_process:
                    stack.callback(model.embedding.register_forward_hook(at_embeddings).remove)
            try:
                for name in REDUCTIONS:
                    setattr(config, name, None)
                engine.mode(training=False)
                for chunk in engine.chunks:  # activations are still recomputed, if that is what the run does
                    bare(chunk).decoder.training = True
                yield
            finally:
                engine.mode(training=True)
                for name, value in saved.items():
                    setattr(config, name, value)


def _check(engine: MegatronEngine) -> None:
    config, layout = engine.config, engine.layout
    if config.transformer_impl != "local":
        raise ConfigError(f"transformer_impl: gradient scores need local, found {config.transformer_impl}")
    if layout.context > 1:
        raise ConfigError(
            f"context_parallel_size: gradient scores need whole rows on a rank, found {layout.context}; tensor and pipeline "
            "sizes make room for long ones"
        )
    if config.fp16:
        raise ConfigError("fp16: gradient scores would underflow; use bf16: true or neither")
    if config.num_moe_experts and (layout.expert * layout.expert_tensor) % layout.tensor:
        raise ConfigError(
            f"expert_tensor_parallel_size: for gradient scores, experts {layout.expert} x expert tensor "
            f"{layout.expert_tensor} must be a multiple of tensor_model_parallel_size {layout.tensor}, since positions of a "
            "sample have to meet at one expert"
        )


def _replicas(part: Part) -> Any:
    """The data-parallel ranks that hold the same part."""
    if part.experts is not None:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group()


@contextmanager
def _frozen(chunks: Sequence[Any]) -> Iterator[None]:
    """No weight's gradient is computed inside."""
    trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _loss(by_token: Sequence[Tensor]) -> Any:
    """For `MegatronEngine.run`: the sum of weighted token losses."""

    def loss(number: int, batch: Batch, _vectors: Any, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        weighed = torch.where(batch.labels == IGNORED, 0.0, losses.float()) * by_token[number]
        return weighed.sum(), torch.ones((), dtype=torch.int, device=losses.device), {}

    return loss


def _without_embeddings(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Hook of the embeddings: nothing flows back into their weight."""
    if output.requires_grad:
        output.register_hook(torch.zeros_like)


def _entered(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """Hook of the embeddings: with all weights frozen, their output is where the backward pass ends."""
    return output.detach().requires_grad_(True)
