"""Checks that need the configuration alone: what dynamic training does not do, and paths that must exist."""

import pytest

from dataflex_mega.config.checks import check_dynamic, split_names
from dataflex_mega.config.fates import FATES
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError
from tests.unit.config.conftest import LF_KEYS


@pytest.fixture
def check(tmp_path):
    """Check a run that is right but for `keys`; None takes a key out."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    right = {
        "model_name_or_path": str(model), "dataset": "a,b", "output_dir": str(tmp_path / "out"), "stage": "pt",
        "weighter": "loss",
    }  # fmt: skip

    def check(**keys):
        config = {key: value for key, value in {**right, **keys}.items() if value is not None}
        check_dynamic(parse_config(config, {**dict.fromkeys(FATES, bool), **LF_KEYS}))

    return check


def fails(check, **keys):
    with pytest.raises(ConfigError) as caught:
        check(**keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_right_configuration_passes(check):
    check()


@pytest.mark.parametrize(
    "keys",
    [
        {"stage": "sft", "packing": True},
        {"stage": "sft", "neat_packing": True},
        {"stage": None},
        {"dataset": "one", "weighter": None, "mixer": "odm", "update_step": 2},
        {"optim": "sgd"},
        {"bf16": True},
        {"fp16": True, "bf16": False},
        {"deepspeed": "", "use_galore": False, "label_smoothing_factor": 0.0, "accelerator_config": {}},
        {"num_train_epochs": 0, "max_steps": 10},
        {"num_train_epochs": 0, "train_step": 10},
        {"eval_strategy": "steps", "eval_dataset": "c"},
        {"eval_strategy": "steps", "val_size": 0.1, "early_stopping_steps": 2},
        {"report_to": "none"},
        {"report_to": ["tensorboard"]},
        {"init_mixture_proportions": [1, 2]},
        {"train_sampling_strategy": "random", "mix_strategy": "concat", "do_train": True},
        {"learning_rate": 0.0, "fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}},
    ],
)
def test_what_dynamic_training_does(check, keys):
    check(**keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_unsloth", True), ("fp8", True), ("fp8_enable_fsdp_float8_all_gather", True),
        ("torch_compile", True), ("push_to_hub", True), ("accelerator_config", {"a": 1}),
    ],
)  # fmt: skip
def test_what_dynamic_training_does_not_do_is_refused_by_name(check, key, value):
    assert fails(check, **{key: value}) == f"{key}: dynamic training does not do this; {FATES[key].why}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": "kto"}, "stage: dynamic training takes pt, sft, dpo, found 'kto'; other stages run with train_type: "
         "static"),
        ({"optim": "lomo"}, "optim: dynamic training does not take lomo; it updates parameters during the backward pass"),
        ({"optim": "adamw_trch"}, "optim: there is no 'adamw_trch' (did you mean 'adamw_torch'?)"),
        ({"use_badam": True}, "use_badam: dynamic training does not do this"),
        ({"quantization_bit": 3}, "quantization_bit: quantization_method bnb takes 4, 8, found 3"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: dynamic training takes random"),
        ({"group_by_length": True}, "train_sampling_strategy: dynamic training takes random"),
        ({"do_train": False}, "do_train: dynamic training takes True, found False"),
        ({"bf16": True, "fp16": True}, "bf16, fp16: both are true; choose one"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: must be >= 1, found 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: must be >= 1, found 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be >= 1, found 0"),
        ({"learning_rate": -1e-4}, "learning_rate: must be >= 0, found -0.0001"),
        ({"weight_decay": -0.1}, "weight_decay: must be >= 0, found -0.1"),
        ({"cutoff_len": 0}, "cutoff_len: must be >= 1, found 0"),
        ({"max_samples": 0}, "max_samples: must be >= 1, found 0"),
        ({"save_total_limit": 0}, "save_total_limit: must be >= 1, found 0"),
        ({"seed": -1}, "seed: must be >= 0"),
        ({"num_train_epochs": 0}, "num_train_epochs: must be > 0 when neither max_steps nor train_step is, found 0"),
        ({"num_train_epochs": -1, "max_steps": 0}, "num_train_epochs: must be > 0"),
        ({"eval_strategy": "steps"}, "eval_strategy: steps needs eval_dataset or val_size"),
        ({"early_stopping_steps": 3}, "early_stopping_steps: needs eval_strategy: steps or epoch"),
        ({"save_strategy": "best"}, "save_strategy: best: needs eval_strategy: steps or epoch"),
        ({"model_name_or_path": None}, "model_name_or_path: missing; expected a folder or a hub name"),
        ({"model_name_or_path": ""}, "model_name_or_path: missing"),
        ({"dataset": None}, "dataset: missing; expected names from dataset_info.json"),
        ({"dataset": None, "eval_dataset": "a"}, "dataset: missing; expected names from dataset_info.json (did you mean "
         "'eval_dataset'?)"),
        ({"output_dir": None}, "output_dir: missing; expected a folder"),
        ({"dataset": "a,b,a"}, "dataset: 'a' is listed 2 times"),
        ({"dataset": ["a", "b", "b"]}, "dataset: 'b' is listed 2 times"),
        ({"init_mixture_proportions": [1, 2, 3]}, "init_mixture_proportions: 3 numbers for 2 datasets (a, b)"),
    ],
)  # fmt: skip
def test_mistakes_found_from_the_configuration_alone(check, keys, message):
    assert fails(check, **keys).startswith(message)


def test_a_local_model_that_is_not_there_is_named_with_its_neighbour(check, tmp_path):
    assert fails(check, model_name_or_path=str(tmp_path / "modle")) == (
        f"model_name_or_path: folder {tmp_path / 'modle'} not found (did you mean 'model'?)"
    )


@pytest.mark.parametrize(
    "name", ["./nowhere/at/all", "/nowhere/at/all", "../nowhere", ".hidden/model", "~/nowhere/at/all"]
)
def test_what_looks_like_a_path_must_exist(check, name):
    assert fails(check, model_name_or_path=name).startswith(f"model_name_or_path: folder {name} not found")


def test_what_lies_below_an_existing_folder_must_exist(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails(check, model_name_or_path="model/tuned") == "model_name_or_path: folder model/tuned not found"


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B"])
def test_what_may_be_a_hub_name_is_left_to_the_hub(check, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(model_name_or_path=name)


def test_a_folder_that_holds_no_model_is_named(check, tmp_path):
    (tmp_path / "empty").mkdir()
    assert fails(check, model_name_or_path=str(tmp_path / "empty")).endswith("empty has no config.json")


@pytest.mark.parametrize("value", [None, "a, b", ["a", "b"], " a ,b,"])
def test_lists_in_every_spelling(value):
    assert split_names(value) == ([] if value is None else ["a", "b"])
