"""Reading slices of Hugging Face folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataflex_mega.engines.megatron.weights import HFCheckpointReader
from dataflex_mega.errors import DataError
from tests.unit.engines.megatron import small


def written(folder, name, **options):
    config = small.configs()[name]
    small.hf_model(config).save_pretrained(folder, **options)
    return config


@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_is_read_and_its_bytes_are_counted(tmp_path, dim):
    source = HFCheckpointReader(tmp_path, written(tmp_path, "llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert source.bytes_read == 0
    found = source.read(name, dim, 3, 10)
    assert torch.equal(found, load_file(tmp_path / "model.safetensors")[name].narrow(dim, 3, 7))
    assert source.bytes_read == found.numel() * 4
    assert source.dtypes() == {"F32"}


def test_files_with_an_index_are_opened_one_by_one(tmp_path):
    config = written(tmp_path, "qwen2", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    source = HFCheckpointReader(tmp_path, config)
    name = "model.layers.3.self_attn.k_proj.bias"
    file = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    for other in set(tmp_path.glob("*.safetensors")) - {file}:
        other.unlink()  # what is not asked for is not touched
    assert torch.equal(source.read(name, 0, 0, 16), load_file(file)[name])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_kept_together_are_read_like_experts_apart(tmp_path, name):
    config = written(tmp_path / "apart", name)
    written(tmp_path / "together", name, save_original_format=False)
    assert any("gate_up_proj" in key for key in load_file(tmp_path / "together" / "model.safetensors"))
    apart, together = (HFCheckpointReader(tmp_path / kind, config) for kind in ("apart", "together"))
    for key, shape in apart.shapes.items():
        dim, end = len(shape) - 1, shape[-1]
        assert torch.equal(apart.read(key, 0, 1, shape[0]), together.read(key, 0, 1, shape[0])), key
        assert torch.equal(apart.read(key, dim, 2, end), together.read(key, dim, 2, end)), key
    assert apart.bytes_read == together.bytes_read


def test_a_folder_of_another_shape_is_refused_by_file_tensor_and_shape(tmp_path):
    config = written(tmp_path, "llama")
    config.vocab_size = 60
    with pytest.raises(DataError, match=r"model.safetensors: lm_head.weight has shape \[53, 32\]; .* shape \[60, 32\]"):
        HFCheckpointReader(tmp_path, config).read("lm_head.weight", 0, 0, 53)


def test_a_missing_tensor_is_named_at_once(tmp_path):
    config = written(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"no tensor model\.layers\.2\.mlp\.up_proj\.weight \(did you mean"):
        HFCheckpointReader(tmp_path, config)


def test_a_tensor_left_over_is_named_at_once(tmp_path):
    config = written(tmp_path, "llama")
    config.num_hidden_layers -= 1
    last = rf"model\.layers\.{config.num_hidden_layers}\.input_layernorm\.weight and \d+ more has no place"
    with pytest.raises(DataError, match=last):
        HFCheckpointReader(tmp_path, config)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model_name_or_path: .* has neither model.safetensors nor"):
        HFCheckpointReader(tmp_path, small.configs()["llama"])


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=r"model.safetensors.index.json: not an index"):
        HFCheckpointReader(tmp_path, small.configs()["llama"])


def test_a_damaged_file_is_refused(tmp_path):
    config = written(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"model.safetensors: cannot be read as safetensors"):
        HFCheckpointReader(tmp_path, config)
