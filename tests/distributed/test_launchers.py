"""A run that DeepSpeed or accelerate would lay out is the run of the same `fsdp` key, on two processes."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.support import corpus, runs

SELECT = {"selector": {"name": "loss"}, "warmup_step": 1, "update_step": 1, "update_times": 2, "max_steps": 4}
AUTO = {"gradient_clipping": "auto", "train_batch_size": "auto", "bf16": {"enabled": "auto"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("launchers"))


def config_of(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / "out" / name), logging_steps=1, **{**SELECT, **keys})


def losses(config):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in runs.rows(config)]


def zero(stage, **keys):
    return {**AUTO, "zero_optimization": {"stage": stage, **keys}}


def test_stage_3_trains_and_resumes_as_full_shard(folder):
    keys = {"selector": None, "weighter": "loss", "warmup_step": None, "update_step": None, "update_times": None}
    keys |= {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    path = folder / "ds_z3.json"
    path.write_text(json.dumps(zero(3)))
    whole = config_of(folder, "whole", fsdp="full_shard auto_wrap", **keys)
    first = config_of(folder, "half", deepspeed=str(path), **{**keys, "max_steps": 2})
    second = {**first, "max_steps": 4, "fsdp": "full_shard"}
    del second["deepspeed"]
    finished = runs.train_many(2, [whole, first, second])
    assert [status for status, _ in finished] == [0, 0, 0], finished
    assert f"note: deepspeed: {path}: fsdp: full_shard" in finished[1][1]
    assert losses(second) == losses(whole) and len(losses(whole)) == 4


@pytest.mark.exhaustive
def test_deepspeed_stages_train_as_their_layouts(folder):
    cpu = {"device": "cpu", "pin_memory": True}
    offload = zero(3, offload_optimizer=cpu, offload_param=cpu)
    pairs = {
        "full": ({"fsdp": "full_shard"}, {"deepspeed": zero(3)}),
        "grad": ({"fsdp": "shard_grad_op"}, {"deepspeed": zero(2)}),
        "offload": ({"fsdp": "full_shard offload"}, {"deepspeed": offload}),
        "ddp": ({}, {"deepspeed": zero(0)}),
    }
    configs = [config_of(folder, f"{name}{i}", **keys) for name, pair in pairs.items() for i, keys in enumerate(pair)]
    finished = runs.train_many(2, configs)
    assert [status for status, _ in finished] == [0] * len(configs), finished
    for number in range(0, len(configs), 2):
        assert "note: deepspeed: " in finished[number + 1][1] and "note: deepspeed: " not in finished[number][1]
        assert losses(configs[number]) == losses(configs[number + 1])
        assert len(losses(configs[number])) == 4


@pytest.fixture
def started(monkeypatch):
    """What a run was given, and the variables of its time; nothing is trained."""
    from dataflex_mega.run import build

    seen = []
    monkeypatch.setattr(build, "run_training", lambda config, *_: seen.append((config, dict(os.environ))))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    return seen


def test_variables_of_accelerate_are_gone_while_a_run_lasts(folder, started):
    before = {name: value for name, value in os.environ.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
    config = config_of(folder, "accelerated")
    for _ in range(2):
        status, stderr = runs.train_here(config)
        assert status == 0 and "note: accelerate launch: fsdp: full_shard, bf16: true; 1 FSDP variable" in stderr
        assert before.items() <= os.environ.items()
    for found, environment in started:
        assert found.llamafactory["fsdp"] == "full_shard" and found.llamafactory["bf16"] is True
        assert not [name for name in environment if name.startswith(("FSDP_", "ACCELERATE_"))]


def test_a_contradiction_with_accelerate_is_found_before_torchrun_starts(folder, started, monkeypatch):
    from dataflex_mega.commands._launcher import check_configuration
    from dataflex_mega.errors import ConfigError

    path = folder / "contradiction.yaml"
    path.write_text(yaml.safe_dump(config_of(folder, "contradiction", fsdp="shard_grad_op")))
    with pytest.raises(ConfigError, match="FSDP_RESHARD_AFTER_FORWARD=true .* contradicts fsdp: shard_grad_op"):
        check_configuration([str(path)])
    path.write_text(yaml.safe_dump(config_of(folder, "sizes", deepspeed={"train_batch_size": 8})))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    with pytest.raises(ConfigError, match="train_batch_size: 8 contradicts .* x 2 processes, which is 16"):
        check_configuration([str(path)])


def test_a_program_under_accelerate_trains_as_it_was_launched(folder, started):
    import contextlib

    from dataflex_mega import api

    with contextlib.ExitStack() as stack:
        config = api._parse(config_of(folder, "api"), True, stack)
        assert config.llamafactory["fsdp"] == "full_shard" and "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.exhaustive
def test_full_training_shapes_of_dataflex_run_with_their_deepspeed_file(folder):
    corpus.write_experts(folder)
    corpus.write_reference(folder)
    path = folder / "ds_z3_config.json"
    path.write_text(json.dumps(zero(3, overlap_comm=False, stage3_max_live_parameters=1e9)))
    common = {
        "do_train": True, "trust_remote_code": True, "deepspeed": str(path), "flash_attn": "fa2", "overwrite_cache": True,
        "report_to": "none", "bf16": True, "ddp_timeout": 180000000, "warmup_ratio": 0.05, "save_only_model": True,
        "overwrite_output_dir": True, "mixture_sample_rule": "mixture", "train_type": "dynamic_mix", "dataset": "prose,code",
        "selector": None, "disable_gradient_checkpointing": None, "max_samples": 40,
    }  # fmt: skip
    mixture = {"init_mixture_proportions": [0.3, 0.7], "train_from_scratch": True, "eval_dataset": "code"}
    reference = {"reference_model": str(folder / "reference")}
    experts = {"freeze_gate": True, "train_step": 4, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
    configs = [
        config_of(folder, "doremi1", component_name="static", static_mix=True, **common, **mixture, num_train_epochs=1),
        config_of(folder, "doremi2", component_name="doremi", **common, **mixture, **reference),
        config_of(folder, "odm", component_name="odm", **common, **mixture),
        config_of(
            folder, "moe", component_name="dynamic_moe", model_name_or_path=str(folder / "moe"),
            mixer_eval_dataset="prose,code", **common, **experts,
        ),
    ]  # fmt: skip
    for config in configs[:1]:  # static_mix has no updates
        for key in ("warmup_step", "update_step", "update_times"):
            config.pop(key)
    for config, (status, stderr) in zip(configs, runs.train_many(2, configs), strict=True):
        assert status == 0, f"{config['output_dir']}: {stderr}"
        assert stderr.count(f"note: deepspeed: {path}: fsdp: full_shard; 2 tuning keys have no counterpart") == 1
        assert len(runs.rows(config)) == 4


ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "FSDP", "downcast_bf16": "no",
    "machine_rank": 0, "main_training_function": "main", "mixed_precision": "no", "num_machines": 1, "num_processes": 2,
    "rdzv_backend": "static", "same_network": True, "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False,
    "use_cpu": True, "main_process_port": 0,
}  # fmt: skip
FSDP = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_cpu_ram_efficient_loading": True, "fsdp_forward_prefetch": False, "fsdp_offload_params": False,
    "fsdp_sharding_strategy": "FULL_SHARD", "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_sync_module_states": True,
    "fsdp_use_orig_params": True,
}  # fmt: skip
SHOW = """import sys
from dataflex_mega.engines.fsdp import engine
from dataflex_mega.train import main
made = engine.FSDPEngine.__post_init__
def shown(self):
    made(self)
    print("LAYOUT", self.parallel_info.rank, self.runner.layout.mode, self.runner.layout.precision, flush=True)
