"""Every key of LLaMA-Factory has a fate, and a configuration hears of each key that does not act."""

import dataclasses

import pytest

from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.fates import FATES, TABLES, check_fates
from dataflex_mega.config.fates_megatron import MEGATRON_FATES
from dataflex_mega.config.fates_newer import NEWER_FATES
from dataflex_mega.config.load import load
from dataflex_mega.config.parse import parse_config
from dataflex_mega.config.settings_without_effect import notes_on_static
from dataflex_mega.errors import ConfigError

REFUSED = [key for key, fate in FATES.items() if fate.verb == "refused"]
NOTED = [key for key, fate in FATES.items() if fate.verb == "noted"]
SWITCHED = [key for key, fate in FATES.items() if fate.switch is not None]


@pytest.fixture(scope="module")
def classes():
    """LLaMA-Factory's argument classes, by name; TrainingArguments inherits transformers'."""
    from dataflex_mega.llamafactory.compat import ensure_importable

    ensure_importable()
    import llamafactory.hparams as hparams

    return {name: getattr(hparams, name) for name in TABLES}


@pytest.fixture(scope="module")
def keys():
    from dataflex_mega.llamafactory.args import argument_types

    return argument_types()


def strangers(classes):
    """(keys without a fate, fates without a key), each with its class."""
    fields = {
        name: {f.name for f in dataclasses.fields(cls) if f.init and f.name not in NEWER_FATES}
        for name, cls in classes.items()
    }
    without_fate = [f"{name}.{key}" for name, known in fields.items() for key in sorted(known - set(TABLES[name]))]
    without_key = [f"{name}.{key}" for name, known in fields.items() for key in sorted(set(TABLES[name]) - known)]
    return without_fate, without_key


def test_every_key_of_llamafactory_and_transformers_has_a_fate(classes):
    assert strangers(classes) == ([], [])
    assert sum(map(len, TABLES.values())) + len(NEWER_FATES) == len(FATES)  # no key in two tables


@pytest.mark.parametrize("name", TABLES)
def test_a_renamed_key_is_found(classes, name):
    fields = [(f.name, f.type, dataclasses.field(default=None)) for f in dataclasses.fields(classes[name]) if f.init]
    copy = dataclasses.make_dataclass("Copy", [("renamed", *fields[0][1:]), *fields[1:]])
    assert strangers({**classes, name: copy}) == ([f"{name}.renamed"], [f"{name}.{fields[0][0]}"])


def test_a_default_passes(classes):
    for name, cls in classes.items():
        for field in dataclasses.fields(cls):
            if field.init and field.name != "do_train":  # which our loop sets itself
                default = field.default_factory() if callable(field.default_factory) else field.default
                assert check_fates({field.name: getattr(default, "value", default)}) == [], name
                assert FATES[field.name].switch is None or FATES[field.name].is_harmless(default), field.name


def other_value(key):
    """A value of `key` that is not harmless."""
    return next(value for value in (True, False, 7, "x") if not FATES[key].is_harmless(value))


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_change_the_result_is_refused(key):
    assert len(FATES[key].why) > 5
    with pytest.raises(ConfigError, match=f"^{key}: ") as caught:
        check_fates({key: other_value(key)})
    assert str(caught.value).endswith(f"dynamic training does not do this; {FATES[key].why}")
    assert all(check_fates({key: value}) == [] for value in FATES[key].harmless)


@pytest.mark.parametrize("key", NOTED)
def test_what_changes_nothing_is_noted(key):
    assert check_fates({key: other_value(key)}) == [f"{key}: has no effect in dynamic training; {FATES[key].why}"]
    assert all(check_fates({key: value}) == [] for value in FATES[key].harmless)


@pytest.mark.parametrize("key", SWITCHED)
def test_a_key_whose_switch_is_off_is_noted(key):
    switch = FATES[key].switch
    off = {switch.keys[0]: "full"} if switch.keys == ("finetuning_type",) else {}
    assert check_fates({**off, key: other_value(key)}) == [f"{key}: has no effect without {switch}"]
    assert check_fates({**off, key: FATES[key].harmless[0]}) == []


