"""Runs that order their samples: equal on 1, 2 and 4 processes, bit-equal when continued, on both engines."""

import json
from pathlib import Path

import pytest
import torch

from dataflex_mega.config import components, reorder_arguments
from dataflex_mega.control.passes import OrderOptions, arrange_remaining
from dataflex_mega.registry import build
from tests.support import corpus, runs

SAW = {"num_sections": 3, "folding_ratio": 0.075, "layers": 2}
DYNAMIC = {"kind": "dynamic", "polarity": "higher_later"}
WINDOWS = {"warmup_step": 1, "update_step": 2, "update_times": 3, "max_steps": 7, "max_samples": 4}
CASES = {
    "folding": {"reorder": {"name": "folding", "layers": 3, **DYNAMIC}, **WINDOWS},
    "gradients": {
        "reorder": {
            "name": "sorting", **DYNAMIC, "score_source": "selector", "score_params": {"selector": "less", "max_samples": 9}
        },
        "eval_dataset": "tables", **WINDOWS, "update_step": 3,
    },
    "mixed": {
        "reorder": {"pattern": "saw", "name": "mine", "pattern_params": SAW, **DYNAMIC}, "mixer": "odm",
        "init_mixture_proportions": [0.5, 0.3, 0.2], **WINDOWS,
    },
    "selected": {
        "selector": "loss", "reorder": {"name": "zigzag", "layers": 2, **DYNAMIC, "window_size": 3}, "weighter": "loss",
        "weight_scope": "step", **WINDOWS,
    },
}  # fmt: skip
LEGO = {
    "train_type": "dynamic_lego", "weight_scope": "step", "max_steps": 7, "max_samples": 4,
    "init_mixture_proportions": [0.5, 0.3, 0.2], "eval_dataset": "tables", "eval_strategy": "steps", "eval_steps": 7,
    "pipeline": {"save_plans": True, "stages": [
        {"family": "selector", "component": "loss_low", "keep_ratio": 0.5, "warmup_step": 1, "every": 4},
        {"family": "mixer", "component": "doremi", "every": 2},
        {"family": "reorder", "component": "dynamic_saw", "every": 3, "score_max_age": 2},
        {"family": "weighter", "component": "loss", "warmup_step": 1},
        {"family": "weighter", "component": "focal", "warmup_step": 3},
    ]},
}  # fmt: skip
SPLITS = {1: [(8, 1)], 2: [(2, 2)], 4: [(1, 2)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("orders"))


def cases_of(folder, world):
    cases = {**CASES, "lego": {**LEGO, "reference_model": str(folder / "model")}}
    return {
        (name, number): runs.base(
            folder,
            output_dir=str(folder / f"{name}-{world}-{number}"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            adam_epsilon=1.0e-6,  # with 1e-8, rounding alone decides the updates of gradients that are near zero
            **keys,
        )
        for name, keys in cases.items()
        for number, (micro, accumulation) in enumerate(SPLITS[world])
    }


@pytest.fixture(scope="module")
def finished(folder):
    configs = {}
    for world in SPLITS:
        cases = cases_of(folder, world)
        for key, (status, stderr) in zip(cases, runs.train_many(world, list(cases.values())), strict=True):
            assert status == 0, f"{key} on {world}: {stderr}"
            configs[(key[0], world, key[1])] = cases[key]
    return configs


def test_the_same_plans_draws_and_losses_however_a_batch_is_cut(finished):
    for (name, world, number), config in finished.items():
        log, log0 = runs.rows(config), runs.rows(finished[name, 1, 0])
        for row, row0 in zip(log, log0, strict=True):
            where = f"{name} on {world} processes, split {number}, step {row['step']}"
            assert row["drawn"] == row0["drawn"], where
            if name not in ("mixed", "lego"):  # proportions of a mixer carry the last bits of the losses
                assert row["plan"] == row0["plan"], where
            for key in ("loss", "objective", "grad_norm"):
                assert row[key] == pytest.approx(row0[key], rel=1e-5), where
        windows, windows0 = (runs.rows(c, "orders.jsonl") for c in (config, finished[name, 1, 0]))
        due = list(range(7)) if name == "lego" else list(range(1, 7, CASES[name]["update_step"]))
        assert [o["step"] for o in windows] == [o["step"] for o in windows0] == due


def test_what_was_scored(finished):
    """The warm-up's samples and those of earlier windows are not scored again."""
    scored = {name: [o["scored"] for o in runs.rows(finished[name, 1, 0], "orders.jsonl")] for name in CASES}
    assert scored["gradients"] == [9, 9]
    assert scored["folding"][0] - scored["folding"][1] == scored["folding"][1] - scored["folding"][2] == 16


def test_every_stage_of_a_pipeline_does_its_part(finished):
    config = finished["lego", 2, 0]
    log, output = runs.rows(config), Path(config["output_dir"])
    filtered = [json.loads(path.read_text())["indices"] for path in sorted(output.glob("selections/step_*.json"))]
    plans = {
        int(path.stem.rpartition("_")[2]): json.loads(path.read_text())
        for path in output.glob("scoreboard_step_*.json")
    }
    assert len(filtered) == 2 and sorted(plans) == list(range(7))
    served = [sample for step in sorted(plans) for sample in plans[step]["indices"][:8]]
    assert len(set(served)) == len(served) == 7 * 8, "no sample twice"
    for step, plan in plans.items():
        allowed = set(filtered[0] if step < 5 else filtered[1]) if step >= 1 else None
        assert allowed is None or set(plan["indices"]) <= allowed, f"step {step} trains on what the filter kept"
        assert len(plan["metric"]["loss"]) == len(plan["indices"])
    assert len({tuple(row["weights"].values()) for row in log[1:]}) == 6, "weights differ from step to step"
    assert "weights" in log[1] and log[-1]["weights"]["max"] > 1.01


def test_the_loss_of_an_evaluation_is_not_weighted(folder):
    """Without a learning rate the model stays as it is, and so does its evaluation, whatever weights the steps have."""
    keys = {**LEGO, "learning_rate": 0.0, "max_steps": 2, "eval_steps": 2, "reference_model": str(folder / "model")}
    lego = runs.base(folder, output_dir=str(folder / "weighted"), **keys)
    plain = runs.base(folder, output_dir=str(folder / "plain"), mixer="static", **{
        key: value for key, value in keys.items() if key not in ("train_type", "pipeline", "reference_model", "weight_scope")
    })  # fmt: skip
    assert [status for status, _ in runs.train_many(1, [lego, plain])] == [0, 0]
    eval_losses = [[row["eval_loss"] for row in history(config) if "eval_loss" in row] for config in (lego, plain)]
    assert eval_losses[0] == eval_losses[1] != []


def history(config):
    return json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())["log_history"]


def numbers(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_a_run_goes_on_bit_equal(folder):
    """From a checkpoint in the middle of a window, into a folder of its own."""
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    cases = {"mixed": CASES["mixed"], "lego": {**LEGO, "reference_model": str(folder / "model")}}
    configs = []
    for name, keys in cases.items():
        whole = runs.base(folder, output_dir=str(folder / f"{name}-whole"), **{
            **keys, **more, "save_strategy": "steps", "save_steps": 4,
        })  # fmt: skip
        checkpoint = str(folder / f"{name}-whole" / "checkpoint-4")
        moved = {**whole, "output_dir": str(folder / f"{name}-moved"), "resume_from_checkpoint": checkpoint}
        configs += [whole, {**moved, "save_strategy": "no"}]
    assert [stderr for status, stderr in runs.train_many(2, configs) if status] == []
    for whole, moved in (configs[:2], configs[2:]):
        for name in ("metrics.jsonl", "orders.jsonl"):
            log, log2 = runs.rows(whole, name), runs.rows(moved, name)
            assert 0 < len(log2) < len(log)
            assert [numbers(row) for row in log[-len(log2) :]] == [numbers(row) for row in log2]


def test_both_engines_serve_the_same_order(folder):
    pytest.importorskip("megatron.core")
    keys = {**CASES["selected"], "selector": None, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    keys["eval_strategy"], keys["learning_rate"] = "no", 3.0e-3
    fsdp = runs.base(folder, output_dir=str(folder / "fsdp"), **keys)
    megatron = {**fsdp, "engine": "megatron", "output_dir": str(folder / "megatron")}
    assert [stderr for status, stderr in runs.train_many(2, [fsdp, megatron]) if status] == []
    for row, row2 in zip(runs.rows(fsdp), runs.rows(megatron), strict=True):
        assert row["plan"] == row2["plan"]
        for key in ("loss", "objective", "grad_norm"):
            assert row[key] == pytest.approx(row2[key], rel=1e-5), f"{key} at step {row['step']}"


def test_static_presets_of_dataflex_by_a_number_of_each_row(folder):
    """The mean score of what is trained is that of the pattern's first places."""
    scores = [(7 * row) % 40 / 4 for row in range(40)]
    rows = [json.dumps({"text": f"row {row} " * 12, "score": score}) for row, score in enumerate(scores)]
    (folder / "data" / "scored.jsonl").write_text("\n".join(rows))
    info = json.loads((folder / "data" / "dataset_info.json").read_text())
    info["scored"] = {"file_name": "scored.jsonl", "columns": {"prompt": "text"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    names = ["sorting", "segment", "folding", "zigzag", "stair", "saw", "shuffle"]
    configs = [
        runs.base(folder, output_dir=str(folder / f"static-{name}"), dataset="scored", packing=False, max_steps=3,
                  train_type="dynamic_reorder", component_name=name)
        for name in names
    ]  # fmt: skip
    assert [stderr for status, stderr in runs.train_many(1, configs) if status] == []
    for name, config in zip(names, configs, strict=True):
        spec, order = reorder_arguments.read_reorder(components.read_component(None, "reorder", name).spec)
        direction = OrderOptions(order.low_first, order.window_size, order.seed)
        ids = arrange_remaining(build("reorder", spec), torch.arange(40), torch.tensor(scores), 0, direction)[:24]
        (window,) = runs.rows(config, "orders.jsonl")
        expected = None if name == "shuffle" else pytest.approx(sum(scores[i] for i in ids.tolist()) / 24)
        assert (window["step"], window["end"], window["mean_score"]) == (0, 3, expected), name


def test_easy_samples_come_before_hard_ones(folder):
    """With the loss of the untrained model as a fixed score, sorting up and down train on what they say."""
    config = runs.base(folder, output_dir=str(folder / "up"), max_steps=4, max_samples=4, learning_rate=1.0e-9,
                       reorder={"name": "sorting", "kind": "static", "score_source": "model_loss"})  # fmt: skip
    down = {**config, "reorder": {**config["reorder"], "ascending": False}, "output_dir": str(folder / "down")}
    assert [status for status, _ in runs.train_many(1, [config, down])] == [0, 0]
    losses = [row["loss"] for row in runs.rows(config)]
    assert losses == sorted(losses) and losses[-1] > losses[0] + 0.01
    other = [row["loss"] for row in runs.rows(down)]
    assert other == sorted(other, reverse=True) and other[0] > losses[-1]