engine.FSDPEngine.__post_init__ = shown
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("entry", ["script", "cli"])
def test_accelerate_launch_with_an_fsdp_file_shards(folder, entry):
    work = folder / entry
    work.mkdir()
    (work / "fsdp.yaml").write_text(yaml.safe_dump({**ACCELERATE, "mixed_precision": "bf16", "fsdp_config": FSDP}))
    (work / "show.py").write_text(SHOW)
    config = config_of(folder, entry, max_steps=2)
    (work / "run.yaml").write_text(yaml.safe_dump(config))
    program = {
        "script": [str(work / "show.py")], "module": ["-m", "dataflex_mega.train"], "cli": ["-m", "dataflex_mega", "train"],
    }[entry]  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(work / "fsdp.yaml"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(corpus.ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([*launch, *program, str(work / "run.yaml")], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("note: accelerate launch: fsdp: full_shard, bf16: true; 8 FSDP variables have no") == 1
    if entry == "script":
        lines = sorted(line for line in found.stdout.splitlines() if line.startswith("LAYOUT"))
        assert lines == ["LAYOUT 0 fsdp2 bf16", "LAYOUT 1 fsdp2 bf16"]
    plain = config_of(folder, f"{entry}-plain", max_steps=2, fsdp="full_shard", bf16=True)
    assert [status for status, _ in runs.train_many(2, [plain])] == [0]
    assert losses(config) == losses(plain)
