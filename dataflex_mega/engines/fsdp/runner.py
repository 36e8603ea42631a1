"""A Hugging Face model in its layout over processes: forward passes, mode, precision and random state. No optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
from dataflex_mega.losses.base import LossForm, TokenLosses, form_losses
from dataflex_mega.signals.sample_embeddings import sample_embeddings
from dataflex_mega.types import Batch, EmbeddingSpec


@dataclass
class FSDPModelRunner:
    """`module` is what parallel.parallelize returned.

    Attributes:
        loss_form: what is differentiated of a token; None: its cross-entropy.
        reference: a batch -> [b, S, V] logits of the frozen model, without gradient; for forms that need one.
    """

    module: nn.Module
    layout: FSDPLayout
    parallel_info: ParallelInfo
    loss_form: LossForm | None = None
    reference: Callable[[Batch], Tensor] | None = None
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
        return self.logits_of(self.module, batch)

    def logits_of(self, module: nn.Module, batch: Batch) -> Tensor:
        """The same of another module that takes what this one takes."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if self.records_routers(module):
            inputs["output_router_logits"] = (
                False  # see auxiliary_loss; the model itself cannot tell padding when packed
            )
        if batch.is_packed:
            inputs["position_ids"] = batch.position_ids
            inputs["attention_mask"] = self.attention_kinds.mask(batch, self.layout.dtype)
        inputs.update(self._further_inputs(batch))
        # Unpacked rows are padded on the right: under causal attention no token sees the padding, so no mask is needed.
        with self.autocast():
            return module(**inputs).logits

    @staticmethod
    def records_routers(module: nn.Module) -> bool:
        """Whether a Hugging Face model gives its routers' outputs, and a loss of them, unless it is told not to."""
        return bool(getattr(getattr(unwrap(module), "config", None), "output_router_logits", False))

    def _further_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Pixels and what else belongs to them, in the precision of the computation."""
        low = self.layout.precision != "fp32"
        return {
            name: value.to(self.layout.dtype) if low and value.is_floating_point() and value.dim() > 1 else value
            for name, value in batch.extra.items()
        }

    def token_losses(self, batch: Batch) -> Tensor:
        """[b, S] float32 cross-entropy, differentiable, 0 where there is no target."""
        return objective.token_losses(self.logits(batch), batch.labels)

    def training_losses(self, batch: Batch) -> TokenLosses:
        """Of a forward pass of its own."""
        return self.losses_of(self.logits(batch), batch)

    def losses_of(self, logits: Tensor, batch: Batch) -> TokenLosses:
        """[b, S, V] logits of `batch` -> what is seen and what is differentiated of each token."""
        needs_reference = self.loss_form is not None and self.loss_form.needs_reference
        reference = self.reference(batch) if needs_reference and self.reference is not None else None
        return form_losses(self.loss_form, logits, batch.labels, reference)

    def forward(self, batch: Batch, spec: EmbeddingSpec | None) -> tuple[Tensor, Tensor | None]:
        """(logits [b, S, V], differentiable; embeddings of the samples [n, h] for `spec`, without gradient)."""
        if spec is None:
            return self.logits(batch), None
        with capture_hidden_states(self.model, [spec.layer]) as captured:
            logits = self.logits(batch)
        return logits, sample_embeddings(captured[spec.layer], batch, spec)

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
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

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
