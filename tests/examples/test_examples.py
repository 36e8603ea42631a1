"""Every YAML in examples/ trains on one and two processes with its own keys; only sizes and paths are overridden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataflex_mega.distributed.testing import free_port
from tests.support import corpus, runs

EXAMPLES = sorted((corpus.ROOT / "examples").glob("*.yaml"))
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data under the names of the demo's, so that the examples run as they are without a network."""
    root = corpus.write(tmp_path_factory.mktemp("examples"))
    info = json.loads((root / "data" / "dataset_info.json").read_text())
    domains = {"c4": "prose", "wiki": "code", "alpaca_text": "tables", "python": "code", "alpaca": "sft"}
    for name, real in domains.items():
        info[f"demo_{name}"] = info[f"demo_{name}_validation"] = info[real]
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


def shrunk(path, folder, world):
    config = yaml.safe_load(path.read_text())
    config.update(
        model_name_or_path=str(folder / "model"),
        dataset_dir=str(folder / "data"),
        output_dir=str(folder / f"{path.stem}-{world}"),
        cutoff_len=32,
        per_device_train_batch_size=2,
        max_steps=STEPS,
    )
    if config["stage"] == "pt":  # documents of each domain; a selection, a reference and an evaluation read all of them
        config["max_samples"] = 4 if "selector" in config else 12
    if "reference_model" in config:
        config["reference_model"] = str(folder / "model")
    if "train_step" in config:
        config["train_step"] = STEPS
    if "warmup_step" in config:
        config["warmup_step"] = 1
    if "update_step" in config:
        config["update_step"] = 1
    return config


@pytest.mark.parametrize("world", [1, 2])
def test_every_dynamic_example_trains(folder, world):
    configs = [shrunk(path, folder, world) for path in EXAMPLES]
    dynamic = [config for config in configs if config.get("train_type") != "static"]
    assert len(dynamic) >= 5
    for config, (status, stderr) in zip(dynamic, runs.train_many(world, dynamic), strict=True):
        assert status == 0, stderr
        assert [row["step"] for row in runs.rows(config)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", ["static", "all_roles"])
def test_the_commands_of_the_readme(folder, name):
    """`torchrun ... -m dataflex_mega.train YAML key=value`, as a user types it."""
    config = shrunk(corpus.ROOT / "examples" / f"{name}.yaml", folder, "typed")
    overrides = [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in config.items()
                 if not isinstance(value, dict | list)]  # fmt: skip
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*torchrun, "-m", "dataflex_mega.train", corpus.ROOT / "examples" / f"{name}.yaml", *overrides]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (Path(config["output_dir"]) / "model.safetensors").is_file()
