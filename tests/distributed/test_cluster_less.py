"""cluster_less in whole runs: singleton clusters give LESS, processes agree, only representatives are scored."""

import json
from pathlib import Path

import pytest

from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

SELECT = {
    "eval_dataset": "tables,prose", "eval_on_each_dataset": True, "max_samples": 3, "warmup_step": 2, "update_step": 1,
    "update_times": 2,
}  # fmt: skip
CLUSTERED = {"name": "cluster_less", "cluster_size": 6, "samples_per_cluster": 2}
ONE_EACH = {"name": "cluster_less", "cluster_size": 1, "samples_per_cluster": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("clusters"))


@pytest.fixture(scope="module")
def held_out(folder):
    """The tables cut in two: the first are part of the pool, others are the targets."""
    data = folder / "data"
    rows = (data / "tables.jsonl").read_text().splitlines(keepends=True)
    (data / "held.jsonl").write_text("".join(rows[len(rows) // 2 :]))
    (data / "tables.jsonl").write_text("".join(rows[: len(rows) // 2]))
    info = json.loads((data / "dataset_info.json").read_text())
    info["held"] = {**info["tables"], "file_name": "held.jsonl"}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return folder


def config_of(folder, name, selector, **keys):
    return runs.base(folder, output_dir=str(folder / name), selector=selector, **{**SELECT, "max_steps": 4, **keys})


def selected(config):
    paths = sorted((Path(config["output_dir"]) / "selections").glob("step_*.json"))
    return [
        (json.loads(p.read_text())["indices"], next(iter(json.loads(p.read_text())["metric"].values()))) for p in paths
    ]


@pytest.fixture(scope="module")
def alone(folder):
    configs = {
        "less": config_of(folder, "less", "less"),
        "one": config_of(folder, "one", ONE_EACH),
        "sgd": config_of(folder, "sgd", {"name": "less", "gradient_type": "sgd"}),
        # As large as a layer's longest side: nothing is lost by projection.
        "one-sum": config_of(
            folder, "one-sum", {**ONE_EACH, "combine": "direction", "side": 512, "gradient_type": "sgd"}
        ),
        "mean": config_of(folder, "mean", CLUSTERED),
        "direction": config_of(folder, "direction", {**CLUSTERED, "combine": "direction"}),
        "saved": config_of(folder, "saved", CLUSTERED, save_strategy="steps", save_steps=3),
    }
    finished = runs.train_many(1, list(configs.values()))
    assert [status for status, _ in finished] == [0] * len(configs), finished
    return configs


@pytest.mark.parametrize(("one", "less"), [("one", "less"), ("one-sum", "sgd")])
def test_clusters_of_one_sample_are_less(alone, one, less):
    for (ids, scores), (expected_ids, expected_scores) in zip(selected(alone[one]), selected(alone[less]), strict=True):
        assert ids == expected_ids and scores == pytest.approx(expected_scores, abs=1e-5)


def test_members_share_a_score_and_clusters_survive_a_restart(folder, alone):
    for name in ("mean", "direction"):
        for _, scores in selected(alone[name]):
            assert len(set(scores)) < len(scores)
    resumed = {**alone["saved"], "resume_from_checkpoint": str(folder / "saved" / "checkpoint-3")}
    before = selected(alone["saved"])
    (folder / "saved" / "selections" / "step_3.json").unlink()
    assert runs.train_many(1, [resumed])[0][0] == 0
    assert selected(resumed) == before == selected(alone["mean"])


def test_the_same_choice_on_two_and_four_processes(folder, alone):
    for world, sharded in ((2, True), (4, False)):
        configs = [
            {**alone[name], "output_dir": str(folder / f"{name}-{world}"), "per_device_train_batch_size": 8 // world,
             **({"fsdp": "full_shard"} if sharded else {})}
            for name in ("mean", "direction")
        ]  # fmt: skip
        finished = runs.train_many(world, configs)
        for name, config, (status, stderr) in zip(("mean", "direction"), configs, finished, strict=True):
            assert status == 0, stderr
            for (ids, scores), (expected_ids, expected_scores) in zip(
                selected(config), selected(alone[name]), strict=True
            ):
                assert ids == expected_ids and scores == pytest.approx(expected_scores, abs=1e-4)


@pytest.mark.parametrize("combine", ["mean", "direction"])
def test_it_takes_the_clusters_that_are_like_the_targets(held_out, combine):
    """Targets are tables that the pool does not have; a minority of the pool is like them."""
    keys = {
        "eval_dataset": "held", "max_samples": 8, "update_step": 2, "update_times": 1, "warmup_step": 4, "max_steps": 6,
    }  # fmt: skip
    config = config_of(held_out, f"like-{combine}", {**CLUSTERED, "combine": combine}, **keys)
    assert runs.train_many(1, [config])[0][0] == 0
    log = runs.rows(config)
    pool_share, selected_share = (log[step]["proportions"]["tables"] for step in (0, -1))
    assert pool_share < 0.45 and selected_share > 0.6, (pool_share, selected_share)
