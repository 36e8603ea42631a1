"""Every role, and all at once, in whole runs through `train.main` on real text: equal on 1, 2 and 4 processes,
for every accumulation, with DDP and FSDP2, full and LoRA."""

import json
from pathlib import Path

import pytest

from tests.support import corpus, runs

ROLES = {
    "select": {
        "selector": {"name": "loss"}, "warmup_step": 2, "update_step": 2, "update_times": 2,
        "candidate_fraction": 0.7, "score_reuse": "latest",
    },
    "less": {
        "selector": {"name": "less", "checkpoints": 2}, "eval_dataset": "tables,prose", "eval_on_each_dataset": True,
        "max_samples": 4,
        "warmup_step": 2, "update_step": 2, "update_times": 2,
    },
    "mix": {
        "mixer": {"name": "odm", "reward_scale": 5.0}, "warmup_step": 1, "update_step": 1, "update_times": 5,
        "init_mixture_proportions": [0.5, 0.3, 0.2],
    },
    "weight": {"weighter": {"name": "loss"}, "weight_scope": "step", "warmup_step": 1},
    "joint": {
        "weighter": {"name": "joint_update_aware", "tau": 0.2, "target_update_step": 2}, "weight_scope": "step",
        "eval_dataset": "tables", "warmup_step": 1,
    },
    "adapt": {
        "weighter": {"name": "adapt", "tau": 0.1, "refresh_interval": 2}, "weight_scope": "step", "eval_dataset": "tables",
    },
    "all": {
        "selector": {"name": "loss"}, "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": {"name": "loss"},
        "weight_scope": "step", "warmup_step": 2, "update_step": 2, "update_times": 2,
        "init_mixture_proportions": [0.5, 0.3, 0.2],
    },
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
# world -> (micro-batch, accumulation, sharded)
SPLITS = {
    1: [(8, 1, False), (2, 4, False), (4, 2, True)],
    2: [(4, 1, False), (1, 4, False), (2, 2, True)],
    4: [(2, 1, False), (1, 2, True)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("roles"))


def cases_of(folder, world):
    cases = []
    for role, keys in ROLES.items():
        for number, (micro, accumulation, sharded) in enumerate(SPLITS[world]):
            for tuning in ("full", "lora"):
                if tuning == "lora" and role not in ("all", "less"):
                    continue  # what LoRA changes is the parameters, which the combination covers
                config = runs.base(
                    folder,
                    output_dir=str(folder / f"{role}-{tuning}-{world}-{number}"),
                    per_device_train_batch_size=micro,
                    gradient_accumulation_steps=accumulation,
                    fsdp="full_shard" if sharded else None,
                    **{"max_samples": 12, **keys},
                    **(LORA if tuning == "lora" else {}),
                )
                cases.append(((role, tuning), config))
    return cases


def outcome(config):
    log = runs.rows(config)
    selections = {
        path.name: json.loads(path.read_text())["indices"]
        for path in sorted((Path(config["output_dir"]) / "selections").glob("step_*.json"))
    }
    return log, selections


def compare(name, actual, expected):
    (log, selections), (log0, selections0) = actual, expected
    assert selections == selections0, f"{name}: other samples were selected"
    assert len(log) == len(log0) == 6
    for row, row0 in zip(log, log0, strict=True):
        assert row["drawn"] == row0["drawn"], name
        for key in ("loss", "objective", "grad_norm"):
            assert row[key] == pytest.approx(row0[key], rel=1e-5), f"{name}: {key} at step {row['step']}"
        assert row["proportions"] == pytest.approx(row0["proportions"], rel=1e-5), name
        if "mix" not in name and "all" not in name:  # proportions of a mixer carry the last bits of the losses
            assert row["plan"] == row0["plan"], name


@pytest.fixture(scope="module")
def expected(folder):
    cases = [(key, config) for key, config in cases_of(folder, 1) if config["per_device_train_batch_size"] == 8]
    cases = [(key, {**config, "output_dir": config["output_dir"] + "-plain"}) for key, config in cases]
    finished = runs.train_many(1, [config for _, config in cases], plain=True)
    assert [status for status, _ in finished] == [0] * len(cases), finished
    return {key: outcome(config) for key, config in cases}


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_the_same_losses_plans_draws_and_selections(folder, expected, world):
    cases = cases_of(folder, world)
    finished = runs.train_many(world, [config for _, config in cases])
    for (key, config), (status, stderr) in zip(cases, finished, strict=True):
        assert status == 0, stderr
        compare(f"{key} {config['output_dir']}", outcome(config), expected[key])


def test_the_roles_did_something(expected):
    log, selections = expected[("all", "full")]
    assert list(selections) == ["step_2.json", "step_4.json"] and all(len(ids) == 16 for ids in selections.values())
    assert len({tuple(row["proportions"].values()) for row in log}) == 3, "the mixture moved twice"
    assert log[-1]["weights"]["max"] > 1.05 > 0.95 > log[-1]["weights"]["min"]
    assert "weights" not in log[0], "no weights in the warm-up"
    by_loss = {key: value[0][-1]["loss"] for key, value in expected.items()}
    assert len(set(by_loss.values())) == len(by_loss), "each role leads to another model"
