"""Every registered algorithm in whole runs, with equal results on one and two processes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dataflex_mega.registry import CONTRACTS, list_builtin_names
from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

SELECT = {"warmup_step": 1, "update_step": 1, "update_times": 3, "max_steps": 4, "max_samples": 6}
ORDER = {"warmup_step": 1, "update_step": 2, "update_times": 2, "max_steps": 4, "max_samples": 12}
MIX = {
    "warmup_step": 1, "update_step": 1, "update_times": -1, "max_samples": 12, "init_mixture_proportions": [0.5, 0.3, 0.2]
}  # fmt: skip
PARAMETERS = {
    ("selector", "nice"): {"mc_samples": 2, "max_new_tokens": 4},
    ("selector", "coincide"): {"num_clusters": 7, "embedding_layers": [-1]},  # Megatron has the last one only
    ("selector", "near"): {"indices_path": "NEAR"},
    ("selector", "tsds"): {"probs_path": "TSDS"},
    ("mixer", "ado"): {"start_step": 2, "refit_every": 1, "ignore_steps": 0},
    ("mixer", "dynamic_moe"): {"count_steps": 1},
}
# These need prompts with answers.
SFT = {"stage": "sft", "template": "default", "dataset": "sft", "eval_dataset": "sft", "max_samples": 12}
PROMPTS = {("selector", "nice")}
PATTERNS = ("saw", "shuffle")  # with scores and without; what another does with them is arithmetic, see its unit tests
EXPERTS = {("mixer", "dynamic_moe")}  # these need a mixture of experts
REFERENCE = {("selector", "rho_loss"), ("mixer", "doremi"), ("weighter", "rho1")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = corpus.write_experts(corpus.write(tmp_path_factory.mktemp("algorithms")))
    return corpus.write_reference(root)


def pool_size(folder):
    """Samples of the pool of a selection, from a short run without one."""
    config = runs.base(folder, output_dir=str(folder / "size"), mixer="static", **{**SELECT, "max_steps": 1})
    assert runs.train_many(1, [config], plain=True)[0][0] == 0
    return int(config_epoch(config))


def config_epoch(config):
    """An epoch is as many samples as the pool has: batch of 8 / epoch after one step."""
    state = json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())
    return round(8 / state["epoch"])


@pytest.fixture(scope="module")
def configs(folder):
    size = pool_size(folder)
    rng = np.random.default_rng(0)
    np.save(folder / "near.npy", rng.permutation(size)[: size // 2 * 2].reshape(2, -1))
    np.save(folder / "tsds.npy", rng.dirichlet(np.ones(size)))
    files = {"NEAR": str(folder / "near.npy"), "TSDS": str(folder / "tsds.npy")}
    configs_by_name = {}
    for kind in CONTRACTS:
        for name in list_builtin_names(kind):
            if kind == "reorder" and name not in PATTERNS:
                continue
            parameters = PARAMETERS.get((kind, name), {})
            spec = {"name": name, **{key: files.get(str(value), value) for key, value in parameters.items()}}
            keys = {"selector": SELECT, "mixer": MIX, "reorder": ORDER, "weighter": {"max_samples": 12}}[kind]
            if (kind, name) in REFERENCE:
                keys = {**keys, "reference_model": str(folder / "reference")}
            if (kind, name) in EXPERTS:
                keys = {**keys, "model_name_or_path": str(folder / "moe")}
            keys = {"eval_dataset": "tables", **keys, **(SFT if (kind, name) in PROMPTS else {})}
            configs_by_name[kind, name] = runs.base(
                folder, output_dir=str(folder / f"{kind}-{name}"), **keys, **{kind: spec}
            )
    return configs_by_name


def outcome(config):
    paths = sorted((Path(config["output_dir"]) / "selections").glob("step_*.json"))
    return runs.rows(config), [json.loads(path.read_text())["indices"] for path in paths]


def agree(key, config, other):
    """The two runs of an algorithm chose, drew and lost the same."""
    (log, selections), (log2, selections2) = outcome(config), outcome(other)
    assert selections == selections2 and (len(selections) == 3) == (key[0] == "selector"), key
    for row, row2 in zip(log, log2, strict=True):
        assert row["drawn"] == row2["drawn"], key
        assert row["loss"] == pytest.approx(row2["loss"], rel=1e-5), key
        assert row["proportions"] == pytest.approx(row2["proportions"], rel=1e-4), key


@pytest.fixture(scope="module")
def alone(configs):
    """Every algorithm on one process."""
    for key, (status, stderr) in zip(configs, runs.train_many(1, list(configs.values())), strict=True):
        assert status == 0, f"{key}: {stderr}"
    return configs


def test_one_and_two_processes_agree_for_every_algorithm(alone):
    halves = {
        key: {**c, "per_device_train_batch_size": 4, "output_dir": c["output_dir"] + "-two"} for key, c in alone.items()
    }
    for key, (status, stderr) in zip(halves, runs.train_many(2, list(halves.values())), strict=True):
        assert status == 0, f"{key}: {stderr}"
        agree(key, alone[key], halves[key])


def test_the_megatron_engine_agrees_for_every_algorithm_or_refuses_it_by_name(alone):
    """Two tensor-parallel processes against one process of the FSDP engine, and the two columns of docs/status.md."""
    tensor = {"engine": "megatron", "tensor_model_parallel_size": 2, "sequence_parallel": True}
    halves = {key: {**c, **tensor, "output_dir": c["output_dir"] + "-tp2"} for key, c in alone.items()}
    ran = set()
    for key, (status, stderr) in zip(halves, runs.train_many(2, list(halves.values())), strict=True):
        if status == 0:
            ran.add(key)
            if key == ("selector", "coincide"):  # which of two like samples stands for both, rounding may decide
                (_, selections), (_, selections2) = outcome(alone[key]), outcome(halves[key])
                assert (
                    selections[0] == selections2[0]
                    and len(set(selections[-1]) & set(selections2[-1])) > len(selections[-1]) / 2
                )
            else:
                agree(key, alone[key], halves[key])
        else:
            lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert status == 2 and len(lines) == 1 and key[1] in lines[0] and "megatron" in lines[0], f"{key}: {stderr}"
    assert {key for key in alone if key not in ran} == set(refused_in_the_docs())


def refused_in_the_docs():
    """(role, algorithm) of the lines whose Megatron column says `refused`."""
    text = (corpus.ROOT / "docs" / "status.md").read_text()
    return [tuple(row) for row in re.findall(r"^\| (\w+) \| `(\w+)` \|.*\| refused \|$", text, re.MULTILINE)]
