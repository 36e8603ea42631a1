"""A DeepSpeed configuration becomes a layout and keys of the run; nothing in it is ignored in silence."""

import dataclasses
import json

import pytest

from dataflex_mega.config import deepspeed_schema as schema
from dataflex_mega.config.deepspeed import translate
from dataflex_mega.config.deepspeed_values import Ranks
from dataflex_mega.config.identity import identity
from dataflex_mega.config.launcher_keys import DEFAULTS, LauncherKeys
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError
from tests.unit.config.conftest import LF_KEYS

KEYS = {
    **LF_KEYS, "max_grad_norm": float, "adam_beta1": float, "adam_beta2": float, "adam_epsilon": float,
    "lr_scheduler_type": str, "warmup_steps": float, "warmup_ratio": float | None, "weight_decay": float,
}  # fmt: skip
FP16 = {
    "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
    "min_loss_scale": 1,
}  # fmt: skip
AUTO = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "fp16": FP16, "bf16": {"enabled": "auto"},
}  # fmt: skip
STAGE_2 = {
    "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False, "reduce_scatter": True,
    "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True,
}  # fmt: skip
STAGE_3 = {
    "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
CPU = {"device": "cpu", "pin_memory": True}


def config(stage, **keys):
    """A file as LLaMA-Factory and DataFlex ship them, for a stage."""
    tuning = STAGE_3 if stage == 3 else STAGE_2
    return {**AUTO, "zero_optimization": {"stage": stage, **tuning, **keys}}


def parse(deepspeed, environment=None, **keys):
    return parse_config({"weighter": "loss", "deepspeed": deepspeed, **keys}, KEYS, None, environment)


def taken(deepspeed, environment=None, **keys):
    """The keys that the run has beside its own."""
    found = parse(deepspeed, environment, **keys).llamafactory
    assert "deepspeed" not in found
    return {key: value for key, value in found.items() if key not in keys}


def fails(deepspeed, environment=None, **keys):
    with pytest.raises(ConfigError) as caught:
        parse(deepspeed, environment, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


SHIPPED = {
    "ds_z0_config.json": (config(0), {}, "DistributedDataParallel", 8),
    "ds_z2_config.json": (config(2), {"fsdp": "shard_grad_op"}, "fsdp: shard_grad_op for ZeRO-2", 8),
    "ds_z2_offload_config.json": (
        config(2, offload_optimizer=CPU),
        {"fsdp": "shard_grad_op offload"},
        "fsdp: shard_grad_op offload for ZeRO-2; parameters are offloaded too",
        8,
    ),
    "ds_z3_config.json": (config(3), {"fsdp": "full_shard"}, "fsdp: full_shard", 9),
    "ds_z3_offload_config.json": (
        config(3, offload_optimizer=CPU, offload_param=CPU),
        {"fsdp": "full_shard offload"},
        "fsdp: full_shard offload",
        9,
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_files_of_both_peers_become_a_layout(tmp_path, name):
    content, keys, layout, tuning = SHIPPED[name]
    path = tmp_path / name
    path.write_text(json.dumps(content))
    assert taken(str(path)) == keys
    assert parse(str(path)).notes == [f"deepspeed: {path}: {layout}; {tuning} tuning keys have no counterpart"]


def test_files_for_what_is_not_there_are_refused_by_name():
    parallel = {**config(2), "tensor_parallel": {"autotp_size": 2}}
    assert "tensor_parallel.autotp_size: 2" in fails(parallel) and "engine: megatron" in fails(parallel)
    fp8 = {**config(3), "fp8": {"enabled": True, "loss_scale_window": 1000}}
    assert fails(fp8) == "deepspeed: fp8: not supported; use bf16: true"
    ulysses = {**config(3), "sequence_parallel": {"enabled": True, "size": 4}}
    assert fails(ulysses).startswith("deepspeed: sequence_parallel: not supported; engine: megatron has")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}},
         "zero_optimization.offload_param.device: NVMe offload is not there; device: cpu is"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
         "zero_optimization.offload_optimizer.device: NVMe offload is not there; device: cpu is"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
         "zero_optimization.offload_param: needs stage: 3, found stage: 2"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
         "zero_optimization.offload_optimizer: needs stage: 1, 2 or 3, found stage: 0"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpuu"}}},
         "zero_optimization.offload_param.device: expected one of none, cpu, nvme, found 'cpuu' (did you mean 'cpu'?)"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
         "zero_optimization.zero_hpz_partition_size: 8 is not supported; ZeRO++"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
         "zero_optimization.zero_quantized_weights: not supported; ZeRO++"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
         "zero_optimization.zero_quantized_gradients: not supported; ZeRO++"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}},
         "zero_optimization.mics_shard_size: 4 is not supported; MiCS"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, found 4"),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage: expected a number or auto, found 'three'"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: expected a number or auto, found True"),
        ({"zero_optimization": {"stage": 2.5}}, "zero_optimization.stage: expected a whole number >= 0 or auto, found 2.5"),
        ({"zero_optimization": [3]}, "zero_optimization: expected a mapping, found [3]"),
        ({"zero_optimizaton": {"stage": 3}},
         "zero_optimizaton: not a key of a DeepSpeed configuration (did you mean 'zero_optimization'?)"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}},
         "zero_optimization.overlap_com: not a key of a DeepSpeed configuration (did you mean 'overlap_comm'?)"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"pin_memry": True}}},
         "zero_optimization.offload_optimizer.pin_memry: not a key of a DeepSpeed configuration (did you mean 'pin_"),
        ({"fp16": {"enable": True}}, "fp16.enable: not a key of a DeepSpeed configuration (did you mean 'enabled'?)"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled: expected auto, true or false, found 'yes'"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled: true contradicts deepspeed: bf16.enabled"),
        ({"pipeline": {"stages": 2}}, "pipeline: not supported; engine: megatron has"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: 2 is not supported; engine: megatron has"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}},
         "activation_checkpointing.cpu_checkpointing: not supported"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: expected AdamW or Adam, found 'Lamb'; write optim:"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type: expected AdamW or Adam, found 'OneBitAdam'"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
         "optimizer.params.adam_w_mode: false is not supported"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}, "optimizer.params.betas: expected two numbers or auto"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type: expected WarmupLR or WarmupDecayLR, found 'OneCycle'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}}},
         "scheduler.params.warmup_min_lr: a warm-up begins at 0, found 1e-06"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}}},
         "scheduler.params.total_num_steps: 100 needs max_steps: 100, found none"),
        ({"gradient_clipping": -1}, "gradient_clipping: expected a number >= 0, found -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected a whole number >= 1 or auto, found 0"),
        ({"train_micro_batch_size_per_gpu": float("inf")}, "train_micro_batch_size_per_gpu: expected a whole number"),
        ({"train_micro_batch_size_per_gpu": float("nan")}, "train_micro_batch_size_per_gpu: expected a number or auto"),
        *[({key: {"enabled": True}}, f"{key}: not supported; ") for key in sorted(schema.REFUSED)],
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(keys, message):
    assert fails(keys).startswith(f"deepspeed: {message}")


