"""Every number of LLaMA-Factory's keys is finite and has its bounds where a library has them."""

import math

import pytest

from dataflex_mega.config.numbers import RANGES, check_numbers
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError
from dataflex_mega.schema.coercion import alternatives


@pytest.fixture(scope="module")
def keys():
    from dataflex_mega.llamafactory.args import argument_types

    return argument_types()


def is_numeric(hint):
    return any(member in (int, float) for member in alternatives(hint)) and str not in alternatives(hint)


def test_no_number_of_the_installed_classes_may_be_infinite_nan_or_endless(keys):
    numeric = [key for key, hint in keys.items() if is_numeric(hint)]
    assert len(numeric) > 90
    for key in numeric:
        for value in (math.inf, -math.inf, math.nan, ".inf", "nan", 10**30, "1e999"):
            with pytest.raises(ConfigError) as caught:
                parse_config({key: value}, keys)
            assert str(caught.value).startswith(f"{key}: "), (key, value)


def test_no_number_may_be_text_truth_or_a_mapping(keys):
    for key in [key for key, hint in keys.items() if is_numeric(hint)]:
        for value in ("fast", True, {"a": 1}, [1, 2]):
            with pytest.raises(ConfigError) as caught:
                parse_config({key: value}, keys)
            assert str(caught.value).startswith(f"{key}: "), (key, value)


def test_text_is_no_list_mapping_or_truth(keys):
    for key in ("output_dir", "model_name_or_path", "template", "optim_args", "logging_dir", "run_name"):
        for value in (["a"], {"a": 1}, True):
            with pytest.raises(ConfigError) as caught:
                parse_config({key: value}, keys)
            assert str(caught.value).startswith(f"{key}: "), (key, value)
    for key in ("dataset", "lora_target", "add_special_tokens", "report_to", "adapter_name_or_path"):
        assert parse_config({key: ["a", "b"]}, keys).llamafactory[key] == ["a", "b"]
        with pytest.raises(ConfigError, match=key):
            parse_config({key: {"a": "b"}}, keys)


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [("lr_scheduler_type", "cosin", "cosine"), ("flash_attn", "fa22", "fa2"), ("rope_scaling", "lineer", "linear"),
     ("optim", "adamw_tourch", "adamw_torch"), ("eval_strategy", "step", "steps"), ("save_strategy", "epochs", "epoch"),
     ("finetuning_type", "loras", "lora"), ("quantization_method", "bnbb", "bnb"),
     ("hub_strategy", "everysave", "every_save"), ("logging_strategy", True, "steps")],
)  # fmt: skip
def test_a_word_of_an_enumeration_is_named_with_the_nearest(keys, key, value, near):
    with pytest.raises(ConfigError) as caught:
        parse_config({key: value}, keys)
    assert str(caught.value).startswith(f"{key}: ") and near in str(caught.value)


@pytest.mark.parametrize("key", RANGES)
def test_bounds_are_inclusive_where_they_say_so(key):
    bounds = RANGES[key]
    low = bounds.ge if bounds.ge is not None else bounds.gt
    assert low is not None
    with pytest.raises(ConfigError, match=f"^{key}: must be "):
        check_numbers({key: low - 1}, every=True)
    check_numbers({key: low - 1}, every=False)
    if bounds.ge is not None:
        check_numbers({key: low}, every=True)
    else:
        with pytest.raises(ConfigError, match=f"^{key}: must be > "):
            check_numbers({key: low}, every=True)


def test_a_share_above_one_is_no_number_of_rows():
    for value in (0.1, 0, 1, 5, 5.0):
        check_numbers({"val_size": value}, every=True)
    with pytest.raises(ConfigError, match=r"val_size: .* found 1\.5"):
        check_numbers({"val_size": 1.5}, every=True)
