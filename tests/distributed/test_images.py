"""Roles on images in whole runs: equal on one process, DDP and FSDP2, resumed bit-equal, refused where it cannot work."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import runs, vision

ROLES = {"selector": "loss", "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": "loss"}
UPDATES = {"warmup_step": 2, "update_step": 2}
# name -> keys of a run that must be the same on one process, DDP and FSDP2
ALIKE = {
    "roles": ROLES,
    "qwen": {**ROLES, "model_name_or_path": "qwen", "template": "qwen2_vl"},
    "tower": {**ROLES, "freeze_vision_tower": False, "freeze_multi_modal_projector": False},
    "projector, words first": {
        "mixer": "odm",
        "freeze_multi_modal_projector": False,
        "init_mixture_proportions": [0, 0, 1],
    },
    "words alone with a tower": {"mixer": "odm", "freeze_vision_tower": False, "dataset": "words"},
    "lora": {**ROLES, "finetuning_type": "lora", "lora_rank": 4},
    "coincide": {"selector": {"name": "coincide", "num_clusters": 4}},
    "icons": {"selector": "icons", "eval_dataset": "mixed"},
    "less": {"selector": "less", "eval_dataset": "mixed", "finetuning_type": "lora"},
}
QUICK = "tower"
LAYOUTS = {"ddp": {}, "fsdp2": {"fsdp": "full_shard auto_wrap"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = vision.write(tmp_path_factory.mktemp("images"))
    vision.write_qwen(root / "qwen")
    return root


def config_of(folder, name, **keys):
    options = {
        "stage": "sft", "template": "llava", "dataset": "colours,pairs,words", "cutoff_len": 128, "prefetch": 2, **UPDATES,
        **keys, "output_dir": str(folder / "out" / re.sub(r"\W+", "-", name)),
    }  # fmt: skip
    if "model_name_or_path" in keys:
        options["model_name_or_path"] = str(folder / keys["model_name_or_path"])
    return runs.base(folder, **options)


def check_alike(folder, layouts):
    """`layouts`: name -> layouts of two processes whose run is to be that of one."""
    names = list(layouts)
    alone = {name: config_of(folder, name, **ALIKE[name]) for name in names}
    both = {
        (name, layout): config_of(
            folder, f"{name} {layout}", **ALIKE[name], **LAYOUTS[layout], per_device_train_batch_size=4
        )
        for name in names
        for layout in layouts[name]
    }
    assert [status for status, _ in runs.train_many(1, list(alone.values()), plain=True)] == [0] * len(alone)
    results = runs.train_many(2, list(both.values()))
    assert [status for status, _ in results] == [0] * len(both), results
    for (name, layout), config in both.items():
        expected = runs.rows(alone[name])
        assert len({row["loss"] for row in expected}) > 1
        for row, other in zip(runs.rows(config), expected, strict=True):
            where = f"{name} {layout} step {row['step']}"
            assert row["drawn"] == other["drawn"], where
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), where
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), where


def test_roles_are_the_same_on_one_and_two_processes(folder):
    check_alike(folder, {QUICK: list(LAYOUTS)})


@pytest.mark.exhaustive
def test_everything_else_is_the_same_on_one_and_two_processes(folder):
    others = [name for name in ALIKE if name != QUICK]
    check_alike(folder, {name: [list(LAYOUTS)[number % 2]] for number, name in enumerate(others)})


def numbers(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_a_resumed_run_is_bit_equal(folder):
    keys = {**ROLES, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    whole, resumed = (config_of(folder, name, **keys, fsdp="full_shard") for name in ("whole", "resumed"))
    assert runs.train_many(2, [whole])[0][0] == 0
    shutil.copytree(whole["output_dir"], resumed["output_dir"])
    shutil.rmtree(Path(resumed["output_dir"]) / "checkpoint-6")
    status, lines = runs.train_many(2, [resumed])[0]
    assert status == 0 and "checkpoint-3" in lines, lines
    assert [numbers(row) for row in runs.rows(resumed)] == [numbers(row) for row in runs.rows(whole)]


@pytest.mark.exhaustive
def test_what_cannot_be_done_is_refused_in_one_line(folder):
    refusals = {
        "packing": ({"packing": True}, r"packing: dataset 'colours' has images.*packing: false"),
        "neat": ({"neat_packing": True}, r"packing: dataset 'colours' has images"),
        "cut": ({"cutoff_len": 40}, r"cutoff_len: 40 leaves \d+ of the \d+ tokens of \S+png in a row of dataset"),
        "nice": ({"mixer": None, "selector": "nice", "eval_dataset": "mixed"}, r"selector nice generates.*has images"),
        "tower": (
            {"mixer": None, "selector": "less", "eval_dataset": "mixed", "freeze_vision_tower": False},
            r"gradient scores: \S*vision_tower\S* trains.*freeze_vision_tower: true",
        ),
        "template": ({"template": "qwen2_vl"}, r"template: qwen2_vl does not fit the model, whose processor is Llava"),
        "no processor": (
            {"model_name_or_path": "qwen", "template": "llava"}, r"template: llava needs the processor of model_name",
        ),
    }  # fmt: skip
    configs = [config_of(folder, f"refused {name}", **{"mixer": "odm", **keys}) for name, (keys, _) in refusals.items()]
    results = runs.train_many(1, configs, plain=True)
    for (name, (_, expected)), (status, lines) in zip(refusals.items(), results, strict=True):
        errors = [line for line in lines.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1, (name, lines)
        assert re.search(expected, errors[0]), (name, errors)


@pytest.mark.exhaustive
def test_the_model_is_whole_and_its_answers_see_pictures(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = config_of(
        folder, "predict", **ROLES, eval_dataset="mixed", eval_strategy="steps", eval_steps=3, do_predict=True,
        max_new_tokens=3,
    )  # fmt: skip
    status, lines = runs.train_many(1, [config], plain=True)[0]
    assert status == 0, lines
    output = Path(config["output_dir"])
    assert type(AutoProcessor.from_pretrained(output)).__name__ == "LlavaProcessor"
    assert json.loads((output / "predict_results.json").read_text())
    assert len((output / "generated_predictions.jsonl").read_text().splitlines()) == 12
    logged = float(re.findall(r"eval_loss ([\d.]+)", lines)[-1])
    model = AutoModelForImageTextToText.from_pretrained(output).eval()
    assert mean_loss(folder, config, model) == pytest.approx(logged, abs=2e-4)


def mean_loss(folder, config, model):
    """The mean token loss over `mixed` of LLaMA-Factory's own batches, one row at a time."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset

    from dataflex_mega.llamafactory.args import parse_arguments, prepare_arguments
    from dataflex_mega.llamafactory.model import load_tokenizer

    keys = ("stage", "template", "cutoff_len", "dataset_dir", "finetuning_type")
    given = {key: config[key] for key in keys} | {"model_name_or_path": config["output_dir"], "dataset": "mixed"}
    args = parse_arguments(prepare_arguments({**given, "output_dir": str(folder / "unused")}))
    module, template = load_tokenizer(args)
    rows = get_dataset(template, args.model, args.data, args.training, stage="sft", **module)["train_dataset"]
    collate = SFTDataCollatorWith4DAttentionMask(template=template, model=model, **module)
    total, count = 0.0, 0
    for row in rows:
        batch = collate([dict(row)])
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model(**batch).loss) * targets, count + targets
    return total / count
