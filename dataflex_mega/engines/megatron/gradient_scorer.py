"""Gradient scores on the Megatron engine: megatron-core's schedules with frozen weights, and hooks on its linear layers.

directions   an ordinary backward pass of the weighted targets into megatron-core's own gradient buffers, without its
             reductions; then each weight's part is summed over data-parallel ranks and sharded_sum out among them
candidates   forward and backward with every weight frozen, so that only gradients of activations are computed
afterwards   one all-reduce of [n, S + 1]: inner products and squared norms of the shards of a weight, of stages and of
             experts add up
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

import dataflex_mega.objective as objective
from dataflex_mega.engines.layer_cache import CACHE_BYTES, LayerCache
from dataflex_mega.engines.megatron import batches, cpu
from dataflex_mega.engines.megatron.gradient_hooks import (
    LinearShard,
    MegatronGradientHooks,
    MicroBatchSpans,
    linear_shards,
)
from dataflex_mega.engines.megatron.moments import DistributedAdamMoments
from dataflex_mega.engines.megatron.runner import MegatronModelRunner, ScheduleLoss
from dataflex_mega.engines.megatron.wrapping import unwrap
from dataflex_mega.engines.per_sample import nonzero_targets
from dataflex_mega.errors import ConfigError
from dataflex_mega.losses.base import TokenLosses
from dataflex_mega.signals.per_sample_gradients import DotAndNormSums, LayerOperands, upcast
from dataflex_mega.types import Batch

REDUCTION_HOOKS = ("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func")


@dataclass
class ShardedSum:
    """S tensors of one shape, each split end to end over the ranks of a group."""

    shape: torch.Size  # of one
    group: Any
    slices: list[Tensor] = field(default_factory=list)  # this rank's elements of each

    def add(self, tensor: Tensor) -> None:
        """Append this rank's elements of the sum of `tensor` over the group."""
        total = upcast(tensor).flatten().clone()
        size = dist.get_world_size(self.group)
        if size > 1:
            dist.all_reduce(total, group=self.group)
            width = -(-total.numel() // size)
            first = width * dist.get_rank(self.group)
            total = nn.functional.pad(total[first : first + width], (0, max(0, first + width - len(total))))[:width]
        self.slices.append(total.clone() if size > 1 else total)

    def gather(self) -> Tensor:
        """[S, *shape] on every rank of the group; all must ask."""
        local = torch.stack(self.slices)
        size = dist.get_world_size(self.group)
        if size > 1:
            parts = [torch.empty_like(local) for _ in range(size)]
            dist.all_gather(parts, local, group=self.group)
            local = torch.cat(parts, dim=1)[:, : self.shape.numel()]
        return local.view(-1, *self.shape)


@dataclass
class MegatronTargetDirections:
    """One direction per group of targets, of this rank's shards of the weights."""

    count: int
    by_shard: dict[str, ShardedSum]
    cache: LayerCache = field(default_factory=lambda: LayerCache(CACHE_BYTES // 2))

    def __len__(self) -> int:
        return self.count

    def for_layer(self, name: str) -> Tensor:
        """[S, d_out, d_in] of this rank's shard."""
        sharded_sum = self.by_shard[name]
        return self.cache.get(name, lambda _name: sharded_sum.gather(), 4 * len(self) * sharded_sum.shape.numel())


class MegatronGradientScorer:
    """Scores candidates against target directions with the current model and optimizer state. Every rank calls each method
    equally often."""

    kernel_message = ""  # torch's operations, as ever

    def __init__(self, runner: MegatronModelRunner, optimizer: Any, adam: bool, micro_batch_rows: int) -> None:
        """`adam`: precondition candidates with the optimizer's moments. `micro_batch_rows`: rows of a micro-batch where
        there is a pipeline. Raises ConfigError for a layout or optimizer without gradient scores."""
        check_layout(runner)
        self.runner, self.optimizer, self.adam, self.micro_batch_rows = runner, optimizer, adam, micro_batch_rows
        self.shards = linear_shards(runner.model_chunks)
        self.cache = LayerCache(CACHE_BYTES // 2)
        self.moments = DistributedAdamMoments.from_optimizer(optimizer, runner.device) if adam else None

    # -- directions ----------------------------------------------------------------------------------------------

    def directions(self, groups: Sequence[Sequence[Batch]]) -> MegatronTargetDirections:
        """Groups of this rank's target batches -> the mean over all ranks of the targets' normalised gradients.

        Every rank passes equally many groups and batches; rows without a target token (fillers) do not count.
        """
        norms = {shard.name: LayerOperands(None) for shard in self.shards}
        sums = {shard.name: ShardedSum(shard.weight.shape, _replicas(shard)) for shard in self.shards}
        for members in groups:
            lengths = [self._score_pass(norms, batch, 0)[1].sqrt() for batch in members]
            local = torch.stack([(n > 0).sum() for n in lengths]).sum()
            count = nonzero_targets(self.runner.collectives.all_reduce_sum(local))
            self.runner.zero_grad(self.optimizer)
            for batch, n in zip(members, lengths, strict=True):
                self._backward(batch, torch.where(n > 0, 1 / (n * count), 0.0))
            for shard in self.shards:
                sums[shard.name].add(shard.weight.main_grad)  # type: ignore[attr-defined]  # megatron-core's buffer
            self.runner.zero_grad(self.optimizer)
        return MegatronTargetDirections(len(groups), sums)

    def policy_directions(self, groups: Sequence[Sequence[tuple[Batch, Tensor]]]) -> MegatronTargetDirections:
        """Raises ConfigError: the engine has no Capability.POLICY_GRADIENTS."""
        raise ConfigError("policy gradients are not supported by engine: megatron; use engine: fsdp")

    def _backward(self, batch: Batch, weights: Tensor) -> None:
        """Add the gradient of sum_v weight_v * (mean token loss of v) to this rank's buffers.

        Nothing reaches the embeddings' weight: where that is the output layer's weight too, it counts by that use alone.
        """
        with cpu.cuda_calls_on_cpu(), self._evaluating(_zero_embedding_grad):
            micro_batches, by_token = self._micro_batches(batch, weights)
            self.runner.forward_backward(micro_batches, _loss(by_token), forward_only=False)

    # -- candidates ----------------------------------------------------------------------------------------------

    def score(self, batch: Batch, directions: MegatronTargetDirections) -> tuple[Tensor, Tensor]:
        """A batch of n samples -> ([n, S] inner products with each direction, [n] squared norms)."""
        layers = {
            shard.name: LayerOperands(
                partial(directions.for_layer, shard.name), partial(self._moments, shard) if self.adam else None
            )
            for shard in self.shards
        }
        return self._score_pass(layers, batch, len(directions))

    def _moments(self, shard: LinearShard) -> Any:
        assert self.moments is not None
        moments = self.moments
        return self.cache.get(shard.name, lambda _name: moments(shard.weight), 8 * shard.weight.numel())

    def _score_pass(self, layers: dict[str, LayerOperands], batch: Batch, directions: int) -> tuple[Tensor, Tensor]:
        """Forward and activation gradients only, then the sum over all shards of the model."""
        runner = self.runner
        with cpu.cuda_calls_on_cpu(), self._evaluating(_mark_graph_entry), _weights_frozen(runner.model_chunks):
            total, first = self._sample_slots(len(batch.sample_ids))
            ones = torch.ones(len(batch.sample_ids), device=runner.device)
            micro_batches, by_token = self._micro_batches(batch, ones)
            spans = [
                MicroBatchSpans.from_segment_ids(torch.where(m.segment_ids >= 0, m.segment_ids + first, -1))
                for m in micro_batches
            ]
            sums = DotAndNormSums.zeros(total, directions, runner.device)
            with MegatronGradientHooks(self.shards, layers, spans, sums) as hooks:
                runner.forward_backward(micro_batches, _loss(by_token), forward_only=False, observer=hooks)
        whole = torch.cat([sums.dot, sums.norm2.unsqueeze(1)], dim=1)
        group: Any = None if runner.layout.expert > 1 else parallel_state.get_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(whole, group=group)
        of_batch = whole[first : first + len(batch.sample_ids)]
        return of_batch[:, :-1], of_batch[:, -1]

    def _sample_slots(self, samples: int) -> tuple[int, int]:
        """(number of sample slots, the first slot of this rank). Where experts are split over data-parallel ranks, a rank
        adds to samples of the others too."""
        if self.runner.layout.expert == 1:
            return samples, 0
        parallel_info = self.runner.parallel_info
        most = int(self.runner.collectives.all_gather(torch.tensor([samples])).amax())
        return most * parallel_info.dp_size, most * parallel_info.dp_rank

    def _micro_batches(self, batch: Batch, weights: Tensor) -> tuple[list[Batch], list[Tensor]]:
        """A batch for the schedule: micro-batches, equally many on all data-parallel ranks, and the [b, S] weights
        of their tokens."""
        runner = self.runner
        batch = batch.to(runner.device)
        by_token = objective.mean_weights(weights, batch)
        whole = runner.equalize_shapes([batch])[0]
        rows = len(whole.input_ids)
        if runner.parallel_info.dp_size > 1:
            rows = int(runner.collectives.all_gather(torch.tensor([rows])).amax())
            whole = batches.pad_to_shape([whole], rows, whole.input_ids.shape[1])[0]
        each = self.micro_batch_rows if runner.layout.pipeline > 1 else rows
        micro_batches = batches.split_rows(whole, each, runner.layout.pipeline if runner.layout.interleaved > 1 else 1)
        padded = by_token.new_zeros(each * len(micro_batches), whole.input_ids.shape[1])
        padded[: by_token.shape[0], : by_token.shape[1]] = by_token
        return micro_batches, list(padded.split(each))

    @contextmanager
    def _evaluating(self, at_embeddings: Any) -> Iterator[None]:
        """Dropout and megatron-core's reductions off, and a hook on the embeddings' output."""
        runner, config = self.runner, self.runner.config
        saved = {name: getattr(config, name) for name in REDUCTION_HOOKS}
        with runner.gathered_parameters(), ExitStack() as stack:
            for chunk in runner.model_chunks:
                model = unwrap(chunk)
                stack.enter_context(chunk.no_sync())
                if model.pre_process:
                    stack.callback(model.embedding.register_forward_hook(at_embeddings).remove)
            try:
                for name in REDUCTION_HOOKS:
                    setattr(config, name, None)
                with runner.evaluation_mode(recompute=True):
                    yield
            finally:
                for name, value in saved.items():
                    setattr(config, name, value)


def check_layout(runner: MegatronModelRunner) -> None:
    """Raises ConfigError for a layout or precision without gradient scores."""
    config, layout = runner.config, runner.layout
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


def _replicas(shard: LinearShard) -> Any:
    """The data-parallel ranks that hold the same shard."""
    if shard.moe_layer is not None:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group()


@contextmanager
def _weights_frozen(chunks: Sequence[Any]) -> Iterator[None]:
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
    """For `MegatronModelRunner.forward_backward`: the sum of weighted token losses."""

    def loss(number: int, _batch: Batch, _embeddings: Tensor | None, losses: TokenLosses) -> ScheduleLoss:
        total = (losses.trained * by_token[number]).sum()
        return total, torch.ones((), dtype=torch.int, device=total.device), {}

    return loss


def _zero_embedding_grad(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Hook of the embeddings: nothing flows back into their weight."""
    if output.requires_grad:
        output.register_hook(torch.zeros_like)


def _mark_graph_entry(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """Hook of the embeddings: with all weights frozen, their output is where the backward pass ends."""
    return output.detach().requires_grad_(True)