@pytest.mark.parametrize(
    ("on", "key", "value"),
    [
        ({}, "lora_rank", 4), ({"finetuning_type": "oft"}, "oft_rank", 4), ({"do_predict": True}, "top_p", 0.5),
        ({"predict_with_generate": True}, "top_p", 0.5), ({"use_llama_pro": True}, "freeze_trainable_layers", 1),
        ({"finetuning_type": "freeze"}, "freeze_trainable_layers", 1),
        ({"loraplus_lr_ratio": 2.0}, "loraplus_lr_embedding", 1.0),
    ],
)  # fmt: skip
def test_a_key_whose_switch_is_on_acts(on, key, value):
    assert check_fates({**on, key: value}) == []


def test_a_value_that_is_not_taken_is_refused_with_those_that_are():
    for key, fate in FATES.items():
        if fate.takes:
            assert check_fates({key: fate.takes[0]}) == []
            with pytest.raises(ConfigError, match=f"^{key}: dynamic training takes .*found 'neither'"):
                check_fates({key: "neither"})


def test_keys_without_effect_for_one_reason_share_a_line():
    assert check_fates({"hub_model_id": "a/b", "hub_private_repo": True, "use_cache": True}) == [
        "hub_model_id, hub_private_repo: have no effect in dynamic training; nothing is uploaded during a run",
        "use_cache: has no effect in dynamic training; training keeps no cache of keys and values",
    ]


@pytest.mark.parametrize("key", MEGATRON_FATES)
def test_what_the_megatron_engine_does_not_act_on(key):
    assert key in FATES
    fate, who = MEGATRON_FATES[key], "engine: megatron"
    value = next(v for v in (True, False, 7, "x") if not fate.is_harmless(v))
    assert all(check_fates({key: harmless}, MEGATRON_FATES, who) == [] for harmless in fate.harmless)
    if fate.verb == "noted":
        assert check_fates({key: value}, MEGATRON_FATES, who) == [f"{key}: has no effect in {who}; {fate.why}"]
    else:
        with pytest.raises(ConfigError, match=f"^{key}: {who} does not do this; "):
            check_fates({key: value}, MEGATRON_FATES, who)


def test_accelerators_own_defaults_say_nothing():
    assert check_fates({"accelerator_config": {"even_batches": True, "split_batches": False}}) == []
    with pytest.raises(ConfigError, match="accelerator_config: dynamic"):
        check_fates({"accelerator_config": {"even_batches": True, "split_batches": True}})


# Keys that a dynamic run once took without a word.
ONCE_SILENT = {
    "ignore_pad_token_for_loss": False,
    "average_tokens_across_devices": False, "logging_nan_inf_filter": False, "liger_kernel_config": {"rope": False},
    "include_for_metrics": ["loss"], "batch_eval_metrics": True, "hub_token": "hf_x", "hub_private_repo": True,
    "hub_model_id": "me/model", "hub_always_push": True, "hub_revision": "dev", "local_rank": 1, "ray_num_workers": 4,
    "master_addr": "node0", "master_port": 29500, "restore_callback_states_from_checkpoint": True,
    "include_effective_tokens_per_second": True, "torch_compile_backend": "inductor", "torch_compile_mode": "default",
    "skip_memory_metrics": False, "include_num_input_tokens_seen": "all", "torch_empty_cache_steps": 2,
    "dataloader_drop_last": True, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True}, "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False, "eval_use_gather_object": True, "prediction_loss_only": True, "use_cache": True,
    "pref_beta": 0.3, "ppo_epochs": 2, "vllm_maxlen": 100, "export_size": 2, "top_p": 0.1, "galore_rank": 2,
    "swanlab_project": "mine", "badam_mode": "ratio", "buffer_size": 5,
}  # fmt: skip


def test_none_of_many_keys_at_once_is_ignored_in_silence():
    told, rest = {}, dict(ONCE_SILENT)
    while True:  # each refusal is one line; what is left is noted
        try:
            notes = check_fates(rest)
            break
        except ConfigError as error:
            key = str(error).partition(":")[0]
            told[key] = rest.pop(key)
    named = {key for note in notes for key in note.partition(":")[0].split(", ")}
    assert {*told, *named} == set(ONCE_SILENT) and len(told) >= 5


BASE = {"model_name_or_path": "hub/model", "dataset": "a,b", "output_dir": "out", "mixer": "odm", "update_step": 1,
        "update_times": -1, "max_steps": 100, "stage": "pt"}  # fmt: skip


