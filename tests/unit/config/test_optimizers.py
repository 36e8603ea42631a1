"""Every optimizer that transformers and LLaMA-Factory have is taken, or refused with a reason, before anything is built."""

from types import SimpleNamespace

import pytest
from transformers.training_args import OptimizerNames

from dataflex_mega.config import optimizers
from dataflex_mega.config.optimizers import check_layout, check_optimizer_keys, check_visible_gpus, other_than_adam
from dataflex_mega.errors import ConfigError

FULL = {"finetuning_type": "full"}


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """As if all packages were installed; a test may take some away."""
    missing = set()
    util = SimpleNamespace(find_spec=lambda name: None if name in missing else object())
    monkeypatch.setattr(optimizers, "importlib", SimpleNamespace(util=util))
    return missing


def message_of(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_transformers_has_no_optimizer_without_an_answer():
    answers = {*optimizers.NAMES, *optimizers.NOT_HERE}
    assert {one.value for one in OptimizerNames} == answers


def test_llamafactory_has_no_optimizer_without_an_answer():
    from dataflex_mega.llamafactory.args import argument_types

    switches = {"use_badam", "use_galore", "use_apollo", "use_adam_mini", "use_muon"}
    assert switches == set(optimizers.KEYS) <= set(argument_types())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"optim": "adamw_trch"}, ["optim", "adamw_trch", "did you mean 'adamw_torch'"]),
        ({"optim": "lomo"}, ["optim", "lomo", "backward pass"]),
        ({"optim": "schedule_free_adamw"}, ["optim", "schedule_free_adamw", "evaluates another model"]),
        ({"optim": "galore_adamw_layerwise"}, ["optim", "galore_adamw_layerwise", "backward pass"]),
        ({"optim": "adamw_torch_8bit"}, ["optim", "adamw_torch_8bit", "torchao"]),
        ({"optim": "galore_adamw", **FULL}, ["galore_adamw", "optim_target_modules", "all-linear"]),
        ({"optim_target_modules": ["q_proj"], **FULL}, ["optim_target_modules", "adamw_torch", "galore_adamw"]),
        ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, ["optim_target_modules", "full", "lora"]),
        ({"use_galore": True}, ["use_galore", "finetuning_type", "lora"]),
        ({"use_apollo": True, "finetuning_type": "oft"}, ["use_apollo", "finetuning_type", "oft"]),
        ({"use_adam_mini": True}, ["use_adam_mini", "finetuning_type", "lora"]),
        ({"use_galore": True, "galore_layerwise": True, **FULL}, ["galore_layerwise", "backward pass"]),
        ({"use_apollo": True, "apollo_layerwise": True, **FULL}, ["apollo_layerwise", "backward pass"]),
        ({"use_galore": True, "optim": "adamw_8bit", **FULL}, ["optim", "adamw_8bit", "use_galore"]),
        ({"use_muon": True, "optim": "sgd"}, ["optim", "sgd", "use_muon"]),
        ({"use_muon": True, "use_adam_mini": True, **FULL}, ["use_muon", "use_adam_mini", "keep one"]),
        ({"use_muon": True, "loraplus_lr_ratio": 4.0}, ["use_muon", "loraplus_lr_ratio", "keep one"]),
        ({"use_muon": True, "optim_args": "momentum=0.9"}, ["optim_args", "use_muon"]),
        ({"use_badam": True, **FULL}, ["use_badam", "checkpoint", "freeze"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys, words):
    message = message_of(check_optimizer_keys, keys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"optim": None}, {"use_muon": False, "optim": "sgd"}, {"use_muon": True}, {"loraplus_lr_ratio": 4.0},
        {"use_galore": True, **FULL}, {"use_galore": True, "optim": "adafactor", **FULL},
        {"use_apollo": True, "optim": "adamw_torch_fused", **FULL}, {"use_adam_mini": True, **FULL},
        {"optim": "apollo_adamw", "optim_target_modules": ["q_proj"], **FULL}, {"optim": "lion_8bit"},
    ],
)  # fmt: skip
def test_what_can_be_passes_and_a_missing_package_is_named(keys, packages):
    check_optimizer_keys(keys)
    packages.update(optimizer.module for optimizer in optimizers.NAMES.values())
    packages.update(optimizer.module for optimizer in optimizers.KEYS.values())
    asked = next((key for key in optimizers.KEYS if keys.get(key)), None)
    needed = optimizers.KEYS[asked] if asked else optimizers.NAMES[keys.get("optim") or "adamw_torch"]
    if needed.module:
        message = message_of(check_optimizer_keys, keys)
        assert f"pip install --no-deps {needed.package}" in message and (asked or keys["optim"]) in message
    else:
        check_optimizer_keys(keys)


def test_an_optimizer_of_whole_matrices_is_refused_on_shards_only():
    refused = {"adafactor", "galore_adafactor", "apollo_adamw", *optimizers._BNB_NAMES}
    for name in optimizers.NAMES:
        check_layout({"optim": name}, "single")
        check_layout({"optim": name}, "ddp")
        if name in refused:
            message = message_of(check_layout, {"optim": name}, "fsdp2")
            assert name in message and "fsdp" in message
        else:
            check_layout({"optim": name}, "fsdp2")
    assert "use_apollo" in message_of(check_layout, {"use_apollo": True}, "fsdp2")
    assert "adafactor" in message_of(check_layout, {"use_galore": True, "optim": "adafactor"}, "fsdp2")
    for key in ("use_galore", "use_muon", "use_adam_mini"):
        check_layout({key: True}, "fsdp2")


def test_adam_mini_is_refused_where_it_would_wait_for_processes_that_are_not_there():
    for visible, processes in ((0, 2), (1, 1), (1, 2), (2, 2)):
        check_visible_gpus({"use_adam_mini": True}, visible, processes)
    check_visible_gpus({"use_muon": True}, 8, 1)
    assert "CUDA_VISIBLE_DEVICES" in message_of(check_visible_gpus, {"use_adam_mini": True}, 8, 1)


def test_gradient_scores_are_told_which_optimizer_has_no_moments_of_adam():
    assert other_than_adam({}) is None
    assert other_than_adam({"optim": "adamw_torch_fused", "loraplus_lr_ratio": 2.0}) is None
    assert other_than_adam({"use_muon": True}) == "use_muon: true"
    assert other_than_adam({"optim": "galore_adamw"}) == "galore_adamw"
