"""LESS over several checkpoints of a run: the formula, bit-equal after a restart, equal on 1 and 2 processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.test_store import ours_of
from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

KEYS = {
    "selector": {"name": "less", "checkpoints": 3}, "candidate_fraction": 0.6, "score_reuse": "latest", "max_samples": 6,
    "eval_dataset": "tables,prose", "eval_on_each_dataset": True, "lr_scheduler_type": "linear", "learning_rate": 1.0e-2,
    "warmup_step": 1, "update_step": 1, "update_times": 5, "max_steps": 6, "save_strategy": "steps", "save_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("sums"))


def config_of(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / name), **{**KEYS, **keys})


def selections(config):
    paths = sorted((Path(config["output_dir"]) / "selections").glob("step_*.json"))
    rows = [json.loads(path.read_text()) for path in paths]
    return {
        path.name: (row["indices"], next(iter(row["metric"].values()))) for path, row in zip(paths, rows, strict=True)
    }


def saved_records(checkpoint):
    """[(step, learning rate, ids, cosines)] that a checkpoint has."""
    tensors = load_file(checkpoint / "state.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())["extra"]["controller"]["selector"]["history"]
    return [
        (r["step"], r["learning_rate"], tensors[r["ids"]["tensor"]], tensors[r["cosines"]["tensor"]]) for r in state
    ]


@pytest.fixture(scope="module")
def whole(folder):
    config = config_of(folder, "whole")
    single = config_of(folder, "single", selector="less")
    for status, stderr in runs.train_many(1, [config, single]):
        assert status == 0, stderr
    return config, single


def test_scores_are_the_mean_over_the_saved_records_by_their_rates(folder, whole):
    config, single = whole
    records = saved_records(folder / "whole" / "checkpoint-4")
    assert [step for step, *_ in records] == [1, 2, 3]
    rates = {row["step"] - 1: row["learning_rate"] for row in runs.rows(config)}
    assert [rate for _, rate, *_ in records] == [rates[step] for step in (1, 2, 3)] and len(set(rates.values())) == 6
    entries = {}
    for _, rate, ids, values in records:
        for sample, row in zip(ids.tolist(), values.astype(np.float64), strict=True):
            entries.setdefault(sample, []).append((rate, row))
    last_ids = set(records[-1][2].tolist())
    last_scores = {i: score for i, score in zip(*selections(config)["step_3.json"], strict=True) if i in last_ids}
    assert len(last_scores) > 2 and len({len(entries[i]) for i in last_ids}) > 1, (
        "some have been scored more often than others"
    )
    for sample, score in last_scores.items():
        total = sum(rate for rate, _ in entries[sample])
        assert score == pytest.approx(max(sum(rate * row for rate, row in entries[sample]) / total), abs=1e-6)
    assert selections(config)["step_1.json"] == selections(single)["step_1.json"], "one record is the current model"
    assert selections(config)["step_3.json"] != selections(single)["step_3.json"]
    state = json.loads((folder / "single" / "checkpoint-4" / "state.json").read_text())
    assert state["extra"]["controller"]["selector"] == {}


def test_a_restart_is_bit_equal_and_two_processes_choose_the_same(folder, whole):
    config, _ = whole
    start = str(folder / "whole" / "checkpoint-4")
    again = config_of(folder, "again", resume_from_checkpoint=start, save_strategy="no")
    assert runs.train_many(1, [again])[0][0] == 0
    expected = selections(config)
    assert selections(again) == {name: expected[name] for name in ("step_4.json", "step_5.json")}
    two = config_of(folder, "two", per_device_train_batch_size=4, fsdp="full_shard")
    moved = config_of(folder, "moved", resume_from_checkpoint=start, save_strategy="no", per_device_train_batch_size=4)
    for run, (status, stderr) in zip((two, moved), runs.train_many(2, [two, moved]), strict=True):
        assert status == 0, stderr
        for name, (ids, scores) in selections(run).items():
            assert ids == expected[name][0] and scores == pytest.approx(expected[name][1], abs=1e-5), name
    assert len(selections(two)) == 5


def test_the_filter_of_a_pipeline_adds_them_up_too(folder):
    """The first filter is that of one checkpoint, the second is not, on one process and on two."""
    components = folder / "components.yaml"
    entries = {f"less_of_{count}": {"name": "less", "params": {"checkpoints": count}} for count in (1, 2)}
    components.write_text(json.dumps({"selectors": entries}))

    def filtered(component, micro):
        stage = {"family": "selector", "component": component, "keep_ratio": 0.5, "warmup_step": 1, "every": 2}
        return runs.base(
            folder, output_dir=str(folder / f"{component}-{micro}"), train_type="dynamic_lego",
            components_cfg_file=str(components), pipeline={"stages": [stage]}, per_device_train_batch_size=micro,
            max_steps=4, max_samples=4, eval_dataset="tables,prose", eval_on_each_dataset=True,
        )  # fmt: skip

    summed, single, two = filtered("less_of_2", 8), filtered("less_of_1", 8), filtered("less_of_2", 4)
    for status, stderr in [*runs.train_many(1, [summed, single]), *runs.train_many(2, [two])]:
        assert status == 0, stderr
    of_sum, of_single, of_two_processes = (selections(config) for config in (summed, single, two))
    assert list(of_sum) == list(of_single) == list(of_two_processes) == ["step_1.json", "step_3.json"]
    assert of_sum["step_1.json"] == of_single["step_1.json"] and of_sum["step_3.json"][1] != of_single["step_3.json"][1]
    for name, (ids, scores) in of_two_processes.items():
        assert ids == of_sum[name][0] and scores == pytest.approx(of_sum[name][1], abs=1e-5), name


def scored(config, folder, name, *words):
    """A call of `store score` and the file that it writes."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**config, "output_dir": str(folder / name)}))
    return ["score", str(path), *words, "--output", str(folder / f"{name}.npy")]


