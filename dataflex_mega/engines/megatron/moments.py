"""Adam's moments of a parameter, wherever megatron-core keeps them.

The distributed optimizer cuts all parameters of a bucket, end to end, among data-parallel ranks, so one rank has any stretch
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
from dataflex_mega.signals.gradients import Adam, wide

NAMES = ("exp_avg", "exp_avg_sq")


@dataclass
class Moments:
    """Reads them; every data-parallel rank must ask for the same parameters in the same order."""

    parts: list[Any]  # megatron-core's optimizers of one kind of parameter
    step: int
    betas: tuple[float, float]
    eps: float

    @staticmethod
    def of(optimizer: Any, device: torch.device) -> Moments:
        """Of an optimizer chain, after the steps done. Every rank calls it. Raises ConfigError for another than Adam."""
        parts = list(optimizer.chained_optimizers)
        kind = parts[0].config.optimizer
        if kind != "adam":
            raise ConfigError(f"gradient_type: adam needs optim: adamw_torch, found {kind}; use gradient_type: sgd")
        groups = [group for part in parts for group in part.optimizer.param_groups]
        steps = [float(group["step"]) for group in groups if "step" in group]
        steps += [float(s["step"]) for part in parts for s in part.optimizer.state.values() if "step" in s]
        step = torch.tensor(max(steps, default=0.0), device=device)
        dist.all_reduce(step, op=dist.ReduceOp.MAX)  # a rank that holds no stretch has not counted
        return Moments(parts, int(step), tuple(groups[0]["betas"]), float(groups[0]["eps"]))

    def __call__(self, parameter: nn.Parameter) -> Adam:
        """Both moments in the parameter's shape; zero before the first step."""
        both = parameter.new_zeros(2, parameter.numel(), dtype=torch.float32)
        if self.step > 0:
            for part in self.parts:
                if hasattr(part, "model_param_group_index_map"):
                    self._add_stretch(part, parameter, both)
                else:
                    self._add_whole(part, parameter, both)
        first, second = both.view(2, *parameter.shape)
        return Adam(first, second, self.step, self.betas, self.eps)

    def _add_stretch(self, part: Any, parameter: nn.Parameter, both: Tensor) -> None:
        """Of the distributed optimizer, if the parameter is one of those it keeps."""
        if not any(parameter in bucket.params for buffer in part.buffers for bucket in buffer.buckets):
            return
        if parameter in part.model_param_group_index_map:
            place = part._get_model_param_range_map(parameter)["param"]
            found = part._get_main_param_and_optimizer_states(parameter)
            _put(both[:, place.start : place.end], found)
        if dist.get_world_size(part.data_parallel_group) > 1:
            dist.all_reduce(both, group=part.data_parallel_group)

    def _add_whole(self, part: Any, parameter: nn.Parameter, both: Tensor) -> None:
        kept = getattr(parameter, "main_param", parameter)
        state = part.optimizer.state
        if kept in state:
            _put(both, state[kept])


def _put(into: Tensor, state: Mapping[str, Tensor]) -> None:
    for row, name in zip(into, NAMES, strict=True):
        row.copy_(wide(state[name]).flatten())
