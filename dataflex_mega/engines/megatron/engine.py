"""The Megatron engine: megatron-core's schedules, buckets and optimizer around our weighted objective."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dataflex_mega import objective
from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.distributed.mesh import Mesh
from dataflex_mega.engines.megatron import batches, checkpoint, cpu, gram
from dataflex_mega.engines.megatron import process_groups as processes
from dataflex_mega.engines.megatron.context import Context
from dataflex_mega.engines.megatron.hidden import Listener
from dataflex_mega.engines.megatron.layout import Layout
from dataflex_mega.engines.megatron.lr_adapter import Rates
from dataflex_mega.engines.megatron.routers import Routers
from dataflex_mega.engines.options import Options
from dataflex_mega.engines.stats import StepSums
from dataflex_mega.errors import NotFinite
from dataflex_mega.types import IGNORED, Batch, HiddenSpec, SampleObs, StepStats, Weigh

# A forward-only pass cuts its batch into that many micro-batches for each stage: stages wait for 1 part in 4, or less.
PARTS_A_STAGE = 4


@dataclass
class MegatronEngine:
    """Implements engines.base.Engine."""

    chunks: list[Any]  # this stage's parts of the model, wrapped in megatron-core's DistributedDataParallel
    optimizer: Any  # megatron-core's
    rates: Rates
    mesh: Mesh
    layout: Layout
    options: Options
    micro_rows: int  # rows of a micro-batch of gradient scores; what a training step has room for
    writer: Any = None  # see export.py: what is needed to write the model in Hugging Face layout
    collectives: Collectives = field(init=False)

    def __post_init__(self) -> None:
        self.collectives = Collectives(self.mesh)
        self.config = self.chunks[0].config
        self.context = Context.current()
        self.last = processes.is_last_stage()
        self.listener = Listener(self.chunks, self.layout, self.context)
        self.routers = Routers(self.chunks, self.layout) if self.options.loads else None
        self._gathers = False  # whether parameters are gathered by hooks of the forward pass
        self._connect()
        self.mode(training=True)

    def _connect(self) -> None:
        """Tell megatron-core's schedules about reductions and the loss scale."""
        ddp = self.chunks[0].ddp_config
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if ddp.overlap_grad_reduce:
            pauses = [chunk.no_sync for chunk in self.chunks]
            starts = [chunk.start_grad_sync for chunk in self.chunks]
            self.config.no_sync_func = pauses[0] if len(pauses) == 1 else pauses
            self.config.grad_sync_func = starts[0] if len(starts) == 1 else starts
        if ddp.overlap_param_gather:  # nothing is to be gathered before the first step
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=False)

    # -- training ------------------------------------------------------------------------------------------------

    def train_step(self, micros: Sequence[Batch], weigh: Weigh | None) -> StepStats:
        """See engines.base.Engine."""
        with cpu.redirected():
            micros = self.same_shape([batch.to(self.mesh.device) for batch in micros])
            loads = None if self.routers is None else self.routers.zeros(self.options.domains, self.mesh.device)
            sums = StepSums(self.options.domains, self.mesh.device, loads)
            step = _Step(self.options, sums, weigh, self._denominators(micros), self.collectives)
            if weigh is not None and self.options.lookahead == "exact" and len(micros) > 1:
                step.ahead = self._weights_of_step(micros, weigh, step.counts)
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            with self.routers.into(loads) if self.routers and loads else contextlib.nullcontext():
                self.run(micros, step.loss, False, self.options.hidden if weigh and step.ahead is None else None)
            grad_norm = self._update(sums)
            return sums.reduce(self.collectives, grad_norm, weigh is not None)

    def _counting(self, model: Any, batch: Batch) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.routers is None else self.routers.counting(model, batch)

    def _denominators(self, micros: Sequence[Batch]) -> Tensor:
        """[k] float64: each domain's part of the loss denominator, over all micro-batches and ranks."""
        k, normalization = self.options.domains, self.options.normalization
        return self.collectives.sum(torch.stack([objective.domain_counts(b, k, normalization) for b in micros]).sum(0))

    def same_shape(self, micros: Sequence[Batch]) -> list[Batch]:
        """One shape for all micro-batches of this step; with experts shared over data-parallel ranks, for theirs too."""
        multiple = self.layout.length_multiple
        size = torch.tensor([[len(batch.input_ids), batch.input_ids.shape[1]] for batch in micros]).amax(0)
        if self.layout.expert > 1:
            size = self.collectives.gather(size.unsqueeze(0)).amax(0)
        elif self.layout.pipeline == 1 or self.config.variable_seq_lengths:
            widths = [-(-batch.input_ids.shape[1] // multiple) * multiple for batch in micros]
            return [batches.level([b], len(b.input_ids), w)[0] for b, w in zip(micros, widths, strict=True)]
        rows, width = size.tolist()
        return batches.level(micros, rows, -(-width // multiple) * multiple)

    def run(
        self, micros: Sequence[Batch], loss: Any, forward_only: bool, spec: HiddenSpec | None = None, watch: Any = None
    ) -> None:
        """One pass of megatron-core's schedule. On the last stage `loss(number, batch, vectors, [b, S] token losses)` is
        called; vectors are the samples' [n, h] when `spec` asks for them. `watch` is told before and after each forward
        pass of a micro-batch through a chunk; see taps.Taps."""

        def forward(source: Iterator[tuple[int, Batch]], model: Any) -> tuple[Tensor, Any]:
            number, batch = next(source)
            part, rows = self.context.share(batch)
            mask = batches.closed(batch.segment, rows) if batch.packed else None
            if watch is not None:
                watch.begin(number)
            with self.listener.listening(model, spec) as heard, self._counting(model, part):
                output = model(part.input_ids, part.position_ids, mask, labels=part.labels.clamp(min=0))
            if watch is not None:
                watch.end(number, output)
            vectors = self.listener.vectors(heard, batch, spec)
            return output, partial(self._with_whole_rows, partial(loss, number, batch, vectors))

        sources = [iter(list(enumerate(micros))) for _ in self.chunks]
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=sources if len(sources) > 1 else sources[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micros),
            seq_length=micros[0].input_ids.shape[1],
            micro_batch_size=len(micros[0].input_ids),
            forward_only=forward_only,
        )

    def _with_whole_rows(self, loss: Any, part: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """`loss` of the token losses of all ranks that share the rows; what it is divided by counts once for all of them."""
        total, count, logs = loss(self.context.whole(part))
        return total, count if self.context.rank == 0 else torch.zeros_like(count), logs

    def _weights_of_step(
        self, micros: Sequence[Batch], weigh: Weigh, counts: Tensor
    ) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weights of samples, and of tokens if any, from a forward pass over all micro-batches with the dropout masks that
        training will draw. None on stages that see no losses."""
        state = self.rng_state()
        passed = self._passed(micros, self.options.hidden)
        self.set_rng_state(state)
        if not self.last:
            return None
        parts = [(loss, batch) for (loss, _), batch in zip(passed, micros, strict=True)]
        seen = [
            objective.observe(objective.sample_sums(loss, batch), batch, hidden=vectors)
            for (loss, vectors), batch in zip(passed, micros, strict=True)
        ]
        by_sample = weigh(SampleObs.joined(seen, counts)).split([len(obs.sample_id) for obs in seen])
        by_token = objective.token_weights(parts, weigh, self.collectives.sum) or [None] * len(micros)
        return list(zip(by_sample, by_token, strict=True))

    def _passed(self, micros: Sequence[Batch], spec: HiddenSpec | None) -> list[tuple[Tensor, Tensor | None]]:
        """([b, S] token losses, [n, h] vectors if asked for) of each micro-batch, on the last stage; elsewhere nothing."""
        found: list[tuple[Tensor, Tensor | None]] = []

        def keep(
            _number: int, batch: Batch, vectors: Tensor | None, losses: Tensor
        ) -> tuple[Tensor, Tensor, dict[str, Any]]:
            found.append((targets_only(losses, batch.labels), vectors))
            return losses.sum(), torch.ones((), dtype=torch.int, device=losses.device), {}

        with torch.no_grad(), self.parameters_whole():
            self.run(micros, keep, True, spec)
        return found

    # -- the update ----------------------------------------------------------------------------------------------

    def _update(self, sums: StepSums) -> float:
        """Clip and step -> the gradient norm before clipping. A step that is not finite changes nothing."""
        overflow = self.optimizer.prepare_grads()
        norm = math.inf if overflow else float(self.optimizer.get_grad_norm() or 0.0)
        finite = math.isfinite(norm)
        bad = [] if finite else self._not_finite(sums)
        if finite:
            self._clip(norm)
            self.optimizer.step_with_ready_grads()
            self._gather_in_forward()
        elif self.options.on_nan == "stop" and (bad or not self.config.fp16):
            what = "the loss is not finite" if bad else f"every loss is finite but the gradient norm is {norm}"
            raise NotFinite(what, bad)
        self.rates.step()
        return norm

    def _clip(self, norm: float) -> None:
        if self.options.max_grad_norm <= 0:
            return
        for optimizer in self.optimizer.chained_optimizers:
            parameters = optimizer.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.options.max_grad_norm, total_norm=norm)

    def _not_finite(self, sums: StepSums) -> list[int]:
        """Ids of the step's samples, of all ranks, whose loss is not finite."""
        return sorted({i for ids in self.collectives.gather_objects(sums.not_finite()) for i in ids})

    def gradient_gram(self, groups: list[list[Batch]]) -> Tensor:
        """See gram.gradient_gram."""
        return gram.gradient_gram(self, groups)

    # -- parameters that are gathered while the forward pass runs ------------------------------------------------

    def _gather_in_forward(self) -> None:
        """From the first update on, hooks of the forward pass wait for the gathering of updated parameters."""
        if self.chunks[0].ddp_config.overlap_param_gather and not self._gathers:
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()
            self._gathers = True

    @contextlib.contextmanager
    def parameters_whole(self) -> Iterator[None]:
        """Gather updated parameters now, and leave the hooks off inside."""
        if not self._gathers:
            yield
            return
        for chunk in self.chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()

    # -- forward only --------------------------------------------------------------------------------------------

    def sample_losses(self, batch: Batch) -> SampleObs:
        """See engines.base.Engine. Where there is a pipeline, the batch goes through it in micro-batches."""
        batch = batch.to(self.mesh.device)
        with cpu.redirected():
            found = self._evaluated(batch, None)
            loss_sum = torch.zeros(len(batch.sample_id), device=self.mesh.device)
            if self.last:
                rows, width = batch.input_ids.shape
                loss_sum = objective.sample_sums(torch.cat([loss for loss, _ in found])[:rows, :width], batch)
            return objective.observe(self._from_last_stage(loss_sum), batch)

    def embed(self, batch: Batch, *specs: HiddenSpec) -> Tensor:
        """See engines.base.Engine. Where there is a pipeline, the batch goes through it in micro-batches."""
        batch = batch.to(self.mesh.device)
        with cpu.redirected():
            return torch.cat([self._embed(batch, spec) for spec in specs], dim=1)

    def _embed(self, batch: Batch, spec: HiddenSpec) -> Tensor:
        found = self._evaluated(batch, spec)
        vectors = torch.zeros(len(batch.sample_id), self.config.hidden_size, device=self.mesh.device)
        # Each micro-batch knows all samples of the batch, and adds what it has of them.
        for _, part in found if self.last else ():
            assert part is not None
            vectors += part
        return self._from_last_stage(vectors)

    @property
    def depth(self) -> int:
        """See engines.base.Engine."""
        return self.config.num_layers

    def _evaluated(self, batch: Batch, spec: HiddenSpec | None) -> list[tuple[Tensor, Tensor | None]]:
        """`_passed` of a batch in evaluation mode, cut into micro-batches where there is a pipeline."""
        self.mode(training=False)
        whole = self.same_shape([batch])[0]
        count = PARTS_A_STAGE * self.layout.pipeline if self.layout.pipeline > 1 else 1
        multiple = self.layout.pipeline if self.layout.interleaved > 1 else 1
        found = self._passed(batches.cut(whole, -(-len(whole.input_ids) // count), multiple), spec)
        self.mode(training=True)
        return found

    def _from_last_stage(self, values: Tensor) -> Tensor:
        """What the last stage has, on every stage of this rank's pipeline."""
        if self.layout.pipeline == 1:
            return values
        return processes.sum_over_pipeline(values)

    def mode(self, training: bool) -> None:
        """Training or evaluation, of all chunks."""
        for chunk in self.chunks:
            chunk.train(training)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """This stage's first chunk, for callbacks."""
        return checkpoint.bare(self.chunks[0])

    @property
    def scheduler(self) -> Any:
        """The learning-rate schedule, for callbacks."""
        return self.rates.schedule

    def learning_rate(self) -> float:
        """See engines.base.Engine."""
        return self.rates.now

    def save_state(self, folder: Path) -> None:
        """See engines.base.Engine."""
        with cpu.redirected(), self.parameters_whole():
            checkpoint.save(self, folder)

    def load_state(self, folder: Path) -> None:
        """See engines.base.Engine."""
        with cpu.redirected(), self.parameters_whole():
            checkpoint.load(self, folder)

    def export(self, folder: Path) -> None:
        """See engines.base.Engine."""
        with cpu.redirected(), self.parameters_whole():
            self.writer(self.chunks, folder)

    def rng_state(self) -> dict[str, Tensor]:
        """See engines.base.Engine."""
        with cpu.redirected():
            return processes.rng_state()

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        """See engines.base.Engine."""
        with cpu.redirected():
            processes.set_rng_state(state)


def targets_only(losses: Tensor, labels: Tensor) -> Tensor:
    """[b, S] token losses, 0 where there is no target."""
    return torch.where(labels == IGNORED, 0.0, losses.float())


@dataclass
class _Step:
    """What one training step knows while its micro-batches pass the last stage."""

    options: Options
    sums: StepSums
    weigh: Weigh | None
    counts: Tensor  # [k] the step's denominator by domain: target tokens or samples, over all data-parallel ranks
    collectives: Collectives
    ahead: list[tuple[Tensor, Tensor | None]] | None = None  # weights from a look-ahead pass, a micro-batch each

    def loss(
        self, number: int, batch: Batch, vectors: Tensor | None, losses: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Token losses -> (weighted sum to differentiate, what it is a sum over, nothing to log).

        megatron-core divides gradients by the total of the second at the end of the step.
        """
        losses = targets_only(losses, batch.labels)
        obs = objective.observe(objective.sample_sums(losses, batch), batch, losses, self.counts, vectors)
        weights, by_token = self._weights(number, obs, batch, losses)
        loss_sum = objective.sample_sums(losses if by_token is None else losses * by_token, batch)
        total = objective.weighted_loss(loss_sum, obs.tokens, weights, 1.0, self.options.normalization)
        self.sums.add(obs, batch, total.detach() / self.counts.sum().clamp(min=1), weights)
        return total, objective.local_count(batch, self.options.normalization).int(), {}

    def _weights(
        self, number: int, obs: SampleObs, batch: Batch, losses: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """([n] weights of samples, [b, S] weights of tokens) of one micro-batch; None where all weigh the same."""
        if self.ahead is not None:
            return self.ahead[number]
        if self.weigh is None:
            return None, None
        by_token = objective.token_weights([(losses, batch)], self.weigh, self.collectives.sum)
        return self.weigh(obs), None if by_token is None else by_token[0]