def test_stores_of_several_checkpoints_are_added_up_by_weights(folder):
    stored = {"name": "less", "mode": "store", "side": 8, "store_block": 16, "store_dir": str(folder / "stores")}
    config = config_of(folder, "stored", selector=stored, max_samples=4, candidate_fraction=None, score_reuse=None)
    trained = {**config, "output_dir": str(folder / "trained"), "save_steps": 2, "max_steps": 4}
    assert runs.train_many(1, [{**trained, "selector": "random"}])[0][0] == 0
    first, second = (str(folder / "trained" / f"checkpoint-{step}") for step in (2, 4))
    calls, singles = [], {}
    for number, checkpoint in enumerate((first, second)):
        resume = f"resume_from_checkpoint={checkpoint}"
        calls.append(["build", scored(config, folder, "build")[1], resume])
        for target in ("tables", "prose"):
            name = f"{target}-{number}"
            singles[number, target] = folder / f"{name}.npy"
            calls.append(scored(config, folder, name, resume, f"eval_dataset={target}"))
    both = ("--checkpoints", f"{first},{second}")
    calls.append(scored(config, folder, "both", *both, "--weights", "3e-5,1e-5"))
    for (status, stderr), argv in zip(runs.train_many(1, calls, ours_of), calls, strict=True):
        assert status == 0, (argv, stderr)
    more = [
        scored(config, folder, "two", *both, "--weights", "3e-5,1e-5"),
        scored(config, folder, "rate", "--checkpoints", first),
        scored(config, folder, "zero", *both),
    ]
    (ok, _), (rate, stderr), (status, line) = runs.train_many(2, more, ours_of)
    assert ok == rate == 0 and "checkpoint-2: weight 0.00" in stderr
    assert status == 2 and "checkpoint-4 is 0.0; set --weights" in line
    scores = {key: np.load(path).astype(np.float64) for key, path in singles.items()}
    sums = [(3 * scores[0, target] + scores[1, target]) / 4 for target in ("tables", "prose")]
    np.testing.assert_allclose(np.load(folder / "both.npy"), np.maximum(*sums), atol=1e-6)
    np.testing.assert_allclose(np.load(folder / "two.npy"), np.maximum(*sums), atol=1e-5)
    np.testing.assert_allclose(
        np.load(folder / "rate.npy"), np.maximum(scores[0, "tables"], scores[0, "prose"]), atol=1e-5
    )
    assert 0 < (sums[0] > sums[1]).sum() < len(sums[0]), "both targets are the largest of some samples"
