"""Every YAML of examples/megatron trains on the layout it names, and so do the keys of LLaMA-Factory's own Megatron
examples; sizes, lengths and paths are overridden."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dataflex_mega.config.parse import parse_config
from dataflex_mega.corpus import command
from dataflex_mega.engines.megatron import layout
from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

pytest.importorskip("megatron.core")
EXAMPLES = {path.stem: path for path in sorted((corpus.ROOT / "examples" / "megatron").glob("*.yaml"))}
RECIPE = "slimpajama_1b5_64gpus"
WORLDS = {"pretrain_odm_tp2_pp2": 4, "sft_select_tp2": 2, "weight_dp2": 2, "moe_ep2": 2, RECIPE: 2}
STEPS = 3
# The keys of LLaMA-Factory's examples/megatron/qwen2_vl_full.yaml and qwen3_moe_full.yaml, and of its
# examples/megatron_bridge/llama3_sft.yaml with finetuning_type: full, without the names of models, data, template and
# folder. A size of 4 is halved below, for half as many processes.
QWEN2_VL = {
    "image_max_pixels": 262144, "video_max_pixels": 16384, "do_train": True, "stage": "sft", "finetuning_type": "full",
    "preprocessing_num_workers": 8, "cutoff_len": 4096, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": 2e-5, "logging_steps": 1, "save_steps": 100,
    "lr_scheduler_type": "cosine", "bf16": True, "tensor_model_parallel_size": 4, "sequence_parallel": True,
    "pipeline_model_parallel_size": 2, "bias_activation_fusion": True, "apply_rope_fusion": True,
    "use_distributed_optimizer": True, "use_mca": True,
}  # fmt: skip
QWEN3_MOE = {
    "do_train": True, "stage": "sft", "finetuning_type": "full", "preprocessing_num_workers": 8, "cutoff_len": 4096,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_train_epochs": 2, "learning_rate": 3e-6,
    "logging_steps": 1, "save_steps": 100, "lr_scheduler_type": "constant", "bf16": True, "tensor_model_parallel_size": 1,
    "sequence_parallel": False, "pipeline_model_parallel_size": 4, "bias_activation_fusion": True,
    "apply_rope_fusion": True, "use_distributed_optimizer": True, "overlap_param_gather": True,
    "overlap_grad_reduce": True, "moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2, "recompute_granularity": "full",
}  # fmt: skip
LLAMA3_BRIDGE = {
    "stage": "sft", "do_train": True, "finetuning_type": "full", "cutoff_len": 2048, "preprocessing_num_workers": 8,
    "logging_steps": 1, "overwrite_output_dir": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
    "num_train_epochs": 3, "max_steps": 1000, "save_steps": 3000, "learning_rate": 5.0e-6, "lr_scheduler_type": "cosine",
    "warmup_steps": 10, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": True,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "expert_model_parallel_size": 1, "sequence_parallel": False, "use_distributed_optimizer": True,
    "overlap_param_gather": True, "overlap_grad_reduce": True, "mixed_precision": "bf16_mixed",
    "use_packed_sequences": False, "export_hf_on_finish": False,
}  # fmt: skip
SMALL = {"cutoff_len": 64, "preprocessing_num_workers": None, "max_steps": STEPS, "save_steps": None, "bf16": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `make demo-corpus` makes, small and without a network: data, corpora, a Llama and a Mixtral."""
    root = corpus.write(tmp_path_factory.mktemp("megatron-examples"))
    info = json.loads((root / "data" / "dataset_info.json").read_text())
    info["demo_alpaca"] = info["demo_alpaca_validation"] = info["sft"]
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    common = ["--dataset-dir", str(root / "data"), "--tokenizer", str(root / "model")]
    for name, domains in (("corpus", "code,prose,tables"), ("corpus_validation", "prose,tables")):
        assert command.main(["--dataset", domains, *common, "--output", str(root / name)]) == 0
    other_models(root)
    return root


def other_models(folder):
    """The Mixtral of `tools/tiny_model.py --experts 4`, a Qwen2 and a Qwen3-MoE, with the same tokenizer."""
    from transformers import Qwen2Config, Qwen3MoeConfig

    maker = corpus.tool("tiny_model")
    options = maker.ModelOptions(hidden=32, layers=2, heads=4, kv_heads=2, vocab=512, experts=4)
    sizes = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
    }  # fmt: skip
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    models = {
        "moe": maker.make_model(options),
        "qwen2": AutoModelForCausalLM.from_config(Qwen2Config(**sizes)),
        "qwen3_moe": AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **sparse)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes((folder / "model" / file).read_bytes())


def shrunk(folder, name):
    """An example with paths, lengths and the number of steps of a test; the layout is its own."""
    config = yaml.safe_load(EXAMPLES[name].read_text())
    model = "moe" if config["model_name_or_path"].endswith("moe") else "model"
    config.update(
        model_name_or_path=str(folder / model), output_dir=str(folder / "out" / name), cutoff_len=32, max_steps=STEPS,
        per_device_train_batch_size=2, warmup_step=1,
    )  # fmt: skip
    for key in ("corpus_dir", "eval_corpus_dir"):
        if key in config:
            config[key] = str(folder / Path(config[key]).name.replace("slimpajama", "corpus"))
    if "dataset_dir" in config:
        config["dataset_dir"] = str(folder / "data")
    if "update_step" in config:
        config["update_step"] = 1
    if "eval_steps" in config:
        config["eval_steps"] = STEPS
    if name == RECIPE:
        config.update(dataset="code,prose,tables", init_mixture_proportions=[0.5, 0.3, 0.2])
    return config


