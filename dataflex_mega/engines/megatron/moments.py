"""Adam's moments of a parameter, wherever megatron-core keeps them.

The distributed optimizer splits all parameters of a bucket, end to end, over data-parallel ranks, so one rank has any range
of a parameter's elements, or none. Otherwise every rank has all of them, by the parameter or by its copy in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.per_sample_gradients import AdamMoments, upcast

NAMES = ("exp_avg", "exp_avg_sq")


@dataclass
class DistributedAdamMoments:
    """Gathers Adam's moments; every data-parallel rank must ask for the same parameters in the same order."""

    optimizers: list[Any]  # megatron-core's, each of one kind of parameter
    step: int
    betas: tuple[float, float]
    eps: float

    @staticmethod
    def from_optimizer(optimizer: Any, device: torch.device) -> DistributedAdamMoments:
        """Of an optimizer chain, after the steps done. Every rank calls it. Raises ConfigError for another than Adam."""
        chain = list(optimizer.chained_optimizers)
        kind = chain[0].config.optimizer
        if kind != "adam":
            raise ConfigError(f"gradient_type: adam needs optim: adamw_torch, found {kind}; use gradient_type: sgd")
        groups = [group for one in chain for group in one.optimizer.param_groups]
        steps = [float(group["step"]) for group in groups if "step" in group]
        steps += [float(s["step"]) for one in chain for s in one.optimizer.state.values() if "step" in s]
        step = torch.tensor(max(steps, default=0.0), device=device)
        dist.all_reduce(step, op=dist.ReduceOp.MAX)  # a rank that holds no shard has not counted
        return DistributedAdamMoments(chain, int(step), tuple(groups[0]["betas"]), float(groups[0]["eps"]))

    def __call__(self, parameter: nn.Parameter) -> AdamMoments:
        """Both moments in the parameter's shape; zero before the first step."""
        both = parameter.new_zeros(2, parameter.numel(), dtype=torch.float32)
        if self.step > 0:
            for one in self.optimizers:
                if hasattr(one, "model_param_group_index_map"):
                    self._add_shard(one, parameter, both)
                else:
                    self._add_unsharded(one, parameter, both)
        first, second = both.view(2, *parameter.shape)
        return AdamMoments(first, second, self.step, self.betas, self.eps)

    def _add_shard(self, one: Any, parameter: nn.Parameter, both: Tensor) -> None:
        """From the distributed optimizer, if it has the parameter."""
        if not any(parameter in bucket.params for buffer in one.buffers for bucket in buffer.buckets):
            return
        if parameter in one.model_param_group_index_map:
            span = one._get_model_param_range_map(parameter)["param"]
            state = one._get_main_param_and_optimizer_states(parameter)
            _put(both[:, span.start : span.end], state)
        if dist.get_world_size(one.data_parallel_group) > 1:
            dist.all_reduce(both, group=one.data_parallel_group)

    def _add_unsharded(self, one: Any, parameter: nn.Parameter, both: Tensor) -> None:
        main = getattr(parameter, "main_param", parameter)
        state = one.optimizer.state
        if main in state:
            _put(both, state[main])


def _put(into: Tensor, state: Mapping[str, Tensor]) -> None:
    for row, name in zip(into, NAMES, strict=True):
        row.copy_(upcast(state[name]).flatten())
