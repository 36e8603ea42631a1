"""Optimizers beyond torch's own: the losses of one process on every layout that takes them, and a bit-equal restart."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from dataflex_mega.config.optimizers import KEYS, NAMES
from tests.support import corpus, runs

RANK = {"optim_target_modules": ["q_proj", "up_proj"], "optim_args": "rank=4,update_proj_gap=2"}
SHARDED = {"fsdp": "full_shard"}
# name -> (keys, whether it takes FSDP2, by how much losses may differ there)
OPTIMIZERS = {
    "muon": ({"use_muon": True}, True, 1e-4),  # orthogonalised in bfloat16, so other roundings on shards
    "adafactor": ({"optim": "adafactor"}, False, 0),
}
WITH_PACKAGES = {
    "galore": ({"use_galore": True, "galore_rank": 4, "galore_update_interval": 2}, True, 1e-5),
    "apollo": ({"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 2}, False, 0),
    "adam_mini": ({"use_adam_mini": True}, True, 1e-5),
    "adamw_8bit": ({"optim": "adamw_8bit"}, False, 0),
    "galore_adamw": ({"optim": "galore_adamw", **RANK}, True, 1e-5),
    "stable_adamw": ({"optim": "stable_adamw"}, True, 1e-5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("optimizers"), hidden=64)


def config_of(folder, name, **keys):
    options = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "weighter": "loss",
        "save_strategy": "steps", "save_steps": 2, **keys,
    }  # fmt: skip
    return runs.base(folder, output_dir=str(folder / name), **options)


def numbers(config):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in runs.rows(config)]


def losses(config):
    return [row["loss"] for row in runs.rows(config)]


def train(world, configs, plain=False):
    results = runs.train_many(world, configs, plain=plain)
    assert [status for status, _ in results] == [0] * len(configs), [stderr[-600:] for _, stderr in results]


def check(folder, optimizers):
    one = {name: config_of(folder, f"{name}-1", **keys, per_device_train_batch_size=8, save_strategy="no")
           for name, (keys, _, _) in optimizers.items()}  # fmt: skip
    ddp = {name: config_of(folder, f"{name}-ddp", **keys) for name, (keys, _, _) in optimizers.items()}
    fsdp2 = {name: config_of(folder, f"{name}-fsdp2", **keys, **SHARDED)
             for name, (keys, sharded, _) in optimizers.items() if sharded}  # fmt: skip
    train(1, list(one.values()), plain=True)
    both = [*ddp.values(), *fsdp2.values()]
    train(2, both)
    whole = [numbers(config) for config in both]
    for config in both:
        shutil.rmtree(Path(config["output_dir"]) / "checkpoint-4")
    train(2, both)  # which continue at step 2
    assert [numbers(config) for config in both] == whole
    for name, (_, sharded, near) in optimizers.items():
        assert losses(ddp[name]) == pytest.approx(losses(one[name]), abs=1e-5 if name != "muon" else 1e-4), name
        if sharded:
            assert losses(fsdp2[name]) == pytest.approx(losses(one[name]), abs=near), name
    return one


def test_optimizers_of_llamafactory_and_transformers_train_alike_and_resume_bit_equal(folder):
    one = check(folder, OPTIMIZERS)
    assert losses(one["muon"])[1:] != losses(one["adafactor"])[1:]


@pytest.mark.exhaustive
def test_optimizers_of_other_packages_train_alike_and_resume_bit_equal(folder):
    def module(keys):
        return (
            KEYS[next(key for key in KEYS if key in keys)].module
            if "optim" not in keys
            else NAMES[keys["optim"]].module
        )

    present = {name: one for name, one in WITH_PACKAGES.items() if importlib.util.find_spec(module(one[0]))}
    if not present:
        pytest.skip("none of galore-torch, apollo-torch, adam-mini, bitsandbytes, torch-optimi is installed")
    check(folder, present)


def test_what_cannot_work_on_shards_is_refused_before_the_model_is_built(folder):
    ((status, stderr),) = runs.train_many(2, [config_of(folder, "shards", optim="adafactor", **SHARDED)])
    assert status == 2
    assert (
        stderr.strip().splitlines()[-1].startswith("error: optim: adafactor does not go with fsdp: its row and column")
    )


def test_gradient_scores_with_moments_are_refused_at_start_without_adam(folder):
    keys = {"weighter": None, "selector": "less", "warmup_step": 2, "update_step": 2, "update_times": 2}
    config = config_of(folder, "less", use_muon=True, eval_dataset="tables", **keys)
    status, stderr = runs.train_here(config)
    assert status == 2
    assert "selector less: gradient_type: adam needs optim: adamw_torch, found use_muon: true" in stderr
    assert not (folder / "less" / "metrics.jsonl").exists()