@pytest.mark.parametrize("key", sorted(schema.REFUSED))
def test_what_is_refused_may_be_off(key):
    assert taken({"zero_optimization": {"stage": 3}, key: {"enabled": False}}) == {"fsdp": "full_shard"}
    assert taken({"zero_optimization": {"stage": 3}, key: {}}) == {"fsdp": "full_shard"}


@pytest.mark.parametrize(
    ("deepspeed", "keys", "message"),
    [
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 1.0}, "gradient_clipping: 0.5 contradicts max_grad_norm: 1.0"),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 2},
         "gradient_accumulation_steps: 4 contradicts gradient_accumulation_steps: 2"),
        ({"train_micro_batch_size_per_gpu": 4}, {"per_device_train_batch_size": 2},
         "train_micro_batch_size_per_gpu: 4 contradicts per_device_train_batch_size: 2"),
        ({"bf16": {"enabled": True}}, {"bf16": False}, "bf16.enabled: true contradicts bf16: false"),
        ({"bf16": {"enabled": True}}, {"fp16": True}, "bf16.enabled: true contradicts fp16: true"),
        ({"bf16": {"enabled": False}}, {"bf16": True}, "bf16.enabled: false contradicts bf16: true"),
        ({"fp16": {"enabled": False}}, {"fp16": True}, "fp16.enabled: false contradicts fp16: true"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, {"learning_rate": 1e-3},
         "optimizer.params.lr: 0.0001 contradicts learning_rate: 0.001"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}, {"weight_decay": 0.0},
         "optimizer.params.weight_decay: 0.1 contradicts weight_decay: 0.0"),
        ({"optimizer": {"type": "AdamW"}}, {"optim": "sgd"}, "optimizer.type: AdamW contradicts optim: sgd"),
        ({"scheduler": {"type": "WarmupLR"}}, {"lr_scheduler_type": "cosine"},
         "scheduler.type: WarmupLR contradicts lr_scheduler_type: cosine"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, {"warmup_ratio": 0.1},
         "scheduler.params.warmup_num_steps: 5 contradicts warmup_ratio: 0.1"),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_sides(deepspeed, keys, message):
    assert fails(deepspeed, **keys) == f"deepspeed: {message}; drop one of them"


