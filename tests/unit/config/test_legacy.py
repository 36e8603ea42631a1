"""Old keys: renamed with a note, dropped with a note, or refused."""

import pytest

from dataflex_mega.config.legacy import DROPPED, OUR_RENAMED, RENAMED, migrate_keys
from dataflex_mega.errors import ConfigError


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_keys_keep_their_value_and_say_so(old, new):
    found, notes = migrate_keys({old: 7, "seed": 1}, {"seed", new})
    assert found == {"seed": 1, new: 7}
    assert notes == [f"{old} is now {new}: 7"]


def test_a_key_that_is_still_known_is_left_alone():
    given = {"evaluation_strategy": "steps", "group_by_length": True}
    assert migrate_keys(given, given) == (given, [])


@pytest.mark.parametrize(("value", "new"), [(True, "group_by_length"), (False, "random")])
def test_group_by_length_becomes_a_sampling_strategy(value, new):
    found, notes = migrate_keys({"group_by_length": value}, ())
    assert found == {"train_sampling_strategy": new}
    assert len(notes) == 1


def test_old_and_new_key_may_agree_but_not_differ():
    assert migrate_keys({"evaluation_strategy": "steps", "eval_strategy": "steps"}, {"eval_strategy"})[0] == {
        "eval_strategy": "steps"
    }
    with pytest.raises(ConfigError, match="evaluation_strategy: 'steps' contradicts eval_strategy: 'no'"):
        migrate_keys({"evaluation_strategy": "steps", "eval_strategy": "no"}, {"eval_strategy"})


@pytest.mark.parametrize("key", DROPPED)
def test_a_dropped_key_with_no_effect_left_is_noted(key):
    found, notes = migrate_keys({key: DROPPED[key][0][0]}, ())
    assert found == {}
    assert notes[0].startswith(f"{key} is not used any more")


@pytest.mark.parametrize(
    ("key", "value"), [("jit_mode_eval", True), ("half_precision_backend", "apex"), ("tpu_num_cores", 8)]
)
def test_a_dropped_key_that_asks_for_what_is_gone_is_an_error(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: {value!r} is not available any more"):
        migrate_keys({key: value}, ())


def test_fsdp_keys_move_into_the_mapping():
    given = {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "fsdp_config": {"version": 2}}
    found, notes = migrate_keys(given, {"fsdp_config"})
    assert found == {"fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
    assert notes == ["fsdp_transformer_layer_cls_to_wrap is now fsdp_config.transformer_layer_cls_to_wrap"]
    assert given["fsdp_config"] == {"version": 2}


@pytest.mark.parametrize("config", [{"transformer_layer_cls_to_wrap": "Other"}, "file.json"])
def test_fsdp_keys_that_contradict_the_mapping_are_an_error(config):
    with pytest.raises(ConfigError, match="contradicts fsdp_config"):
        migrate_keys(
            {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "fsdp_config": config}, {"fsdp_config"}
        )


def test_unknown_keys_are_left_for_others_to_refuse():
    assert migrate_keys({"laerning_rate": 1, 3: 4}, ()) == ({"laerning_rate": 1, 3: 4}, [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"candidates": 0.1}, {"candidate_fraction": 0.1}),
        ({"rescore": "incremental"}, {"score_reuse": "latest"}),
        ({"rescore": "full"}, {"score_reuse": "none"}),
        ({"lookahead": "exact"}, {"weight_scope": "step"}),
        ({"lookahead": "micro"}, {"weight_scope": "micro_batch"}),
        ({"nan_loss": "continue"}, {"on_non_finite": "continue"}),
        ({"lookahead": "exakt"}, {"weight_scope": "exakt"}),
    ],
)
def test_our_old_keys_and_their_words_are_translated_with_one_note(old, new):
    found, notes = migrate_keys(old, ())
    (key,), ((new_key, new_value),) = old, new.items()
    assert found == new and notes == [f"{key} is now {new_key}: {new_value}"]
    assert key in OUR_RENAMED


def test_an_old_key_of_ours_beside_the_new_one():
    assert migrate_keys({"lookahead": "exact", "weight_scope": "step"}, {"weight_scope"})[0] == {"weight_scope": "step"}
    with pytest.raises(ConfigError, match="lookahead: 'micro' contradicts weight_scope: 'step'; lookahead is the old"):
        migrate_keys({"lookahead": "micro", "weight_scope": "step"}, {"weight_scope"})


def test_differences_to_accept_are_named_by_todays_keys():
    assert migrate_keys({"resume_ignore": ["rescore", "seed"]}, {"resume_ignore"})[0] == {
        "resume_ignore": ["score_reuse", "seed"]
    }
