"""The keys of the generation that follows a training."""

from pathlib import Path

import pytest

from dataflex_mega.llamafactory.predict import prediction_keys

TRAINED = {"model_name_or_path": "base", "dataset": "a", "eval_dataset": "b", "learning_rate": 1e-3}


@pytest.mark.parametrize("tuning", ["lora", "oft"])
def test_an_adapter_is_put_on_the_model_it_was_trained_on(tuning):
    keys = prediction_keys({**TRAINED, "finetuning_type": tuning}, Path("out"))
    assert (keys["model_name_or_path"], keys["adapter_name_or_path"]) == ("base", "out")
    assert keys["finetuning_type"] == tuning and "dataset" not in keys and "learning_rate" not in keys


def test_a_whole_model_is_taken_as_it_is():
    keys = prediction_keys({**TRAINED, "finetuning_type": "freeze"}, Path("out"))
    assert keys["model_name_or_path"] == "out" and "adapter_name_or_path" not in keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("generation_config", "g"),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("top_p", 0.3),
        ("use_kv_cache", 0),
    ],
)
def test_keys_that_act_in_generation_reach_it(key, value):
    assert prediction_keys({**TRAINED, key: value}, Path("out"))[key] == value