@pytest.mark.parametrize("key", ["fsdp", "fsdp_config"])
def test_two_layouts_are_refused(key):
    value = "full_shard" if key == "fsdp" else {"reshard_after_forward": True}
    assert fails(config(3), **{key: value}) == f"deepspeed and {key}: both lay the run out; drop one of them"
    assert parse(config(3), fsdp="", fsdp_config={}).llamafactory["fsdp"] == "full_shard"


def test_numbers_are_taken_where_the_configuration_has_none():
    deepspeed = {
        "gradient_clipping": 0.5, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 16, "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4, "warmup_num_steps": 5}},
    }  # fmt: skip
    assert taken(deepspeed, {"WORLD_SIZE": "2"}) == {
        "max_grad_norm": 0.5, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "bf16": True,
        "learning_rate": 1e-4, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5,
    }  # fmt: skip
    assert (
        parse(deepspeed)
        .notes[0]
        .endswith("lr_scheduler_type: constant_with_warmup, warmup_steps: 5; the warm-up is linear")
    )


def test_auto_and_defaults_set_nothing():
    deepspeed = {
        "gradient_clipping": 1.0, "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": False}, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_type": "linear"}},
    }  # fmt: skip
    assert taken(deepspeed) == {}


@pytest.mark.parametrize(
    ("world", "total", "fits"), [("2", 32, True), ("2", 16, False), ("4", 64, True), ("gpu", 17, True)]
)
def test_the_global_batch_is_checked_where_the_processes_are_known(world, total, fits):
    environment, sizes = {"WORLD_SIZE": world}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    if fits:
        assert taken({"train_batch_size": total}, environment, **sizes) == {}
    else:
        assert fails({"train_batch_size": total}, environment, **sizes) == (
            "deepspeed: train_batch_size: 16 contradicts per_device_train_batch_size: 4 x gradient_accumulation_steps: 4 x "
            "2 processes, which is 32; correct one of them, or write auto"
        )


def test_the_loss_scale_of_fp16():
    fp16 = {**FP16, "enabled": True, "loss_scale_window": 500, "initial_scale_power": 12}
    assert taken({"fp16": fp16}) == {
        "fp16": True,
        "fsdp_config": {"initial_scale_power": 12, "loss_scale_window": 500, "min_loss_scale": 1},
    }
    assert "the scale is halved at the first overflow" in parse({"fp16": fp16}).notes[0]
    assert taken({"fp16": {**fp16, "loss_scale": 128}})["fsdp_config"] == {"loss_scale": 128}
    assert "fsdp_config" not in taken({"fp16": {**fp16, "enabled": False}})
    assert "fsdp_config" in taken(AUTO, fp16=True)


def test_memory_that_is_not_pinned():
    loose = {"device": "cpu", "pin_memory": False}
    assert taken(config(3, offload_param=loose)) == {"fsdp": "full_shard offload", "fsdp_config": {"pin_memory": False}}
    assert taken(config(3, offload_param=loose, offload_optimizer=CPU)) == {"fsdp": "full_shard offload"}
    partial = parse(config(3, offload_optimizer={"device": "cpu", "ratio": 0.5})).notes[0]
    assert "everything is offloaded, not a share of 0.5" in partial


