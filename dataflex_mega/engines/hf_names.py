"""Names and shapes of the tensors of a Hugging Face checkpoint, without loading one.

transformers 5 keeps all experts of a layer in one tensor (`experts.gate_up_proj` [E, 2I, H]) but saves one tensor for each
expert, under the names that the model was published with. Here a tensor is identified by its name in such a checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

# Model types whose checkpoint names are known and which megatron-core can build.
DENSE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MOE_MODEL_TYPES = ("mixtral", "qwen3_moe")
SUPPORTED_MODEL_TYPES = DENSE_MODEL_TYPES + MOE_MODEL_TYPES
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # all experts of a layer, in memory
# Model type -> name of the block that holds router and experts, then of an expert's gate, up and down projections.
EXPERTS: dict[str, tuple[str, str, str, str]] = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
_FUSED = re.compile(rf"(.+)\.mlp\.experts\.({GATE_UP}|{DOWN})")
_EXPERT = re.compile(r"(.+)\.(block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class CheckpointSlice:
    """One tensor of a checkpoint as a slice of a parameter in memory."""

    name: str
    index: tuple[int | slice, ...]  # parameter[index] is the tensor; () is all of it


@dataclass(frozen=True)
class FusedExpert:
    """Where the tensor of one expert is in a file with fused experts."""

    name: str
    expert: int
    half: int | None  # 0: the first half of the rows (gate), 1: the second (up), None: all rows


def checkpoint_slices(model_type: str, name: str, shape: torch.Size) -> list[CheckpointSlice]:
    """The checkpoint tensors that make up the parameter `name` of a model in memory.

    Args:
        shape: [E, 2I, H] or [E, H, I] for fused experts; any for the rest, which are one tensor each.
    """
    if model_type not in EXPERTS:
        return [CheckpointSlice(name, ())]
    block, gate, up, down = EXPERTS[model_type]
    match = _FUSED.fullmatch(name)
    if match is None:
        return [CheckpointSlice(name.replace(".mlp.gate.", f".{block}.gate."), ())]
    prefix, kind = f"{match[1]}.{block}.experts", match[2]
    if kind == DOWN:
        return [CheckpointSlice(f"{prefix}.{e}.{down}.weight", (e,)) for e in range(shape[0])]
    rows = shape[1] // 2
    halves = ((gate, slice(0, rows)), (up, slice(rows, 2 * rows)))
    return [
        CheckpointSlice(f"{prefix}.{e}.{half}.weight", (e, index)) for e in range(shape[0]) for half, index in halves
    ]


def locate_fused_expert(model_type: str, name: str) -> FusedExpert | None:
    """Where the checkpoint tensor `name` of an expert is in a file with fused experts; None for other tensors."""
    match = _EXPERT.fullmatch(name)
    if model_type not in EXPERTS or match is None:
        return None
    _, gate, up, _ = EXPERTS[model_type]
    prefix = f"{match[1]}.mlp.experts."
    if match[4] in (gate, up):
        return FusedExpert(prefix + GATE_UP, int(match[3]), int(match[4] == up))
    return FusedExpert(prefix + DOWN, int(match[3]), None)


def meta_model(hf_config: Any) -> Any:
    """The `AutoModelForCausalLM` of a configuration with shapes and no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def checkpoint_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds -> its shape. A tied output layer is not among them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in meta_model(hf_config).named_parameters():
        for piece in checkpoint_slices(hf_config.model_type, name, parameter.shape):
            shapes[piece.name] = tuple(parameter[piece.index].shape) if piece.index else tuple(parameter.shape)
    return shapes
