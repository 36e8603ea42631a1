"""Keys without an effect in dynamic training are refused or noted, and settings that keep a role from acting are noted."""

import pytest

from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.fates import FATES, check_fates
from dataflex_mega.config.load import load
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError


@pytest.fixture(scope="module")
def keys():
    from dataflex_mega.llamafactory.args import argument_types

    return argument_types()


@pytest.mark.parametrize("key", [key for key, fate in FATES.items() if fate.refused])
def test_what_would_change_the_result_is_refused(key):
    harmless = FATES[key].harmless
    value = False if True in harmless else "inductor"
    with pytest.raises(ConfigError, match=f"^{key}: "):
        check_fates({key: value})
    assert all(check_fates({key: value}) == [] for value in harmless)


@pytest.mark.parametrize("key", [key for key, fate in FATES.items() if not fate.refused])
def test_what_changes_nothing_is_noted(key):
    value = next(v for v in (True, 7, "x") if not any(v == h and type(v) is type(h) for h in FATES[key].harmless))
    notes = check_fates({key: value})
    assert len(notes) == 1 and notes[0].startswith(f"{key}: has no effect")


def test_do_eval_needs_a_strategy():
    with pytest.raises(ConfigError, match="do_eval: .*eval_strategy"):
        check_fates({"do_eval": True})
    assert check_fates({"do_eval": True, "eval_strategy": "epoch"}) == [] == check_fates({"do_eval": False})


BASE = {"model_name_or_path": "hub/model", "dataset": "a,b", "output_dir": "out", "mixer": "odm", "update_step": 1,
        "update_times": -1, "max_steps": 100, "stage": "pt"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [({"eval_steps": 500, "eval_strategy": "steps", "val_size": 0.1}, ["eval_steps: 500", "nothing is evaluated"]),
     ({"save_steps": 500}, ["save_steps: 500", "last step"]),
     ({"logging_steps": 101}, ["logging_steps: 101", "no step"]),
     ({"early_stopping_steps": 4, "eval_strategy": "steps", "eval_steps": 25, "val_size": 9}, ["early_stopping", "125"]),
     ({"update_times": 0}, ["update_times: 0", "odm", "never"]),
     ({"save_only_model": True}, ["save_only_model"])],
)  # fmt: skip
def test_settings_by_which_nothing_happens_are_noted(keys, change, words):
    notes = check_dynamic(parse_config({**BASE, **change}, keys))
    assert len(notes) == 1 and all(word in notes[0] for word in words), notes
    assert check_dynamic(parse_config(BASE, keys)) == []


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