def test_on_megatron_zero_is_the_distributed_optimizer():
    for stage in (1, 2, 3):
        found = parse(config(stage), engine="megatron")
        assert found.megatron.use_distributed_optimizer and "fsdp" not in found.llamafactory
        assert f"use_distributed_optimizer: true for ZeRO-{stage}" in found.notes[0]
    assert not parse(config(0), engine="megatron").megatron.use_distributed_optimizer
    offload = parse(config(2, offload_optimizer={"device": "cpu", "ratio": 0.5}), engine="megatron").megatron
    assert offload.optimizer_cpu_offload and offload.optimizer_offload_fraction == 0.5
    message = fails(config(3), engine="megatron", use_distributed_optimizer=False)
    assert message.startswith("deepspeed: zero_optimization.stage: 3 contradicts use_distributed_optimizer: false")
    assert "offload_param" in fails(config(3, offload_param=CPU), engine="megatron")
    assert parse({"train_batch_size": 16}, {"WORLD_SIZE": "4"}, engine="megatron", tensor_model_parallel_size=2).notes


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ds.json", None, "not found"),
        ("ds.json", "{", "line 1"),
        ("ds.json", "[1]", "expected a JSON object"),
        ("ds.json", '{"fp16": {}, "fp16": {}}', "'fp16' is given twice"),
        ("ds.json", '{"a":' * 100_000, "nested more than 200"),
        ("ds.txt", "{}", "expected a file that ends in .json"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    found = fails(str(path))
    assert found.startswith("deepspeed: ") and name in found and message in found


def test_json_text_and_a_neighbour(tmp_path):
    assert taken('{"zero_optimization": {"stage": 3}}') == {"fsdp": "full_shard"}
    assert fails('{"zero_optimization": ').startswith("deepspeed: not JSON")
    (tmp_path / "ds_z3_config.json").write_text("{}")
    assert "did you mean 'ds_z3_config.json'?" in fails(str(tmp_path / "ds_z3_confg.json"))


def test_a_run_is_the_same_run_in_either_spelling():
    def of(**keys):
        return identity(parse_config({"weighter": "loss", **keys}, KEYS), 16, {}, {})

    plain = of(fsdp="full_shard", bf16=True, max_grad_norm=0.5)
    assert of(deepspeed={**config(3), "bf16": {"enabled": True}, "gradient_clipping": 0.5}) == plain
    assert of(deepspeed=config(2), bf16=True, max_grad_norm=0.5) == plain
    assert of(fsdp="full_shard", bf16=True) != plain


def test_every_key_of_the_schema_has_one_fate():
    fates = [schema.ACTED_ON, schema.TUNING, set(schema.REFUSED)]
    assert sum(map(len, fates)) == len(set().union(*fates))
    zero = [schema.ZERO_ACTED_ON, schema.ZERO_TUNING, schema.GATHERS_WEIGHTS, set(schema.ZERO_REFUSED)]
    assert sum(map(len, zero)) == len(set().union(*zero))
    assert taken({"_comment": "x", "fp16": {"_comment": "y"}, "zero_optimization": {"_comment": "z", "stage": 3}}) == {
        "fsdp": "full_shard"
    }
    for key in schema.TUNING:
        assert parse({key: 1}).notes == ["deepspeed: DistributedDataParallel; 1 tuning key has no counterpart"]


def test_the_defaults_are_those_of_llamafactory():
    from dataflex_mega.llamafactory.compat import ensure_importable

    ensure_importable()
    from llamafactory.hparams import TrainingArguments

    for key, value in DEFAULTS.items():
        field = {f.name: f for f in dataclasses.fields(TrainingArguments)}[key]
        default = field.default_factory() if callable(field.default_factory) else field.default
        assert (default or 0) == (value or 0), key


def test_the_batch_is_known_only_with_an_environment():
    keys = LauncherKeys({})
    assert translate({"train_batch_size": 3}, keys, Ranks("fsdp", None)) == {}
    assert keys.taken == {}
