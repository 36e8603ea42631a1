"""LoRA on a quantised base: the losses of one process on every layout, a bit-equal restart, an adapter that can be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dataflex_mega.engines.fsdp.parallel import FSDPLayout, parallelize
from tests.support import corpus, runs

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")

ROLES = {
    "selector": {"name": "loss"}, "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": {"name": "loss"},
    "warmup_step": 1, "update_step": 2, "update_times": 5, "max_samples": 12,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all", "quantization_bit": 4}
SHARDED = {"fsdp": "full_shard"}
LESS = {
    "selector": {"name": "less", "checkpoints": 2}, "mixer": None, "weighter": None, "warmup_step": 2, "update_step": 2,
    "update_times": 2, "eval_dataset": "tables,prose", "eval_on_each_dataset": True, "max_samples": 4,
}  # fmt: skip
JOINT = {
    "weighter": {"name": "joint_update_aware", "tau": 0.2, "target_update_step": 2}, "weight_scope": "step",
    "selector": None, "mixer": None, "warmup_step": 1, "update_step": None, "update_times": None, "max_samples": None,
    "eval_dataset": "tables",
}  # fmt: skip
GREATS = {**JOINT, "weighter": {"name": "greats"}, "weight_scope": None, "max_samples": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("quantized"))


def config_of(folder, name, **keys):
    options = {"max_steps": 4, "per_device_train_batch_size": 4, **LORA, **ROLES, **keys}
    return runs.base(folder, output_dir=str(folder / name), **options)


def losses(config):
    return [row["loss"] for row in runs.rows(config)]


def numbers(config):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in runs.rows(config)]


def evaluations(config):
    log = json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    return [row["eval_loss"] for row in log if "eval_loss" in row]


def trained(world, configs, plain=False):
    results = runs.train_many(world, configs, plain=plain)
    assert [status for status, _ in results] == [0] * len(configs), [stderr[-600:] for _, stderr in results]
    return [losses(config) for config in configs]


# -- the packed bytes -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer whose base is quantised."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.LayerNorm(64, dtype=torch.bfloat16)
        self.base = bitsandbytes.nn.Linear4bit(
            64, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=torch.bfloat16
        )
        self.down = nn.Linear(96, 64)

    def forward(self, x):
        return self.down(self.base(self.norm(x)))


def bytes_through_shards(parallel_info):
    block = Block().to("cpu")
    before = block.base.weight.data.clone().view(torch.uint8)
    module = nn.Sequential(block)
    module.requires_grad_(False)
    block.down.requires_grad_(True)
    parallelize(module, FSDPLayout("fsdp2", "bf16", layer_classes=("Block",)), parallel_info)
    assert block.down.weight.dtype == block.norm.weight.dtype == torch.float32
    inputs = torch.randn(2, 64)
    for training in (True, False):  # with gradients, and as scores are computed
        module.train(training)
        with torch.set_grad_enabled(training):
            output = module(inputs).float()
        if training:
            output.sum().backward()
    shard = block.base.weight
    assert shard.to_local().shape[0] == before.shape[0] // 2  # as many on each rank
    return bool(torch.equal(shard.full_tensor().view(torch.uint8), before))


def test_sharding_in_bf16_keeps_every_packed_byte():
    assert runs.run_forked(bytes_through_shards, 2) == [True, True]


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_nf4_with_three_roles_trains_alike_on_every_layout(folder):
    configs = [config_of(folder, "ddp"), config_of(folder, "fsdp2", **SHARDED)]
    ddp, fsdp2 = trained(2, configs)
    (single,) = trained(1, [config_of(folder, "single", per_device_train_batch_size=8)], plain=True)
    assert ddp == pytest.approx(single, abs=2e-6)
    assert fsdp2 == pytest.approx(single, abs=2e-6)
    assert single[-1] != single[0]
    with safe_open(str(folder / "fsdp2" / "adapter_model.safetensors"), framework="pt") as file:
        assert {name.split(".")[-2] for name in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118


KINDS = {
    "fp4": {"quantization_type": "fp4", "double_quantization": False},
    "bf16": {"bf16": True},
    "checkpointed": {"disable_gradient_checkpointing": False},
    "less": LESS,
    "greats": GREATS,
    "joint": JOINT,
}


@pytest.mark.exhaustive
def test_every_kind_trains_alike_on_every_layout(folder):
    kinds = list(KINDS)
    twos = [config_of(folder, f"{kind}-{mode}", **KINDS[kind], **keys)
            for kind in kinds for mode, keys in (("ddp", {}), ("fsdp2", SHARDED))]  # fmt: skip
    ones = [config_of(folder, f"{kind}-one", **{"per_device_train_batch_size": 8, **KINDS[kind]}) for kind in kinds]
    two, one = trained(2, twos), trained(1, ones, plain=True)
    for number, kind in enumerate(kinds):
        near = 1e-3 if kind == "bf16" else 2e-5
        assert two[2 * number] == pytest.approx(one[number], abs=near), kind
        assert two[2 * number + 1] == pytest.approx(one[number], abs=near), kind


@pytest.mark.exhaustive
def test_a_run_resumes_bit_equal_and_its_adapter_gives_its_evaluation_loss(folder):
    evaluation = {"eval_dataset": "tables", "eval_strategy": "steps", "eval_steps": 2}
    config = config_of(folder, "saved", **evaluation, save_strategy="steps", save_steps=2)
    trained(2, [config])
    whole, measured = numbers(config), evaluations(config)
    shutil.rmtree(Path(config["output_dir"]) / "checkpoint-4")
    trained(2, [config])
    assert numbers(config) == whole
    again = config_of(folder, "again", **evaluation, adapter_name_or_path=config["output_dir"], learning_rate=0.0)
    trained(2, [again])
    assert evaluations(again) == pytest.approx([measured[-1], measured[-1]], abs=1e-6)
    assert measured[-1] != measured[0]


@pytest.mark.exhaustive
def test_int8_is_refused_on_shards_at_start(folder):
    ((status, stderr),) = runs.train_many(2, [config_of(folder, "int8", quantization_bit=8, **SHARDED)])
    assert status == 2 and "quantization_bit: with fsdp" in stderr.splitlines()[-1]
