"""`train_type: static` through us and `llamafactory-cli train` write the same bytes; a plain YAML needs no key of ours."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataflex_mega.distributed.testing import free_port
from tests.support import corpus, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("static"))


def launch(arguments, world):
    here = str(Path(sys.executable).parent)  # LLaMA-Factory's launcher calls `torchrun` by its bare name
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{here}:{os.environ['PATH']}",
    }
    if world > 1:
        environment.update(
            FORCE_TORCHRUN="1", NPROC_PER_NODE=str(world), MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo"
        )
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=corpus.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def config_of(folder, name, **keys):
    options = {
        "tensorboard": None,
        "report_to": "none",
        "do_train": True,
        "max_steps": 4,
        "save_strategy": "no",
        **keys,
    }
    return runs.base(folder, output_dir=str(folder / name), **options)


def weights(config):
    return hashlib.sha256((Path(config["output_dir"]) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("world", [1, 2])
def test_identical_weights(folder, world):
    made = []
    here = Path(sys.executable).parent
    for name, command in (("peer", "llamafactory-cli"), ("ours", "dataflex-cli")):
        config = config_of(folder, f"{name}-{world}", **({"train_type": "static"} if name == "ours" else {}))
        path = folder / f"{name}-{world}.yaml"
        path.write_text(yaml.safe_dump(config))
        launch([str(here / command), "train", str(path)], world)
        made.append(weights(config))
    assert made[0] == made[1]


def test_a_preference_stage_runs_too(folder):
    """Static training takes every stage of LLaMA-Factory, not only those that the dynamic engine has."""
    rows = [
        {"instruction": r["instruction"], "input": "", "chosen": r["output"], "rejected": r["output"][::-1]}
        for r in corpus.instructions(24)
    ]
    import json

    (folder / "data" / "pairs.json").write_text(json.dumps(rows))
    info = json.loads((folder / "data" / "dataset_info.json").read_text())
    info["pairs"] = {
        "file_name": "pairs.json", "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
    }  # fmt: skip
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    config = config_of(
        folder,
        "dpo",
        stage="dpo",
        dataset="pairs",
        template="default",
        finetuning_type="lora",
        lora_rank=4,
        max_steps=2,
    )
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(config))
    launch([sys.executable, "-m", "dataflex_mega.train", str(path)], 1)
    assert (Path(config["output_dir"]) / "adapter_model.safetensors").is_file()
