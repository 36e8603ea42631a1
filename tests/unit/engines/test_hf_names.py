"""Names and shapes of checkpoints, against what transformers writes."""

import pytest
import torch
from safetensors.torch import load_file

from dataflex_mega.engines.hf_names import EXPERTS, checkpoint_shapes, checkpoint_slices, locate_fused_expert
from tests.unit.engines.megatron import small


@pytest.mark.parametrize("name", list(small.configs()))
def test_parts_of_a_model_are_the_tensors_that_transformers_saves(name, tmp_path):
    config = small.configs()[name]
    model = small.hf_model(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert checkpoint_shapes(config) == {key: tuple(tensor.shape) for key, tensor in saved.items()}
    for parameter_name, parameter in model.named_parameters():
        for part in checkpoint_slices(config.model_type, parameter_name, parameter.shape):
            assert torch.equal(parameter[part.index] if part.index else parameter, saved[part.name]), part.name


@pytest.mark.parametrize("kind", EXPERTS)
def test_fused_says_where_a_part_lies(kind):
    whole = torch.arange(4 * 6 * 3).view(4, 6, 3)
    for name in ("gate_up_proj", "down_proj"):
        for part in checkpoint_slices(kind, f"model.layers.7.mlp.experts.{name}", whole.shape):
            place = locate_fused_expert(kind, part.name)
            assert place is not None and place.name == f"model.layers.7.mlp.experts.{name}"
            rows = whole[place.expert]
            found = rows if place.half is None else rows.chunk(2)[place.half]
            assert torch.equal(found, whole[part.index])


def test_only_experts_are_ever_fused():
    assert locate_fused_expert("mixtral", "model.layers.0.block_sparse_moe.gate.weight") is None
    assert locate_fused_expert("llama", "model.layers.0.mlp.gate_proj.weight") is None
