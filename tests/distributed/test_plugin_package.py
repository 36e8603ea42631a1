"""A pip-installed package adds a selector, a mixer and a weighter without a change to dataflex_mega."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataflex_mega.distributed.testing import free_port
from tests.support import corpus, packages, runs

pytestmark = pytest.mark.exhaustive

METHODS = '''
"""Three algorithms."""
from dataclasses import dataclass
import torch
from dataflex_mega.algorithms.base import Mixer, Selector, Weighter
from dataflex_mega.algorithms.requests import LossSignal
from dataflex_mega.plugins import register_mixer, register_selector, register_weighter


@register_selector("shortest_ids")
@dataclass
class ShortestIds(Selector):
    def requests(self):
        return (LossSignal(),)

    def score(self, table):
        return -table.sample_ids.float()

    def select(self, scores, count, context, rng):
        return torch.topk(scores, count).indices


@register_mixer("last_only")
@dataclass
class LastOnly(Mixer):
    share: float = 0.5

    def setup(self, domains):
        self._k = len(domains)

    def proportions(self, context, rng):
        rest = torch.full((self._k,), (1 - self.share) / (self._k - 1), dtype=torch.float64)
        rest[-1] = self.share
        return rest


@register_weighter("first_only")
@dataclass
class FirstOnly(Weighter):
    def weights(self, samples, step, total_steps):
        n = len(samples.sample_ids)
        weights = torch.zeros(n)
        weights[samples.sample_ids.argmin()] = n
        return weights
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as site-packages is, with the package in it."""
    return packages.install(tmp_path_factory.mktemp("package"), "my_data_methods", METHODS)


def with_site(installed):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}


def test_the_command_line_lists_them(installed):
    command = [sys.executable, "-m", "dataflex_mega", "components", "mixer"]
    listed = subprocess.run(command, env=with_site(installed), capture_output=True, text=True, check=True).stdout
    assert "last_only" in listed and "share: float = 0.5" in listed


def test_all_three_act_in_a_run_on_two_processes(installed, tmp_path):
    folder = corpus.write(tmp_path)
    config = runs.base(
        folder, selector="shortest_ids", mixer={"name": "last_only", "share": 0.75}, weighter="first_only",
        update_step=2, update_times=-1, per_device_train_batch_size=4, max_steps=4, weight_scope="step",
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *launcher, "-m", "dataflex_mega.train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=with_site(installed), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = runs.rows(config)
    assert all(row["drawn"] == {"code": 1, "prose": 1, "tables": 6} for row in rows), rows[0]["drawn"]
    assert all(row["weights"]["max"] == 8 and row["weights"]["min"] == 0 for row in rows), rows[0]["weights"]
    selected_ids = json.loads((Path(config["output_dir"]) / "selections" / "step_0.json").read_text())["indices"]
    assert len(selected_ids) == 16 and min(selected_ids) == 0
