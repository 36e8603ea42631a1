"""The same run on both engines and in every layout, as a table: `python -m tests.parity.megatron`.

Each run selects, mixes and weighs on real text (Python's own standard library) with the same small model, data and seed.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import torch

from tests.support import corpus, runs

STEPS = 20
ROLES = {
    "selector": {"name": "loss"}, "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": {"name": "loss"},
    "weight_scope": "step", "init_mixture_proportions": [0.5, 0.3, 0.2],
}  # fmt: skip
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VIRTUAL, EXPERT = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size"
CONTEXT = "context_parallel_size"
SEQUENCE = {"sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# (name, model, processes, micro-batch, accumulation, keys); the first of each model is what the others are compared with
LAYOUTS = [
    ("FSDP engine", "dense", 1, 8, 1, {}),
    ("FSDP engine, FSDP2", "dense", 2, 2, 2, {"fsdp": "full_shard"}),
    ("Megatron", "dense", 1, 2, 4, {"engine": "megatron"}),
    ("TP2", "dense", 2, 4, 2, {TENSOR: 2}),
    ("TP2 + SP", "dense", 2, 4, 2, {TENSOR: 2, **SEQUENCE}),
    ("PP2", "dense", 2, 2, 4, {PIPELINE: 2}),
    ("PP2 x VPP2", "dense", 2, 2, 4, {PIPELINE: 2, VIRTUAL: 2}),
    ("DP2", "dense", 2, 2, 2, {"engine": "megatron"}),
    ("DP2, sharded optimizer, overlaps", "dense", 2, 2, 2, {"engine": "megatron", **SHARDED}),
    ("TP2 x PP2", "dense", 4, 2, 4, {TENSOR: 2, PIPELINE: 2, **SEQUENCE}),
    ("PP2 x DP2", "dense", 4, 1, 4, {PIPELINE: 2, "use_distributed_optimizer": True}),
    ("CP2", "dense", 2, 4, 2, {CONTEXT: 2}),
    ("CP2 x PP2, sharded optimizer", "dense", 4, 2, 4, {CONTEXT: 2, PIPELINE: 2, **SHARDED}),
    ("CP2 x TP2 + SP", "dense", 4, 4, 2, {CONTEXT: 2, TENSOR: 2, **SEQUENCE}),
    ("PP2, everything recomputed", "dense", 2, 2, 4,
     {PIPELINE: 2, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ("FSDP engine", "experts", 1, 8, 1, {}),
    ("Megatron", "experts", 1, 4, 2, {"engine": "megatron"}),
    ("EP2 (DP2)", "experts", 2, 2, 2, {EXPERT: 2}),
    ("TP2 + SP", "experts", 2, 4, 2, {TENSOR: 2, **SEQUENCE}),
    ("CP2 x EP2 (DP1)", "experts", 2, 4, 2, {CONTEXT: 2, EXPERT: 2}),
    ("EP2 x PP2 (DP2)", "experts", 4, 2, 2, {EXPERT: 2, PIPELINE: 2}),
]  # fmt: skip
TITLES = ("loss", "objective", "grad_norm")


def prepare(folder):
    """The corpus, a dense Llama of four layers and a Mixtral of four experts -> the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    corpus.write(folder)
    sizes = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    models = {
        "dense": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
        "experts": MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes((folder / "model" / file).read_bytes())
    return folder


def config_of(folder, layout, **more):
    """The YAML of a layout: a warm-up of a few steps, then a new selection and mixture every four."""
    name, model, _, micro, accumulation, keys = layout
    often = {"warmup_step": 4, "update_step": 4, "update_times": 4}
    output = f"{model}-{name}".replace(" ", "-").replace(",", "")
    sizes = {
        "model_name_or_path": str(folder / model), "output_dir": str(folder / "out" / output), "max_steps": STEPS,
        "max_samples": 8,  # documents of a domain: a selection scores all of their windows
        "per_device_eval_batch_size": 64, "learning_rate": 1.0e-3, "weight_decay": 0.1, "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "adam_epsilon": 1.0e-6,  # with 1e-8, rounding alone decides the updates of gradients that are near zero
    }  # fmt: skip
    return runs.base(folder, **{**sizes, **ROLES, **often, **keys, **more})


def run_all(folder, layouts=LAYOUTS):
    """Run every layout, those of one number of processes together -> [(layout, log, selections)]."""
    configs = [config_of(folder, layout) for layout in layouts]
    for world in sorted({layout[2] for layout in layouts}):
        same_world = [config for config, layout in zip(configs, layouts, strict=True) if layout[2] == world]
        for config, (status, stderr) in zip(same_world, runs.train_many(world, same_world), strict=True):
            assert status == 0, f"{config['output_dir']}: {stderr}"
    return [(layout, *outcome(config)) for layout, config in zip(layouts, configs, strict=True)]


def outcome(config):
    """(lines of the log, chosen ids by update)."""
    selections = {
        path.name: json.loads(path.read_text())["indices"]
        for path in sorted((Path(config["output_dir"]) / "selections").glob("step_*.json"))
    }
    return runs.rows(config), selections


def differences(log, expected):
    """Largest relative difference over all steps, by column."""
    return {key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(log, expected, strict=True)) for key in TITLES}


def same_data(actual, expected):
    """Whether draws and selections are those of the first run, and mixtures and weights too, to rounding."""
    (log, selections), (log0, selections0) = actual, expected
    for row, row0 in zip(log, log0, strict=True):
        for key in ("proportions", "weights"):
            pairs = [(row[key][name], value) for name, value in (row0.get(key) or {}).items()]
            if not all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) for a, b in pairs):
                return False
        if row["drawn"] != row0["drawn"]:
            return False
    return selections == selections0


def main():
    """Print the table -> 0 when every line agrees."""
    with tempfile.TemporaryDirectory() as name:
        results = run_all(prepare(Path(name)))
    first = {}
    good = True
    print(f"{STEPS} steps, select + mix + weight; largest relative difference to the first line of each model")
    print(f"{'model':9}{'layout':36}{'processes':>10}{'loss':>10}{'objective':>11}{'grad norm':>11}  same data")
    for layout, log, selections in results:
        expected = first.setdefault(layout[1], (log, selections))
        relative = differences(log, expected[0])
        same = same_data((log, selections), expected)
        good &= same and max(relative.values()) < 1e-5
        numbers = "".join(f"{relative[key]:{width}.1e}" for key, width in zip(TITLES, (10, 11, 11), strict=True))
        print(f"{layout[1]:9}{layout[0]:36}{layout[2]:>10}{numbers}  {'yes' if same else 'NO'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