def theirs(folder, name, keys, model, **sizes):
    """A YAML with LLaMA-Factory's published keys and a role beside them."""
    our_keys = {
        "model_name_or_path": str(folder / model), "dataset_dir": str(folder / "data"), "dataset": "sft",
        "template": "default", "output_dir": str(folder / "out" / name), "weighter": "loss",
    }  # fmt: skip
    return {key: value for key, value in {**keys, **our_keys, **SMALL, **sizes}.items() if value is not None}


@pytest.fixture(scope="module")
def finished(folder):
    """Name -> configuration."""
    configs = {name: shrunk(folder, name) for name in EXAMPLES}
    worlds = {**WORLDS, "qwen2_vl_full": 4, "qwen3_moe_full": 4, "llama3_sft": 2}
    configs["qwen2_vl_full"] = theirs(folder, "qwen2_vl_full", QWEN2_VL, "qwen2", tensor_model_parallel_size=2)
    configs["llama3_sft"] = theirs(folder, "llama3_sft", LLAMA3_BRIDGE, "model")
    configs["qwen3_moe_full"] = theirs(folder, "qwen3_moe_full", QWEN3_MOE, "qwen3_moe", pipeline_model_parallel_size=2)
    stderr_of = {}
    for world in (2, 4):
        names = [name for name in configs if worlds[name] == world]
        for name, (status, stderr) in zip(names, runs.train_many(world, [configs[n] for n in names]), strict=True):
            assert status == 0, f"{name}: {stderr}"
            stderr_of[name] = stderr
    return configs, stderr_of


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_trains_on_its_layout(finished, name):
    configs, _ = finished
    assert [row["step"] for row in runs.rows(configs[name])] == list(range(1, STEPS + 1))
    output = Path(configs[name]["output_dir"])
    assert (output / "config.json").is_file() and list(output.glob("*.safetensors"))
    if "eval_corpus_dir" in configs[name]:
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        assert {"eval_prose_loss", "eval_tables_loss"} <= {key for row in history for key in row}


# Name -> what is said of a key whose kernel is not there.
NOTES = {
    "qwen2_vl_full": "apply_rope_fusion: needs Transformer Engine",
    "qwen3_moe_full": "moe_token_dispatcher_type: alltoall needs a CUDA device",
    "llama3_sft": "overlap_grad_reduce: needs a CUDA device",
}


@pytest.mark.parametrize("name", NOTES)
def test_the_keys_of_llamafactorys_examples_train(finished, name):
    configs, stderr_of = finished
    assert [row["step"] for row in runs.rows(configs[name])] == list(range(1, STEPS + 1))
    assert "engine: megatron" in stderr_of[name]
    assert torch.cuda.is_available() or f"note: {NOTES[name]}" in stderr_of[name]


@pytest.mark.parametrize("name", ["pretrain_odm_tp2_pp2", "moe_ep2", "qwen3_moe_full"])
def test_the_export_command_of_llamafactory_takes_what_was_trained(finished, tmp_path, name):
    configs, _ = finished
    keys = {
        "model_name_or_path": configs[name]["output_dir"], "template": "default", "export_dir": str(tmp_path / "exported"),
        "infer_dtype": "bfloat16" if configs[name].get("bf16") else "float32", "trust_remote_code": False,
    }  # fmt: skip
    runs.run_forked(export_command, 1, keys, tmp_path / "export.yaml")
    loaded, trained = (
        AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "exported", configs[name]["output_dir"])
    )
    for (key, actual), (_, expected) in zip(loaded.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.equal(actual, expected), key


def export_command(_mesh, keys, path):
    """`llamafactory-cli export path` in this process."""
    from llamafactory.cli import main

    path.write_text(yaml.safe_dump(keys))
    with mock.patch.object(sys, "argv", ["llamafactory-cli", "export", str(path)]):
        main()


def test_the_recipe_is_of_the_size_it_says(folder):
    """64 ranks, 4.19M tokens a step, 627B in all, natural proportions."""
    from dataflex_mega.llamafactory.args import argument_types

    keys = yaml.safe_load(EXAMPLES[RECIPE].read_text())
    config = parse_config(keys, argument_types())
    plan = layout.read_layout(config.megatron, 64)
    windows = plan.data * keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
    assert (config.engine, plan.data, windows) == ("megatron", 64, 1024)
    assert windows * keys["cutoff_len"] * keys["max_steps"] == pytest.approx(627e9, rel=1e-3)
    assert sum(keys["init_mixture_proportions"]) == pytest.approx(1)
    assert len(keys["init_mixture_proportions"]) == len(keys["dataset"].split(","))
    hidden, kv, mlp, layers, vocabulary = 1536, 256, 8960, 28, 151936  # Qwen2.5-1.5B
    size = layers * (hidden * (2 * hidden + 2 * kv) + 3 * hidden * mlp) + vocabulary * hidden
    assert size == pytest.approx(1.54e9, rel=5e-3)
    hours = 6 * size * 627e9 / (64 * 0.4 * 989e12) / 3600
    assert f"{hours:.0f} hours" in EXAMPLES[RECIPE].read_text()
