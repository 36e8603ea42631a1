"""Projected gradient features on the FSDP engine: one forward pass, activation gradients, thin products in hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dataflex_mega import objective
from dataflex_mega.engines.fsdp.gradients import ADAM_OPTIMIZERS, whole
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.features import FeatureTaps, projections, total_width
from dataflex_mega.signals.gradients import Adam, trained_linears
from dataflex_mega.signals.projection import Dense, Precondition, TwoSided
from dataflex_mega.types import Batch, FeatureSpec

if TYPE_CHECKING:
    from dataflex_mega.engines.fsdp.engine import FSDPEngine


class FeatureMaker:
    """Features of the model and optimizer state of now. Every rank makes one, and calls `features` equally often."""

    def __init__(self, engine: FSDPEngine, spec: FeatureSpec, adam: bool) -> None:
        """`adam`: precondition with the optimizer's moments. Raises ConfigError when it has none."""
        if adam and not isinstance(engine.optimizer, ADAM_OPTIMIZERS):
            name = type(engine.optimizer).__name__
            raise ConfigError(f"gradient_type: adam needs optim: adamw_torch, found {name}; use gradient_type: sgd")
        self.engine, self.spec, self.adam = engine, spec, adam
        self._reshard()
        self.linears = trained_linears(engine.model)
        if not self.linears:
            raise ConfigError("gradient features need a linear layer that trains, and the model has none")
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()}
        self.layers = projections(spec, shapes)
        self.width = total_width(spec, self.layers)
        self.taps = FeatureTaps(self.linears, self.layers, spec)
        self._take_moments()

    def refresh(self) -> None:
        """Take the optimizer's moments of now; the projections stay. Every rank must call it."""
        self._reshard()
        self._take_moments()

    def _reshard(self) -> None:
        for module in self.engine.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass alone, FSDP2 leaves the outermost group gathered

    def _take_moments(self) -> None:
        if self.adam:
            for name, layer in self.layers.items():
                self._precondition(layer, self._moments(self.linears[name].weight))

    def features(self, batch: Batch, plain: bool = False) -> Tensor:
        """Unpacked batch of n samples -> [n, width] float32 features of the gradient of each sample's mean token loss.

        `plain`: of the gradient itself, whatever `adam` says; targets are compared that way.
        """
        engine = self.engine
        if batch.packed:
            raise ValueError("gradient features take one sample a row")
        batch = batch.to(engine.mesh.device)
        entered: list[Tensor] = []
        embeddings: nn.Module = engine.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda _m, _a, output: _enter(entered, output))
        engine.module.eval()
        try:
            with self.taps.listening(len(batch.sample_id), plain, engine.mesh.device) as found:
                sums = objective.sample_sums(engine.token_losses(batch), batch)
                means = sums / objective.observe(sums, batch).tokens.clamp(min=1)
                torch.autograd.grad(means.sum(), entered[:1])
        finally:
            handle.remove()
            engine.module.train()
        return found

    def fingerprint(self) -> str:
        """32 digits of a hash of the model's parameters and, with `adam`, of its moments: of what features depend on."""
        sha = xxhash.xxh3_128()
        trained = {id(linear.weight) for linear in self.linears.values()}
        for name, parameter in self.engine.model.named_parameters():
            sha.update(name.encode())
            _feed(sha, whole(parameter.detach()))
            if self.adam and id(parameter) in trained:
                moments = self._moments(parameter)
                sha.update(repr((moments.step, moments.betas, moments.eps)).encode())
                _feed(sha, moments.first)
                _feed(sha, moments.second)
        return sha.hexdigest()

    def _precondition(self, layer: TwoSided | Dense, moments: Adam) -> None:
        if isinstance(layer, Dense):
            layer.adam = moments
        else:
            layer.precondition(Precondition.of(moments))

    def _moments(self, weight: Tensor) -> Adam:
        """Adam's state of a weight, zero before the first step."""
        optimizer = self.engine.optimizer
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        state: dict[str, Any] = optimizer.state.get(weight, {})
        if not state:
            zeros = torch.zeros(weight.shape, device=self.engine.mesh.device)
            return Adam(zeros, zeros, 0, group["betas"], group["eps"])
        first, second = (_wide(whole(state[name])) for name in ("exp_avg", "exp_avg_sq"))
        return Adam(first, second, int(whole(torch.as_tensor(state["step"]))), group["betas"], group["eps"])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _feed(sha: Any, tensor: Tensor) -> None:
    sha.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)


def _enter(entered: list[Tensor], output: Any) -> Any:
    """The embeddings' output as the place where the backward pass ends; with LoRA it needs telling to have a gradient."""
    made = output if output.requires_grad else output.detach().requires_grad_(True)
    entered.append(made)
    return made
