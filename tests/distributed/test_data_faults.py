"""Rows that cannot be trained and algorithms that break their contract, in whole runs of both engines."""

import json
import math

import pytest

from tests.support import corpus, runs

SFT = {"stage": "sft", "template": "default", "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1}
WEIGHT = {"weighter": "loss"}
SELECT = {"warmup_step": 1, "update_step": 2, "update_times": 2}
BROKEN = "tests.support.broken"
ENGINES = ({}, {"engine": "megatron"})


def write(folder, name, rows, suffix="jsonl", **entry):
    """A dataset of these rows."""
    data = folder / "data"
    (data / f"{name}.{suffix}").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: {"file_name": f"{name}.{suffix}", **entry}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = corpus.write(tmp_path_factory.mktemp("rows"))
    info = json.loads((root / "data" / "dataset_info.json").read_text())
    # LLaMA-Factory divides cutoff_len between prompt and answer by their lengths: nothing is left of this answer.
    fills = {"instruction": "books about ships and stars " * 400, "input": "", "output": "ships and stars " * 6}
    fine = {"instruction": "explain a list", "input": "", "output": "a list is a sequence of values"}
    text = {"columns": {"prompt": "text"}}
    chat = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    info |= write(root, "masked", [fills] * 8)
    info |= write(root, "some", [fills, fine] * 4)
    info |= write(root, "dropped", [{**fine, "output": None}, *[fine] * 7])
    info |= write(root, "nulls", [{"text": None if n % 4 == 0 else f"row {n} of text"} for n in range(80)], **text)
    info |= write(root, "tools", [{"conversations": turns, "tools": t} for t in ("[]", "[]", "[{not")], **chat)
    info |= write(root, "role", [{"conversations": [{"role": "user", "content": "a"}], "tools": ""}], **chat)
    (root / "data" / "nothing").mkdir()
    info["nothing"] = {"file_name": "nothing", **text}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


DATA = {
    "masked": ({**SFT, "dataset": "masked"}, ["dataset 'masked': none of its 8 rows has a target token", "cutoff_len 32"]),
    "masked beside": ({**SFT, "dataset": "sft,masked"}, ["dataset 'masked': none of its 8 rows"]),
    "masked evaluation": (
        {**SFT, "dataset": "sft", "eval_dataset": "masked", "eval_strategy": "steps", "eval_steps": 2},
        ["eval_dataset 'masked': none of its 8 rows has a target"],
    ),
    "one of two evaluations": (
        {**SFT, "dataset": "sft", "eval_dataset": "sft,masked", "eval_on_each_dataset": True, "eval_strategy": "steps"},
        ["eval_dataset 'masked': none of its 8 rows"],
    ),
    "blocks of one token": ({"dataset": "prose", "cutoff_len": 1}, ["dataset 'prose'", "cutoff_len 1"]),
    "no text": ({"dataset": "prose,nulls"}, ["dataset 'nulls': 20 of 80 rows have no text", "nulls.jsonl, line 1"]),
    "no text to evaluate": (
        {"dataset": "prose", "eval_dataset": "nulls", "eval_strategy": "steps"}, ["dataset 'nulls': 20 of 80", "line 1"],
    ),
    "empty folder": ({"dataset": "prose,nothing"}, ["dataset 'nothing'", "is an empty folder"]),
    "tools": ({**SFT, "dataset": "sft,tools"}, ["dataset 'tools'", "tools.jsonl, line 3", "'tools' is not JSON"]),
    "roles": ({**SFT, "dataset": "role"}, ["dataset 'role'", "role.jsonl, line 1", "no 'from'", "role_tag"]),
}  # fmt: skip


def run(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / "out" / name.replace(" ", "-")), **keys)


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("name", DATA)
def test_rows_are_refused_before_a_model_is_built(folder, name, monkeypatch):
    from dataflex_mega.run import fsdp_factory

    monkeypatch.setattr(fsdp_factory, "build_model", None)
    keys, words = DATA[name]
    status, stderr = runs.train_here(run(folder, name, **WEIGHT, **keys))
    assert status == 2 and len(errors(stderr)) == 1, stderr
    for word in words:
        assert word in errors(stderr)[0], stderr


