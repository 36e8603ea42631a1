"""What a quantised model cannot be trained with is refused with both keys, before it is loaded."""

from types import SimpleNamespace

import pytest
from llamafactory.extras.constants import QuantizationMethod

from dataflex_mega.config import quantization
from dataflex_mega.config.quantization import check_quantization, check_sharding
from dataflex_mega.errors import ConfigError


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    missing = set()
    util = SimpleNamespace(find_spec=lambda name: None if name in missing else object())
    monkeypatch.setattr(quantization, "importlib", SimpleNamespace(util=util))
    return missing


def test_llamafactory_has_no_method_without_an_answer():
    assert {one.value for one in QuantizationMethod} == {*quantization.METHODS, *quantization.NOT_HERE}


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"quantization_bit": None, "finetuning_type": "full"}, {"quantization_bit": 4}, {"quantization_bit": 8},
        {"quantization_bit": 4, "finetuning_type": "oft", "quantization_type": "fp4", "double_quantization": False},
        {"quantization_bit": 4, "adapter_name_or_path": "one"},
    ],
)  # fmt: skip
def test_what_goes_together_passes(keys):
    check_quantization(keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quantization_bit": 3}, ["quantization_bit", "bnb", "4, 8", "3"]),
        ({"quantization_method": "hqq"}, ["quantization_method", "hqq", "use bnb"]),
        ({"quantization_method": "gptq"}, ["quantization_method", "gptq", "model_name_or_path"]),
        ({"quantization_method": "eetq", "quantization_bit": 8}, ["quantization_method", "eetq", "bnb"]),
        ({"quantization_method": "bmb"}, ["quantization_method", "did you mean 'bnb'"]),
        ({"finetuning_type": "full"}, ["finetuning_type", "full", "quantization_bit: 4", "lora or oft"]),
        ({"finetuning_type": "freeze"}, ["finetuning_type", "freeze", "quantization_bit: 4"]),
        ({"pissa_init": True}, ["pissa_init", "quantization_bit: 4"]),
        ({"resize_vocab": True}, ["resize_vocab", "quantization_bit: 4"]),
        ({"create_new_adapter": True}, ["create_new_adapter", "quantization_bit: 4"]),
        ({"adapter_name_or_path": "one,two"}, ["adapter_name_or_path", "one,two", "merge"]),
        ({"adapter_name_or_path": ["one", "two"]}, ["adapter_name_or_path", "merge"]),
        ({"train_from_scratch": True}, ["train_from_scratch", "quantization_bit: 4"]),
        ({"quantization_device_map": "auto"}, ["quantization_device_map", "quantization_bit: 4"]),
        ({"use_dora": True}, ["use_dora", "quantization_bit: 4"]),
    ],
)
def test_what_does_not_go_together_names_both(keys, words):
    with pytest.raises(ConfigError) as caught:
        check_quantization({"quantization_bit": 4, **keys})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_package_is_named(packages):
    packages.add("bitsandbytes")
    with pytest.raises(ConfigError, match="quantization_bit: 4: the package bitsandbytes .* pip install bitsandbytes"):
        check_quantization({"quantization_bit": 4})


def test_only_packed_weights_are_sharded():
    check_sharding({"finetuning_type": "full"})
    check_sharding({"quantization_bit": 4})
    with pytest.raises(ConfigError, match=r"quantization_bit: with fsdp.*4 bits with bnb"):
        check_sharding({"quantization_bit": 8})
