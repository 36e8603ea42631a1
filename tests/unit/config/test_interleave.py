"""mix_strategy and interleave_probs: proportions, epochs, and what they contradict."""

import pytest

from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.fates import FATES
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError
from tests.unit.config.conftest import LF_KEYS

UNDER, OVER, ONCE = "interleave_under", "interleave_over", "interleave_once"


def parsed(**keys):
    base = {"model_name_or_path": "m", "dataset": "a,b", "stage": "pt", "weighter": "loss"}
    return parse_config({**base, **keys}, {**dict.fromkeys(FATES, bool), **LF_KEYS})


@pytest.mark.parametrize(
    ("strategy", "probs", "samples"),
    [
        (UNDER, "0.25,0.75", 200),  # min(100 / 0.25, 150 / 0.75)
        (OVER, "0.25,0.75", 400),  # max of both
        (ONCE, "0.25,0.75", 250),
        (UNDER, "0.1,0.9", 166),  # 150 / 0.9 = 166.7: what is drawn before the first is used up
        (OVER, "0.3,0.7", 334),  # 100 / 0.3 = 333.3
        (UNDER, None, 200),  # in turn: twice the smaller one
        (OVER, None, 300),
        (UNDER, "0,1", 150),  # what is never drawn ends nothing
    ],
)
def test_an_epoch_is_as_long_as_the_interleaving(strategy, probs, samples):
    found = parsed(mix_strategy=strategy, interleave_probs=probs)
    assert found.interleaving is not None and found.interleaving.epoch_samples((100, 150)) == samples
    assert found.roles["mixer"] == {"name": "static"}
    assert any("mixer static" in note for note in found.notes)
    wanted = [float(x) for x in probs.split(",")] if probs else [0.5, 0.5]
    assert found.initial_proportions((100, 150), ("a", "b")) == pytest.approx(wanted)


def test_beside_a_mixer_that_moves_they_are_where_it_starts():
    found = parsed(mix_strategy=UNDER, interleave_probs="0.2,0.8", mixer="odm", update_step=5)
    assert found.roles["mixer"]["name"] == "odm" and found.dataflex.init_mixture_proportions == [0.2, 0.8]
    assert found.interleaving.epoch_samples((100, 150)) == 250
    assert any("odm moves the proportions" in note for note in found.notes)


def test_the_same_proportions_may_be_said_twice():
    parsed(mix_strategy=OVER, interleave_probs="0.2,0.8", init_mixture_proportions=[1, 4])
    parsed(mix_strategy=OVER, interleave_probs="0.2,0.8", mixer={"name": "static", "proportions": [1, 4]})


def test_a_static_run_of_llamafactory_is_its_own():
    found = parsed(weighter=None, mix_strategy=UNDER, interleave_probs="0.2,0.8")
    assert found.interleaving is None and not found.roles


def test_a_static_run_on_megatron_draws_in_the_proportions():
    found = parsed(weighter=None, engine="megatron", mix_strategy=UNDER, interleave_probs="0.2,0.8")
    assert found.roles["mixer"] == {"name": "static"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"interleave_probs": "0.5,0.5"}, "interleave_probs: needs mix_strategy: interleave_under, .*found concat"),
        (
            {"mix_strategy": UNDER, "interleave_probs": "0.5,0.6"},
            "interleave_probs: must sum to 1, found 0.5, 0.6: 1.1",
        ),
        ({"mix_strategy": UNDER, "interleave_probs": "1.5,-0.5"}, "interleave_probs: must be from 0 to 1, found 1.5"),
        ({"mix_strategy": UNDER, "interleave_probs": "-0.5,0.5"}, "found -0.5"),
        ({"mix_strategy": UNDER, "interleave_probs": "nan,0.5"}, "found nan"),
        ({"mix_strategy": UNDER, "interleave_probs": "half,half"}, "interleave_probs: expected numbers between commas"),
        (
            {"mix_strategy": OVER, "interleave_probs": "0,1"},
            "interleave_probs: 0 lets mix_strategy: interleave_over never end",
        ),
        ({"mix_strategy": ONCE, "interleave_probs": "0,1"}, "never end"),
        ({"mix_strategy": UNDER, "init_mixture_proportions": [1, 2]}, "init_mixture_proportions: .* contradicts equal"),
        (
            {"mix_strategy": UNDER, "interleave_probs": "0.5,0.5", "mixer": {"name": "static", "proportions": [1, 2]}},
            r"mixer.proportions: \[1, 2\] contradicts interleave_probs",
        ),
        (
            {"mix_strategy": UNDER, "mixture_sample_rule": "stratified", "mixer": "static"},
            "mixture_sample_rule: stratified gives proportions too",
        ),
        ({"mix_strategy": ONCE, "selector": "loss", "update_step": 2}, "does not go with a selector"),
        ({"mix_strategy": ONCE, "mixer": "static", "max_epochs": 1}, "max_epochs cannot hold"),
        ({"mix_strategy": "interleave"}, "mix_strategy: "),
    ],
)
def test_what_contradicts_is_one_line(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "a,b,c"}, "interleave_probs: 2 numbers for 3 datasets: a, b, c"),
        ({"eval_dataset": "e"}, r"interleave_probs: 2 numbers for 1 evaluation sets \(eval_dataset\): e"),
        ({"disable_shuffling": True}, "disable_shuffling: true: does not go with mix_strategy: interleave_under"),
    ],
)
def test_what_the_names_contradict_is_one_line(tmp_path, keys, message):
    (tmp_path / "config.json").write_text("{}")
    config = parsed(
        mix_strategy=UNDER, interleave_probs="0.5,0.5", model_name_or_path=str(tmp_path), output_dir="o", **keys
    )
    with pytest.raises(ConfigError, match=message):
        check_dynamic(config)


@pytest.mark.parametrize("role", ["selector", "mixer", "reorder"])
@pytest.mark.parametrize("key", [{"disable_shuffling": True}, {"train_sampling_strategy": "sequential"}])
def test_rows_as_they_come_leave_nothing_to_choose(tmp_path, role, key):
    (tmp_path / "config.json").write_text("{}")
    name = {"selector": "loss", "mixer": "odm", "reorder": "sorting"}[role]
    config = parsed(model_name_or_path=str(tmp_path), output_dir="o", update_step=2, **{role: name}, **key)
    with pytest.raises(ConfigError, match=f"{next(iter(key))}: .* does not go with {role} {name}"):
        check_dynamic(config)
    check_dynamic(parsed(model_name_or_path=str(tmp_path), output_dir="o", **key))
