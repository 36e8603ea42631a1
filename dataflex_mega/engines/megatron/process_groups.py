"""Megatron's process groups."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from dataflex_mega.distributed.parallel_info import DEFAULT_TIMEOUT, ParallelInfo
from dataflex_mega.engines.megatron.layout import MegatronLayout


def init_model_parallel(
    parallel_info: ParallelInfo, layout: MegatronLayout, timeout: timedelta = DEFAULT_TIMEOUT
) -> ParallelInfo:
    """Split the processes into Megatron's groups -> `parallel_info` with the data-parallel groups of this layout.

    `timeout`: how long their collectives may wait. What is sent from stage to stage heeds that of the groups' making only.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.interleaved if layout.interleaved > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=timeout.total_seconds() / 60,  # type: ignore[arg-type]  # a timedelta takes it
        create_gloo_process_groups=True,  # megatron-core's optimizer asks for them on GPUs too
    )
    return replace(
        parallel_info,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_pp_group=_dp_pp_group(layout, timeout),
        pipeline_stages=layout.pipeline,
    )


def _dp_pp_group(layout: MegatronLayout, timeout: timedelta) -> dist.ProcessGroup | None:
    """The ranks with this one's tensor- and context-parallel rank: every data-parallel share at every pipeline stage."""
    if layout.pipeline == 1:
        return None
    # Megatron numbers ranks with the tensor dimension first and the context dimension second, so both are the remainder.
    inner = layout.tensor * layout.context
    groups: list[Any] = [
        dist.new_group(list(range(rest, layout.world_size, inner)), timeout=timeout) for rest in range(inner)
    ]
    return groups[dist.get_rank() % inner]


def is_last_pipeline_stage() -> bool:
    """Whether this rank is on the last pipeline stage, which computes losses."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def all_reduce_over_pipeline(values: Tensor) -> Tensor:
    """Element-wise sum over the stages of this rank's pipeline."""
    total = values.clone()
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total


def rng_state() -> dict[str, Tensor]:
    """torch's generators and megatron-core's named ones."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    named = _tracker().get_states()
    return state | {f"megatron.{name}": value for name, value in named.items()}


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Set all generators to what `rng_state` returned. CUDA's is left alone where this process or `state` has none."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    prefix = "megatron."
    named = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    _tracker().set_states(named)


def _tracker() -> Any:
    """megatron-core's named random states; its annotation admits None."""
    return tensor_parallel.get_cuda_rng_tracker()
