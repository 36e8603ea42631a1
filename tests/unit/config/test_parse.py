"""Every key goes to its owner, and unknown keys are named with the nearest known one."""

import pytest

from dataflex_mega.config.identity import identity
from dataflex_mega.config.parse import MEGATRON_KEYS, OUR_KEYS, parse_config
from dataflex_mega.errors import ConfigError


def fails(config, keys):
    with pytest.raises(ConfigError) as caught:
        parse_config(config, keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_key_goes_to_its_owner(lf_keys):
    found = parse_config(
        {"learning_rate": 0.1, "stage": "pt", "weighter": "loss", "tensor_model_parallel_size": 1}, lf_keys
    )
    assert found.llamafactory == {"learning_rate": 0.1, "stage": "pt"}
    assert found.dataflex.weighter == "loss"
    assert found.megatron.tensor_model_parallel_size == 1
    assert set(found.all_keys) == {"learning_rate", "stage", "weighter", "tensor_model_parallel_size"}
    assert found.notes == []


def test_a_plain_llamafactory_configuration_is_static_and_unchanged(lf_keys):
    given = {"stage": "dpo", "learning_rate": 1e-4, "dataset": ["a", "b"], "deepspeed": {"zero": 3}, "max_steps": 3}
    found = parse_config(given, lf_keys)
    assert found.llamafactory == given
    assert found.dataflex.train_type == "static"
    assert found.notes == []


def test_a_misspelt_old_key_is_told_its_new_name(lf_keys):
    message = fails({"lookahaed": "exact", "mixer": "odm"}, lf_keys)
    assert message == "unknown key 'lookahaed' (did you mean 'weight_scope', formerly 'lookahead'?)"


def test_our_names_are_not_megatrons():
    assert not OUR_KEYS & MEGATRON_KEYS


def test_a_misspelt_key_is_named_with_the_nearest(lf_keys):
    assert fails({"laerning_rate": 1}, lf_keys) == "unknown key 'laerning_rate' (did you mean 'learning_rate'?)"


def test_all_unknown_keys_are_named_at_once_over_all_owners(lf_keys):
    message = fails({"warmupstep": 1, "mixr": "odm", "tensor_parallel_size": 2, "xyz": 0, 7: 1}, lf_keys)
    assert message == (
        "unknown keys 'warmupstep' (did you mean 'warmup_step'?), 'mixr' (did you mean 'mixer'?), "
        "'tensor_parallel_size' (did you mean 'tensor_model_parallel_size'?), 'xyz', '7'"
    )


def test_a_component_key_of_the_wrong_level_is_unknown(lf_keys):
    assert fails({"alpha": 0.5, "mixer": "odm"}, lf_keys).startswith("unknown key 'alpha'")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", "fast", "expected a number, found 'fast'"),
        ("max_steps", 1.5, "expected a whole number, found 1.5"),
        ("bf16", "true", "expected true or false, found 'true'"),
        ("stage", "stf", "expected one of pt, sft, rm, ppo, dpo, kto, found 'stf' (did you mean 'sft'?)"),
        ("num_train_epochs", [3], "expected a number, found [3]"),
    ],
)
def test_an_obvious_mistake_in_a_llamafactory_value(lf_keys, key, value, message):
    assert fails({key: value}, lf_keys) == f"{key}: {message}"


def test_a_number_written_as_text_becomes_a_number_everywhere(lf_keys):
    found = parse_config({"learning_rate": "1e-3", "max_steps": 100.0, "run_name": 7}, lf_keys)
    assert found.llamafactory == found.all_keys == {"learning_rate": 0.001, "max_steps": 100, "run_name": "7"}
    assert type(found.llamafactory["max_steps"]) is int


def test_old_keys_are_translated_and_noted(lf_keys):
    found = parse_config({"evaluation_strategy": "steps", "save_safetensors": True, "group_by_length": True}, lf_keys)
    assert found.llamafactory == {"eval_strategy": "steps", "train_sampling_strategy": "group_by_length"}
    assert found.all_keys == found.llamafactory
    assert len(found.notes) == 3


def test_notes_of_our_keys_come_with_those_of_old_ones(lf_keys):
    notes = parse_config({"no_cuda": True, "train_type": "static", "warmup_step": 3}, lf_keys).notes
    assert notes == ["no_cuda is now use_cpu: True", "static training does not use warmup_step"]
    assert parse_config({"train_type": "static", "prefetch": 7}, lf_keys).notes == [
        "static training does not use prefetch"
    ]
    assert parse_config({"engine": "megatron", "prefetch": 7}, lf_keys).notes == [], (
        "its static training is our own loop"
    )


def test_who_asks_for_megatron(lf_keys):
    assert parse_config({"mixer": "odm", "update_step": 1}, lf_keys).engine == "fsdp"
    assert parse_config({"engine": "megatron"}, lf_keys).engine == "megatron"
    assert parse_config({"tensor_model_parallel_size": 2}, lf_keys).engine == "megatron"
    assert parse_config({"stage": "pt"}, lf_keys, "USE_MCA").engine == "megatron"
    asked = parse_config({"use_mca": True}, lf_keys)
    assert asked.engine == "megatron" and "use_mca" not in asked.llamafactory
    assert parse_config({"use_mca": False}, lf_keys).engine == "fsdp"
    assert fails({"engine": "fsdp", "use_mca": True}, lf_keys).startswith("engine: fsdp, but use_mca=1 asks for")
    assert fails({"engine": "fsdp", "tensor_model_parallel_size": 2}, lf_keys).startswith("engine: fsdp, but tensor_")


def test_the_identity_of_a_run_does_not_depend_on_spelling(lf_keys):
    """What a checkpoint is compared with: the same run, said in old and in new keys, with and without a components file."""
    one = parse_config(
        {"learning_rate": 0.001, "eval_strategy": "no", "mixer": {"name": "odm", "alpha": 0.9}, "update_step": 5},
        lf_keys,
    )
    two = parse_config(
        {"learning_rate": "1e-3", "evaluation_strategy": "no", "train_type": "dynamic_mix", "component_name": "odm",
         "update_step": 5}, lf_keys,
    )  # fmt: skip
    data = {"a": "123"}
    assert identity(one, 8, data, one.roles) == identity(two, 8, data, two.roles)
    other = parse_config({"learning_rate": 0.002, "mixer": "odm", "update_step": 5}, lf_keys)
    assert identity(one, 8, data, one.roles) != identity(other, 8, data, other.roles)
