"""Projected gradient features on the FSDP engine: one forward pass, activation gradients, thin products in hooks."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor, nn

import dataflex_mega.objective as objective
from dataflex_mega.engines.fsdp.gradient_scorer import ADAM_OPTIMIZERS, full_tensor, mark_graph_entry
from dataflex_mega.engines.fsdp.language_model import check_only_tokens_train
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.per_sample_gradients import AdamMoments, trained_linears
from dataflex_mega.signals.projection import DenseProjection, RankOneAdam, TwoSidedProjection
from dataflex_mega.signals.projection_hooks import ProjectionHooks, feature_dim, make_projections
from dataflex_mega.types import Batch, ProjectionSpec


class FSDPFeatureMaker:
    """Features of the current model and optimizer state. Every rank makes one, and calls `features` equally often."""

    def __init__(
        self, runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, spec: ProjectionSpec, adam: bool
    ) -> None:
        """`adam`: precondition with the optimizer's moments. Raises ConfigError when it has none."""
        if adam and not isinstance(optimizer, ADAM_OPTIMIZERS):
            name = type(optimizer).__name__
            raise ConfigError(f"gradient_type: adam needs optim: adamw_torch, found {name}; use gradient_type: sgd")
        self.runner, self.optimizer, self.spec, self.adam = runner, optimizer, spec, adam
        check_only_tokens_train(runner.model)
        runner.reshard()
        self.linears = trained_linears(runner.model)
        if not self.linears:
            raise ConfigError("gradient features need a linear layer that trains, and the model has none")
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()}
        self.layers = make_projections(spec, shapes)
        self.width = feature_dim(spec, self.layers)
        self.hooks = ProjectionHooks(self.linears, self.layers, spec)
        self._take_moments()

    def refresh(self) -> None:
        """Take the optimizer's current moments; the projections stay. Every rank must call it."""
        self.runner.reshard()
        self._take_moments()

    def _take_moments(self) -> None:
        if self.adam:
            for name, layer in self.layers.items():
                self._precondition(layer, self._moments(self.linears[name].weight))

    def features(self, batch: Batch, plain: bool = False) -> Tensor:
        """Unpacked batch of n samples -> [n, width] float32 features of the gradient of each sample's mean token loss.

        `plain`: of the gradient itself, whatever `adam` says; targets are compared that way.
        """
        runner = self.runner
        if batch.is_packed:
            raise ValueError("gradient features take one sample per row")
        batch = batch.to(runner.device)
        entries: list[Tensor] = []
        embeddings: nn.Module = runner.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda _m, _a, output: mark_graph_entry(entries, output))
        try:
            with (
                runner.evaluation_mode(),
                self.hooks.recording(len(batch.sample_ids), plain, runner.device) as features,
            ):
                sums = objective.sample_sums(runner.training_losses(batch).trained, batch)
                means = sums / objective.make_sample_stats(sums, batch).num_tokens.clamp(min=1)
                torch.autograd.grad(means.sum(), entries[:1])
        finally:
            handle.remove()
        return features

    def fingerprint(self) -> str:
        """32 hexadecimal digits: a hash of what features depend on, the parameters, the loss and, with `adam`, the
        moments."""
        sha = xxhash.xxh3_128()
        if self.runner.loss_form is not None:
            sha.update(repr(self.runner.loss_form).encode())
        trained = {id(linear.weight) for linear in self.linears.values()}
        for name, parameter in self.runner.model.named_parameters():
            sha.update(name.encode())
            _feed(sha, full_tensor(parameter.detach()))
            if self.adam and id(parameter) in trained:
                moments = self._moments(parameter)
                sha.update(repr((moments.step, moments.betas, moments.eps)).encode())
                _feed(sha, moments.first)
                _feed(sha, moments.second)
        return sha.hexdigest()

    def _precondition(self, layer: TwoSidedProjection | DenseProjection, moments: AdamMoments) -> None:
        if isinstance(layer, DenseProjection):
            layer.adam = moments
        else:
            layer.precondition(RankOneAdam.from_moments(moments))

    def _moments(self, weight: Tensor) -> AdamMoments:
        """Adam's state of a weight, zero before the first step."""
        optimizer = self.optimizer
        group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        state: dict[str, Any] = optimizer.state.get(weight, {})
        if not state:
            zeros = torch.zeros(weight.shape, device=self.runner.device)
            return AdamMoments(zeros, zeros, 0, group["betas"], group["eps"])
        first, second = (_wide(full_tensor(state[name])) for name in ("exp_avg", "exp_avg_sq"))
        return AdamMoments(
            first, second, int(full_tensor(torch.as_tensor(state["step"]))), group["betas"], group["eps"]
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _feed(sha: Any, tensor: Tensor) -> None:
    sha.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
