"""A run that cannot be ends with status 2 and one line, before processes are joined and before a model is built."""

import json

import pytest
import torch
import yaml
from transformers import AutoConfig

from tests.support import corpus

pytest.importorskip("megatron.core")
T, P, V = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
E, C = "expert_model_parallel_size", "context_parallel_size"
# Processes, keys, what the line begins with, what it says. The model has 4 heads, 2 key-value heads and 2 layers.
CASES = {
    "world": (3, {T: 2}, f"{T}, {P}", "tensor 2 x pipeline 1 = 2 does not divide the 3 processes"),
    "world with context": (3, {C: 2}, f"{T}, {P}, {C}", "context 2 = 2 does not divide the 3 processes"),
    "heads": (3, {T: 3}, T, "3 does not divide the model's 4 attention heads"),
    "key-value heads": (4, {T: 4}, T, "4 does not divide the model's 2 key-value heads"),
    "layers": (3, {P: 3}, P, "3 stages of 1 chunks do not divide the model's 2 layers"),
    "chunks": (2, {P: 2, V: 2}, P, "2 stages of 2 chunks do not divide the model's 2 layers"),
    "experts": (2, {E: 2}, E, "2, but a llama has no experts"),
    "vocabulary": (1, {"engine": "megatron", "model": "few-tokens"}, "model_name_or_path", "the tokenizer has 512 tokens"),
    "quantised": (1, {"engine": "megatron", "model": "quantised"}, "engine: megatron", "the model is quantised"),
    "quantization_bit": (1, {"engine": "megatron", "quantization_bit": 4}, "quantization_bit", "engine: fsdp does"),
    "another model": (1, {"engine": "megatron", "model": "gpt2"}, "engine: megatron", "has no 'gpt2' model"),
    "LoRA": (1, {"engine": "megatron", "finetuning_type": "lora"}, "finetuning_type", "engine: fsdp does LoRA"),
    "attention": (1, {"engine": "megatron", "flash_attn": "disabled"}, "flash_attn", "takes auto, sdpa, fa2"),
    "precision of norms": (1, {"engine": "megatron", "upcast_layernorm": True}, "upcast_layernorm", "engine: fsdp does"),
    "stage names": (2, {P: 2, "pipeline_model_parallel_layout": "Et|ttL"}, "engine", "megatron-core refuses"),
    "messages": (2, {P: 2, "additional_configs": {"overlap_p2p_comm": True}}, "additional_configs", "a key of its own"),
    "field": (1, {"engine": "megatron", "additional_configs": {"moe_topk": 2}}, "additional_configs", "did you mean"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = corpus.write(tmp_path_factory.mktemp("refusals"))
    changes = {
        "few-tokens": {"vocab_size": 400}, "gpt2": AutoConfig.for_model("gpt2").to_dict(),
        "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    }  # fmt: skip
    for name, change in changes.items():
        (made / name).mkdir()
        for file in (made / "model").glob("token*"):
            (made / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((made / "model" / "config.json").read_text()) | change
        (made / name / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line_before_processes_are_joined(folder, tmp_path, monkeypatch, capsys, name):
    from dataflex_mega.train import main

    world, keys, first, said = CASES[name]
    torchrun = {"WORLD_SIZE": str(world), "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, value in torchrun.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    config = {
        "model_name_or_path": str(folder / keys.get("model", "model")), "stage": "pt", "dataset_dir": str(folder / "data"),
        "dataset": "code", "cutoff_len": 32, "finetuning_type": "full", "output_dir": str(tmp_path / "out"),
        "max_steps": 2, "weighter": "loss", "gradient_accumulation_steps": 2,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config | {key: value for key, value in keys.items() if key != "model"}))
    assert main([str(path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: {first}") and said in lines[0]
    assert not (tmp_path / "out").exists()


def joined(*_args, **_kwargs):
    raise AssertionError("processes were joined")
