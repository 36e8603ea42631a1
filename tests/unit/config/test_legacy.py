import pytest

from dataflex_mega.config.legacy import DROPPED, RENAMED, modernise
from dataflex_mega.errors import ConfigError


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_keys_keep_their_value_and_say_so(old, new):
    found, notes = modernise({old: 7, "seed": 1}, {"seed", new})
    assert found == {"seed": 1, new: 7}
    assert notes == [f"{old} is now {new}: 7"]


def test_a_key_that_is_still_known_is_left_alone():
    given = {"evaluation_strategy": "steps", "group_by_length": True}
    assert modernise(given, given) == (given, [])


@pytest.mark.parametrize(("value", "new"), [(True, "group_by_length"), (False, "random")])
def test_group_by_length_becomes_a_sampling_strategy(value, new):
    found, notes = modernise({"group_by_length": value}, ())
    assert found == {"train_sampling_strategy": new}
    assert len(notes) == 1


def test_old_and_new_key_may_agree_but_not_differ():
    assert modernise({"evaluation_strategy": "steps", "eval_strategy": "steps"}, {"eval_strategy"})[0] == {
        "eval_strategy": "steps"
    }
    with pytest.raises(ConfigError, match="evaluation_strategy: 'steps' contradicts eval_strategy: 'no'"):
        modernise({"evaluation_strategy": "steps", "eval_strategy": "no"}, {"eval_strategy"})


@pytest.mark.parametrize("key", DROPPED)
def test_a_dropped_key_with_no_effect_left_is_noted(key):
    found, notes = modernise({key: DROPPED[key][0][0]}, ())
    assert found == {}
    assert notes[0].startswith(f"{key} is not used any more")


@pytest.mark.parametrize(
    ("key", "value"), [("jit_mode_eval", True), ("half_precision_backend", "apex"), ("tpu_num_cores", 8)]
)
def test_a_dropped_key_that_asks_for_what_is_gone_is_an_error(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: {value!r} cannot be had any more"):
        modernise({key: value}, ())


def test_fsdp_keys_move_into_the_mapping():
    given = {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "fsdp_config": {"version": 2}}
    found, notes = modernise(given, {"fsdp_config"})
    assert found == {"fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
    assert notes == ["fsdp_transformer_layer_cls_to_wrap is now fsdp_config.transformer_layer_cls_to_wrap"]
    assert given["fsdp_config"] == {"version": 2}


@pytest.mark.parametrize("config", [{"transformer_layer_cls_to_wrap": "Other"}, "file.json"])
def test_fsdp_keys_that_contradict_the_mapping_are_an_error(config):
    with pytest.raises(ConfigError, match="contradicts fsdp_config"):
        modernise({"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "fsdp_config": config}, {"fsdp_config"})


def test_unknown_keys_are_left_for_others_to_refuse():
    assert modernise({"laerning_rate": 1, 3: 4}, ()) == ({"laerning_rate": 1, 3: 4}, [])
