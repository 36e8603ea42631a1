"""A Hugging Face model in its layout over processes: forward passes, mode, precision and random state. No optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import dataflex_mega.objective as objective
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.fsdp.hidden_states import capture_hidden_states
from dataflex_mega.engines.fsdp.masks import AttentionKinds
from dataflex_mega.engines.fsdp.parallel import FSDPLayout, unwrap
from dataflex_mega.signals.sample_embeddings import sample_embeddings
from dataflex_mega.types import Batch, EmbeddingSpec


@dataclass
class FSDPModelRunner:
    """`module` is what parallel.parallelize returned."""

    module: nn.Module
    layout: FSDPLayout
    parallel_info: ParallelInfo
    collectives: TorchCollectives = field(init=False)
    attention_kinds: AttentionKinds = field(init=False)

    def __post_init__(self) -> None:
        self.attention_kinds = AttentionKinds.of(getattr(self.model, "config", None))
        self.collectives = TorchCollectives(self.parallel_info)
        self.module.train()

    @property
    def model(self) -> Any:
        """The Hugging Face or PEFT model."""
        return unwrap(self.module)

    @property
    def device(self) -> torch.device:
        """The device of this process's batches."""
        return self.parallel_info.device

    # -- forward passes ------------------------------------------------------------------------------------------

    def logits(self, batch: Batch) -> Tensor:
        """[b, S, V] in the precision of the model's output layer, differentiable."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.is_packed:
            inputs["position_ids"] = batch.position_ids
            inputs["attention_mask"] = self.attention_kinds.mask(batch, self.layout.dtype)
        # Unpacked rows are padded on the right: under causal attention no token sees the padding, so no mask is needed.
        with self.autocast():
            return self.module(**inputs).logits

    def token_losses(self, batch: Batch) -> Tensor:
        """[b, S] float32, differentiable, 0 where there is no target."""
        return objective.token_losses(self.logits(batch), batch.labels)

    def forward(self, batch: Batch, spec: EmbeddingSpec | None) -> tuple[Tensor, Tensor | None]:
        """(token losses [b, S], differentiable; embeddings of the samples [n, h] for `spec`, without gradient)."""
        if spec is None:
            return self.token_losses(batch), None
        with capture_hidden_states(self.model, [spec.layer]) as captured:
            losses = self.token_losses(batch)
        return losses, sample_embeddings(captured[spec.layer], batch, spec)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of forward passes."""
        if self.layout.precision == "fp32" or self.layout.mode == "fsdp2":  # FSDP2 casts by its own policy
            yield
        else:
            with torch.autocast(self.device.type, dtype=self.layout.dtype):
                yield

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Inside, modules are in evaluation mode: no dropout."""
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    def reshard(self) -> None:
        """Free gathered parameters: after a forward pass alone, FSDP2 leaves the outermost group gathered."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # -- random state --------------------------------------------------------------------------------------------

    def rng_state(self) -> dict[str, Tensor]:
        """The generators of this process: of the CPU, and of its CUDA device."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `rng_state` returned."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