def test_keys_of_a_later_llamafactory(keys):
    assert not set(NEWER_FATES) & set(keys), "the installed LLaMA-Factory has them: move them to its class's table"
    harmless = {"kt_cpu_activation": None, "hyper_parallel_cp_size": 1, "use_megatron_bridge": False}
    assert parse_config({**BASE, **harmless}, keys).llamafactory == parse_config(BASE, keys).llamafactory
    with pytest.raises(ConfigError, match=r"unknown key 'kt_config' .of a later LLaMA-Factory than the installed one"):
        parse_config({**BASE, "kt_config": {"a": 1}}, keys)
    asks = parse_config({**BASE, "use_megatron_bridge": True}, keys)
    assert asks.engine == "megatron" and "use_megatron_bridge" not in asks.llamafactory


def test_do_eval_needs_something_to_evaluate(keys):
    with pytest.raises(ConfigError, match=r"do_eval: true needs eval_dataset, val_size"):
        check_dynamic(parse_config({**BASE, "do_eval": True}, keys))
    check_dynamic(parse_config({**BASE, "do_eval": True, "val_size": 3}, keys))
    check_dynamic(parse_config({**BASE, "do_eval": True, "eval_strategy": "epoch", "val_size": 3}, keys))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"eval_steps": 500, "eval_strategy": "steps", "val_size": 0.1}, ["eval_steps: 500", "nothing is evaluated"]),
     ({"save_steps": 500}, ["save_steps: 500", "last step"]),
     ({"logging_steps": 101}, ["logging_steps: 101", "no step"]),
     ({"early_stopping_steps": 4, "eval_strategy": "steps", "eval_steps": 25, "val_size": 9}, ["early_stopping", "125"]),
     ({"update_times": 0}, ["update_times: 0", "odm", "never"]),
     ({"gradient_checkpointing": True, "disable_gradient_checkpointing": True}, ["gradient_checkpointing", "beside"]),
     ({"fsdp_config": {"fsdp_version": 2, "loss_scale": 0}}, ["fsdp_config", "fsdp_version", "without fsdp"]),
     ({"eval_steps": 5}, ["eval_steps", "without eval_strategy: steps"]),
     ({"save_only_model": True}, ["save_only_model"])],
)  # fmt: skip
def test_settings_by_which_nothing_happens_are_noted(keys, change, words):
    notes = check_dynamic(parse_config({**BASE, **change}, keys))
    assert len(notes) == 1 and all(word in notes[0] for word in words), notes
    assert check_dynamic(parse_config(BASE, keys)) == []


def test_a_static_run_that_does_nothing_says_so():
    for keys in ({}, {"stage": "pt", "do_predict": True}, {"do_train": False, "predict_with_generate": True}):
        (note,) = notes_on_static(keys)
        assert note.startswith("do_train: is not true") and "does nothing" in note
    for keys in ({"do_train": True}, {"do_eval": True}, {"do_predict": True}, {"stage": "ppo", "do_train": True}):
        assert notes_on_static(keys) == []


@pytest.mark.parametrize(("size", "words"), [(1.0, "all rows"), (1e-7, "for none"), (1.5, "whole number")])
def test_a_held_out_share_that_cannot_be_meant_is_refused(keys, size, words):
    with pytest.raises(ConfigError, match=f"^val_size: .*{words}"):
        check_dynamic(parse_config({**BASE, "val_size": size}, keys))
    for fine in (0, 0.1, 1, 2, 100):
        check_dynamic(parse_config({**BASE, "val_size": fine}, keys))


def test_former_names_of_llamafactory_are_mapped(keys):
    parsed = parse_config({**BASE, "new_special_tokens": "<|a|>,<|b|>"}, keys)
    assert (
        parsed.llamafactory["add_special_tokens"] == "<|a|>,<|b|>" and "new_special_tokens" not in parsed.llamafactory
    )
    assert any("new_special_tokens is now add_special_tokens" in note for note in parsed.notes)


def test_numbers_with_an_exponent_are_numbers(tmp_path, keys):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nadam_epsilon: '1e-6'\n")
    values = parse_config(load(str(file)), keys).llamafactory
    assert values == {"learning_rate": 1e-4, "adam_epsilon": 1e-6}
