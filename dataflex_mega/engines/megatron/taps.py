"""Hooks on megatron-core's linear layers that add each sample's part of the gradient scores; see signals.gradients.

What a layer sees is [S, b, hidden]. Tensor parallelism cuts the weight, so a rank's tile is its own part of the gradient and
inner products and squared norms of the parts add up. With sequence parallelism the inputs of a column-parallel layer and the
output gradients of a row-parallel one are parts of the sequence, and are gathered first: a square of a sum over positions is
not a sum of squares. Experts see rows that came from anywhere; their samples are found by sending sample numbers through the
same dispatcher as the tokens.
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

from dataflex_mega.engines.megatron.checkpoint import bare
from dataflex_mega.signals.gradients import Layer, Span, Sums, add_layer, spans


@dataclass(frozen=True)
class Part:
    """This rank's part of one linear layer's weight."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    experts: Any = None  # the layer's MoELayer when this is one of its experts
    number: int = 0  # of the expert among this rank's

    @property
    def splits_outputs(self) -> bool:
        """Whether tensor parallelism cuts d_out; else d_in."""
        return isinstance(self.module, ColumnParallelLinear)


def parts_of(chunks: Sequence[Any]) -> list[Part]:
    """The linear layers that train of this rank's chunks, experts' included; routers are left out."""
    found = []
    for number, chunk in enumerate(chunks):
        model = bare(chunk)
        owners = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
        for name, module in model.named_modules():
            if not isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                continue
            weight = module.weight if module.weight is not None else model.shared_embedding_or_output_weight()
            layer, inside, rest = name.partition(".experts.local_experts.")
            experts, expert = (owners[layer], int(rest.partition(".")[0])) if inside else (None, 0)
            if weight.requires_grad:
                found.append(Part(f"{number}/{name}", module, weight, experts, expert))
    return found


@dataclass(frozen=True)
class Micro:
    """A micro-batch as taps see it."""

    where: list[Span]
    samples: Tensor  # [S, b] the sample at each position, -1 on padding

    @staticmethod
    def of(segment: Tensor) -> Micro:
        """[b, S] -> the same by sample and in megatron-core's order."""
        return Micro(spans(segment), segment.t().contiguous())


@dataclass
class Taps:
    """Listens inside `with`. `begin` and `end` are called around each micro-batch's forward pass.

    Which micro-batch a layer is at is known at its forward pass: the one that `begin` named last. Backward passes of a
    pipeline come later and in another order, and a recomputed forward pass runs inside one; so when gradients reach the
    output of a chunk, its micro-batch becomes the present one again.
    """

    parts: Sequence[Part]
    layers: Mapping[str, Layer]
    micros: Sequence[Micro]
    sums: Sums
    _now: int = field(default=0, init=False)
    _rows: dict[int, Sequence[Tensor]] = field(
        default_factory=dict, init=False
    )  # of an MoELayer's experts: their samples
    _hooks: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Taps:
        for part in self.parts:
            self._keep(part.module.register_forward_hook(self._tap(part)))
        for experts in {id(part.experts): part.experts for part in self.parts if part.experts is not None}.values():
            self._keep(experts.router.register_forward_hook(self._follow(experts)))
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def _keep(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def begin(self, number: int) -> None:
        """The micro-batch that layers will see next."""
        self._now = number

    def end(self, number: int, output: Tensor) -> None:
        """`output`: of a chunk for that micro-batch."""
        if output.requires_grad:
            output.register_hook(lambda _grad: self.begin(number))

    def _tap(self, part: Part) -> Callable[..., None]:
        def after_forward(_module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
            if not output[0].requires_grad:  # the first of two forward passes under activation recomputation
                return
            inputs = args[0].detach()
            if part.experts is None:
                where = self.micros[self._now].where
                output[0].register_hook(lambda grad: self._add(part, inputs, grad.detach(), where))
            else:
                rows = self._rows[id(part.experts)][part.number]
                output[0].register_hook(lambda grad: self._add_rows(part, inputs, grad.detach(), rows))

        return after_forward

    @torch.no_grad()
    def _add(self, part: Part, inputs: Tensor, grads: Tensor, where: list[Span]) -> None:
        """[S, b, d_in] and [S, b, d_out]; one of them a part of the sequence under sequence parallelism."""
        if part.module.sequence_parallel and part.splits_outputs:
            inputs = gather_from_sequence_parallel_region(inputs)
        elif part.module.sequence_parallel:
            grads = gather_from_sequence_parallel_region(grads)
        add_layer(self.sums, self.layers[part.name], inputs.transpose(0, 1), grads.transpose(0, 1), where)

    @torch.no_grad()
    def _add_rows(self, part: Part, inputs: Tensor, grads: Tensor, rows: Tensor) -> None:
        """[r, d_in] and [r, d_out] of one expert, [r] the sample of each row."""
        order = torch.argsort(rows, stable=True)
        where = spans(rows[order].unsqueeze(0))
        add_layer(self.sums, self.layers[part.name], inputs[order].unsqueeze(0), grads[order].unsqueeze(0), where)

    def _follow(self, experts: Any) -> Callable[..., None]:
        def after_routing(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
            self._rows[id(experts)] = self._routed(experts, *output)

        return after_routing

    @torch.no_grad()
    def _routed(self, experts: Any, probs: Tensor, routing_map: Tensor) -> Sequence[Tensor]:
        """For each expert of this rank, the samples of the rows it will see."""
        samples = self.micros[self._now].samples
        if experts.config.sequence_parallel:
            size, rank = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            samples = samples.chunk(size)[rank]
        dispatcher = experts.token_dispatcher
        rows, probs = dispatcher.dispatch_preprocess(samples.float().unsqueeze(-1), routing_map, probs)
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows, counts, _ = dispatcher.dispatch_postprocess(rows, probs)
        return rows[:, 0].round().long().split(counts.tolist())
