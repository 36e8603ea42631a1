"""Hooks on megatron-core's linear layers that add each sample's gradient to its scores; see signals.per_sample_gradients.

What a layer sees is [S, b, hidden]. Tensor parallelism splits the weight, so a rank's tile is its own shard of the gradient
and inner products and squared norms of the shards add up. With sequence parallelism the inputs of a column-parallel layer
and the output gradients of a row-parallel one are shards of the sequence, and are gathered first: a square of a sum over
positions is not a sum of squares. Experts see rows that came from anywhere; their samples are found by sending sample
numbers through the same dispatcher as the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from dataflex_mega.engines.megatron.wrapping import unwrap
from dataflex_mega.signals.per_sample_gradients import (
    DotAndNormSums,
    LayerOperands,
    SampleSpan,
    accumulate_layer,
    sample_spans,
)


@dataclass(frozen=True)
class LinearShard:
    """This rank's shard of one linear layer's weight."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    moe_layer: Any = None  # the layer's MoELayer when this is one of its experts
    expert_index: int = 0  # among this rank's experts

    @property
    def splits_d_out(self) -> bool:
        """Whether tensor parallelism splits d_out; else d_in."""
        return isinstance(self.module, ColumnParallelLinear)


def linear_shards(chunks: Sequence[Any]) -> list[LinearShard]:
    """The trained linear layers of this rank's chunks, experts' included; routers are left out."""
    shards = []
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        moe_layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
        for name, module in model.named_modules():
            if not isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                continue
            weight = module.weight if module.weight is not None else model.shared_embedding_or_output_weight()
            layer, is_expert, rest = name.partition(".experts.local_experts.")
            moe_layer, expert = (moe_layers[layer], int(rest.partition(".")[0])) if is_expert else (None, 0)
            if weight.requires_grad:
                shards.append(LinearShard(f"{number}/{name}", module, weight, moe_layer, expert))
    return shards


@dataclass(frozen=True)
class MicroBatchSpans:
    """The samples of a micro-batch by span and by position."""

    spans: list[SampleSpan]
    samples: Tensor  # [S, b] the sample at each position, -1 on padding

    @staticmethod
    def from_segment_ids(segment_ids: Tensor) -> MicroBatchSpans:
        """[b, S] -> the same by sample and in megatron-core's order."""
        return MicroBatchSpans(sample_spans(segment_ids), segment_ids.t().contiguous())


@dataclass
class MegatronGradientHooks:
    """Records inside `with`, as the observer of MegatronModelRunner.forward_backward.

    Which micro-batch a layer is at is known at its forward pass: the one that `before_micro_batch` named last. Backward
    passes of a pipeline come later and in another order, and a recomputed forward pass runs inside one; so when gradients
    reach the output of a chunk, its micro-batch becomes the current one again.
    """

    shards: Sequence[LinearShard]
    layers: Mapping[str, LayerOperands]
    micro_batches: Sequence[MicroBatchSpans]
    sums: DotAndNormSums
    _current: int = field(default=0, init=False)
    # id of an MoELayer -> for each of its local experts, the sample of each row
    _rows: dict[int, Sequence[Tensor]] = field(default_factory=dict, init=False)
    _hooks: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> MegatronGradientHooks:
        for shard in self.shards:
            self._add_handle(shard.module.register_forward_hook(self._forward_hook(shard)))
        moe_layers = {id(shard.moe_layer): shard.moe_layer for shard in self.shards if shard.moe_layer is not None}
        for moe_layer in moe_layers.values():
            self._add_handle(moe_layer.router.register_forward_hook(self._router_hook(moe_layer)))
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def _add_handle(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def before_micro_batch(self, number: int) -> None:
        """`number`: the micro-batch that layers will see next."""
        self._current = number

    def after_micro_batch(self, number: int, output: Tensor) -> None:
        """`output`: of a chunk for that micro-batch."""
        if output.requires_grad:
            output.register_hook(lambda _grad: self.before_micro_batch(number))

    def _forward_hook(self, shard: LinearShard) -> Callable[..., None]:
        def after_forward(_module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
            if not output[0].requires_grad:  # the first of two forward passes under activation recomputation
                return
            inputs = args[0].detach()
            if shard.moe_layer is None:
                spans = self.micro_batches[self._current].spans
                output[0].register_hook(lambda grad: self._add(shard, inputs, grad.detach(), spans))
            else:
                rows = self._rows[id(shard.moe_layer)][shard.expert_index]
                output[0].register_hook(lambda grad: self._add_rows(shard, inputs, grad.detach(), rows))

        return after_forward

    @torch.no_grad()
    def _add(self, shard: LinearShard, inputs: Tensor, grads: Tensor, spans: list[SampleSpan]) -> None:
        """[S, b, d_in] and [S, b, d_out]; one of them a shard of the sequence under sequence parallelism."""
        if shard.module.sequence_parallel and shard.splits_d_out:
            inputs = gather_from_sequence_parallel_region(inputs)
        elif shard.module.sequence_parallel:
            grads = gather_from_sequence_parallel_region(grads)
        accumulate_layer(self.sums, self.layers[shard.name], inputs.transpose(0, 1), grads.transpose(0, 1), spans)

    @torch.no_grad()
    def _add_rows(self, shard: LinearShard, inputs: Tensor, grads: Tensor, rows: Tensor) -> None:
        """[r, d_in] and [r, d_out] of one expert, [r] the sample of each row."""
        order = torch.argsort(rows, stable=True)
        spans = sample_spans(rows[order].unsqueeze(0))
        accumulate_layer(
            self.sums, self.layers[shard.name], inputs[order].unsqueeze(0), grads[order].unsqueeze(0), spans
        )

    def _router_hook(self, moe_layer: Any) -> Callable[..., None]:
        def after_routing(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
            self._rows[id(moe_layer)] = self._samples_per_expert(moe_layer, *output)

        return after_routing

    @torch.no_grad()
    def _samples_per_expert(self, moe_layer: Any, probs: Tensor, routing_map: Tensor) -> Sequence[Tensor]:
        """For each expert of this rank, the samples of the rows it will see."""
        samples = self.micro_batches[self._current].samples
        if moe_layer.config.sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            samples = samples.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        dispatcher = moe_layer.token_dispatcher
        rows, probs = dispatcher.dispatch_preprocess(samples.float().unsqueeze(-1), routing_map, probs)
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows, counts, _ = dispatcher.dispatch_postprocess(rows, probs)
        return rows[:, 0].round().long().split(counts.tolist())
