"""megatron-core's chunks of one process in their layout: schedules, mode, shapes and random state. No optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.megatron import batches, cpu, process_groups
from dataflex_mega.engines.megatron.context import ContextParallel
from dataflex_mega.engines.megatron.gradient_hooks import MegatronGradientHooks
from dataflex_mega.engines.megatron.hidden_states import HiddenStateCapture
from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.engines.megatron.routers import MegatronRouterCounter
from dataflex_mega.engines.megatron.wrapping import unwrap
from dataflex_mega.losses.base import LossForm, TokenLosses
from dataflex_mega.types import IGNORE_INDEX, Batch, EmbeddingSpec

# A forward-only pass cuts its batch into that many micro-batches for each stage: stages wait for 1 part in 4, or less.
MICRO_BATCHES_PER_STAGE = 4

ScheduleLoss = tuple[Tensor, Tensor, dict[str, Any]]  # what megatron-core's schedules take: loss, its count, a log
LossFn = Callable[[int, Batch, Tensor | None, TokenLosses], ScheduleLoss]
"""(number of the micro-batch, the micro-batch, [n, h] embeddings or None, float32 token losses) -> ScheduleLoss.
megatron-core divides gradients by the total of the counts at the end of the pass."""


@dataclass
class MegatronModelRunner:
    """This process's part of a model.

    Attributes:
        model_chunks: this stage's chunks, wrapped in megatron-core's DistributedDataParallel.
        count_router_loads: whether routers are counted while `routers` is recording.
        loss_form: what passes with a gradient differentiate of a token; None: its cross-entropy.
    """

    model_chunks: list[Any]
    parallel_info: ParallelInfo
    layout: MegatronLayout
    count_router_loads: bool = False
    loss_form: LossForm | None = None
    collectives: TorchCollectives = field(init=False)

    def __post_init__(self) -> None:
        self.collectives = TorchCollectives(self.parallel_info)
        self.config = self.model_chunks[0].config
        self.context = ContextParallel.current()
        self.is_last_stage = process_groups.is_last_pipeline_stage()
        self.hidden_states = HiddenStateCapture(self.layout, self.context)
        self.routers = MegatronRouterCounter(self.model_chunks, self.layout) if self.count_router_loads else None
        self._gathers_in_forward = False
        self.set_training(True)

    @property
    def model(self) -> Any:
        """The first model chunk of this pipeline stage."""
        return unwrap(self.model_chunks[0])

    @property
    def device(self) -> torch.device:
        """The device of this process's batches."""
        return self.parallel_info.device

    # -- mode ----------------------------------------------------------------------------------------------------

    def set_training(self, training: bool) -> None:
        """Training or evaluation mode, of all chunks."""
        for chunk in self.model_chunks:
            chunk.train(training)

    @contextlib.contextmanager
    def evaluation_mode(self, recompute: bool = False) -> Iterator[None]:
        """Dropout off inside. `recompute`: activations are still recomputed in a backward pass, if the run does so."""
        self.set_training(False)
        if recompute:
            for chunk in self.model_chunks:
                unwrap(chunk).decoder.training = True
        try:
            yield
        finally:
            self.set_training(True)

    # -- passes --------------------------------------------------------------------------------------------------

    def equalize_shapes(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """One shape for all micro-batches of a pass; with experts shared over data-parallel ranks, for theirs too."""
        multiple = self.layout.length_multiple
        size = torch.tensor([[len(batch.input_ids), batch.input_ids.shape[1]] for batch in micro_batches]).amax(0)
        if self.layout.expert > 1:
            size = self.collectives.all_gather(size.unsqueeze(0)).amax(0)
        elif self.layout.pipeline == 1 or self.config.variable_seq_lengths:
            widths = [-(-batch.input_ids.shape[1] // multiple) * multiple for batch in micro_batches]
            return [
                batches.pad_to_shape([batch], len(batch.input_ids), width)[0]
                for batch, width in zip(micro_batches, widths, strict=True)
            ]
        rows, width = size.tolist()
        return batches.pad_to_shape(micro_batches, rows, -(-width // multiple) * multiple)

    def forward_backward(
        self,
        micro_batches: Sequence[Batch],
        loss_fn: LossFn,
        forward_only: bool,
        spec: EmbeddingSpec | None = None,
        observer: MegatronGradientHooks | None = None,
    ) -> None:
        """One pass of megatron-core's schedule; the last stage calls `loss_fn`. `spec`: the embeddings it gets; `observer`:
        learns when a micro-batch enters and leaves a chunk."""

        def forward(source: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Any]:
            number, batch = next(source)
            shard, positions = self.context.shard(batch)
            mask = batches.blocked_mask(batch.segment_ids, positions) if batch.is_packed else None
            if observer is not None:
                observer.before_micro_batch(number)
            with self.hidden_states.capture(chunk, spec) as captured, self._counting(chunk, shard):
                output = chunk(shard.input_ids, shard.position_ids, mask, labels=shard.labels.clamp(min=0))
            if observer is not None:
                observer.after_micro_batch(number, output)
            embeddings = self.hidden_states.embeddings(captured, batch, spec)
            return output, partial(self._loss_of_whole_rows, loss_fn, number, batch, embeddings)

        for chunk in self.model_chunks:
            unwrap(chunk).loss_form = None if forward_only else self.loss_form
        self._run_schedule(forward, micro_batches, forward_only)

    def _loss_of_whole_rows(
        self, loss_fn: LossFn, number: int, batch: Batch, embeddings: Tensor | None, losses: Tensor
    ) -> ScheduleLoss:
        """`loss_fn` of the token losses of all context-parallel ranks; its count is counted once for all of them."""
        plain, *others = (self._of_whole_rows(part, batch) for part in (losses if losses.dim() == 3 else [losses]))
        total, count, log = loss_fn(number, batch, embeddings, TokenLosses(plain, *(others or [plain])))
        return total, count if self.context.rank == 0 else torch.zeros_like(count), log

    def _of_whole_rows(self, losses: Tensor, batch: Batch) -> Tensor:
        return torch.where(batch.labels == IGNORE_INDEX, 0.0, self.context.gather(losses).float())

    def forward_logits(self, micro_batches: Sequence[Batch], consume: Callable[[Batch, Tensor], None]) -> None:
        """A pass without gradient; the last stage calls `consume` with each micro-batch and its logits [b, S, V / TP],
        of this rank's shard of the padded vocabulary."""

        def forward(source: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Any]:
            _, batch = next(source)
            shard, positions = self.context.shard(batch)
            mask = batches.blocked_mask(batch.segment_ids, positions) if batch.is_packed else None
            return chunk(shard.input_ids, shard.position_ids, mask), partial(finish, batch)

        def finish(batch: Batch, logits: Tensor) -> ScheduleLoss:
            consume(batch, self.context.gather(logits))
            return logits.new_zeros(()), torch.ones((), dtype=torch.int, device=logits.device), {}

        with torch.no_grad(), self.gathered_parameters():
            self._run_schedule(forward, micro_batches, forward_only=True)

    def _run_schedule(self, forward: Any, micro_batches: Sequence[Batch], forward_only: bool) -> None:
        sources = [iter(list(enumerate(micro_batches))) for _ in self.model_chunks]
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=sources if len(sources) > 1 else sources[0],
            model=self.model_chunks if len(self.model_chunks) > 1 else self.model_chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].input_ids.shape[1],
            micro_batch_size=len(micro_batches[0].input_ids),
            forward_only=forward_only,
        )

    def _counting(self, chunk: Any, batch: Batch) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.routers is None else self.routers.counting(chunk, batch)

    def forward_losses(
        self, micro_batches: Sequence[Batch], spec: EmbeddingSpec | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """([b, S] token losses, [n, h] embeddings for `spec`) of each micro-batch on the last stage, else nothing."""
        results: list[tuple[Tensor, Tensor | None]] = []

        def collect(_number: int, _batch: Batch, embeddings: Tensor | None, losses: TokenLosses) -> ScheduleLoss:
            plain = losses.plain
            results.append((plain, embeddings))
            return plain.sum(), torch.ones((), dtype=torch.int, device=plain.device), {}

        with torch.no_grad(), self.gathered_parameters():
            self.forward_backward(micro_batches, collect, True, spec)
        return results

    def split_for_pipeline(self, batch: Batch) -> list[Batch]:
        """A batch as the micro-batches of a forward-only pass, several where there is a pipeline."""
        padded = self.equalize_shapes([batch])[0]
        count = MICRO_BATCHES_PER_STAGE * self.layout.pipeline if self.layout.pipeline > 1 else 1
        multiple = self.layout.pipeline if self.layout.interleaved > 1 else 1
        return batches.split_rows(padded, -(-len(padded.input_ids) // count), multiple)

    def from_last_stage(self, values: Tensor) -> Tensor:
        """The last stage's values on every stage of this rank's pipeline; the other stages pass zeros."""
        if self.layout.pipeline == 1:
            return values
        return process_groups.all_reduce_over_pipeline(values)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """[s, V / TP] of each tensor-parallel rank -> [s, V], without the padding of the vocabulary."""
        if self.layout.tensor > 1:
            shards = [torch.empty_like(logits) for _ in range(self.layout.tensor)]
            dist.all_gather(shards, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            logits = torch.cat(shards, dim=-1)
        return logits[..., : unwrap(self.model_chunks[-1]).real_vocab]

    # -- parameters that are gathered while the forward pass runs ------------------------------------------------

    def gather_in_forward(self) -> None:
        """From now on, hooks of the forward pass wait for the gathering of updated parameters, if the run overlaps it."""
        if self.model_chunks[0].ddp_config.overlap_param_gather and not self._gathers_in_forward:
            for chunk in self.model_chunks:
                chunk.enable_forward_pre_hook()
            self._gathers_in_forward = True

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """Gather updated parameters now, and leave the hooks off inside."""
        if not self._gathers_in_forward:
            yield
            return
        for chunk in self.model_chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in self.model_chunks:
                chunk.enable_forward_pre_hook()

    def zero_grad(self, optimizer: Any) -> None:
        """Clear the gradient buffers and the optimizer's views of them."""
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()  # after a step, a parameter's grad may be its part of the buffer

    # -- random state --------------------------------------------------------------------------------------------

    def rng_state(self) -> dict[str, Tensor]:
        """The generators of this process, megatron-core's named ones among them."""
        with cpu.cuda_calls_on_cpu():
            return process_groups.rng_state()

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `rng_state` returned."""
        with cpu.cuda_calls_on_cpu():
            process_groups.set_rng_state(state)
