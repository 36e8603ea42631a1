"""`train_type: static` and `llamafactory-cli train` write equal bytes; a plain YAML needs no key of dataflex_mega."""

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
    bin_folder = str(Path(sys.executable).parent)  # LLaMA-Factory's launcher calls `torchrun` by its bare name
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
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


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_identical_weights(folder, world):
    digests = []
    bin_folder = Path(sys.executable).parent
    for name, command in (("peer", "llamafactory-cli"), ("ours", "dataflex-cli")):
        config = config_of(folder, f"{name}-{world}", **({"train_type": "static"} if name == "ours" else {}))
        path = folder / f"{name}-{world}.yaml"
        path.write_text(yaml.safe_dump(config))
        launch([str(bin_folder / command), "train", str(path)], world)
        digests.append(weights(config))
    assert digests[0] == digests[1]