def test_what_is_dropped_or_has_no_target_is_counted(folder):
    notes = runs.train_here(run(folder, "counted", **WEIGHT, **{**SFT, "dataset": "dropped,some", "max_steps": 1}))[1]
    assert "note: dataset 'dropped': 1 of 8 rows were dropped (first: " in notes
    assert "dropped.jsonl, line 1: 'output' must be text, found null)" in notes
    assert "note: dataset 'some': 4 of 8 rows have no target token after cutoff_len 32 and train nothing" in notes
    assert "dataset 'dropped': 7 rows, " in notes


@pytest.mark.parametrize("engine", ENGINES, ids=["fsdp", "megatron"])
def test_a_step_without_a_target_is_named_or_skipped(folder, engine):
    keys = {**SFT, **WEIGHT, **engine, "dataset": "some", "per_device_train_batch_size": 1, "max_steps": 8}
    names = [f"{engine.get('engine', 'fsdp')}-{how}" for how in ("stop", "continue")]
    configs = [run(folder, names[0], **keys), run(folder, names[1], on_non_finite="continue", **keys)]
    (stopped, stderr), (finished, other) = runs.train_many(1, configs)
    assert stopped == 1 and "no sample of the step has a target token" in errors(stderr)[0], stderr
    assert "(some row " in errors(stderr)[0]
    assert finished == 0, other
    log = runs.rows(configs[1])
    without = [row for row in log if math.isnan(row["loss"])]
    assert len(log) == 8 and len(without) == 4, "the pool has 8 rows, of which 4 have no target"
    assert all(row["grad_norm"] == 0 and math.isnan(row["objective"]) for row in without)
    assert all(row["loss"] > 0 for row in log if row not in without)


CONTRACTS = {
    "mean": ({"weighter": f"{BROKEN}:MeanSeven"}, "MeanSeven.weights must have mean 1 over the samples of a step, found 7"),
    "nan": ({"weighter": f"{BROKEN}:Nan"}, "Nan.weights must return finite numbers >= 0"),
    "same id": ({"selector": f"{BROKEN}:SameId", **SELECT}, "SameId.select returned 15 of 16 ids again"),
    "raises": ({"selector": f"{BROKEN}:Raises", **SELECT}, "Raises.score raised KeyError: 'los' (types.py, line "),
    "callback": (
        {"weighter": "loss", "callbacks": [f"{BROKEN}:RaisesAtStep"]},
        f"callback {BROKEN}:RaisesAtStep.on_step_end raised ZeroDivisionError: division by zero (broken.py, line ",
    ),
}  # fmt: skip


def test_broken_contracts_end_a_run_in_one_line(folder):
    configs = [run(folder, f"contract {name}", **keys, dataset="prose") for name, (keys, _) in CONTRACTS.items()]
    for (status, stderr), (_, words) in zip(runs.train_many(1, configs), CONTRACTS.values(), strict=True):
        assert status == 1 and len(errors(stderr)) == 1, stderr
        assert words in errors(stderr)[0] and "Traceback" not in stderr


@pytest.mark.parametrize("engine", ENGINES, ids=["fsdp", "megatron"])
def test_other_weights_on_rank_one_end_the_run(folder, engine):
    config = run(folder, f"ranks {engine}", weighter=f"{BROKEN}:OtherOnRankOne", dataset="prose", **engine)
    status, stderr = runs.train_many(2, [config])[0]
    assert status == 1, stderr
    assert "OtherOnRankOne.weights returned other weights on data-parallel rank 1 than on rank 0" in errors(stderr)[0]
    assert not (folder / "out" / f"ranks-{engine}" / "model.safetensors").exists()
