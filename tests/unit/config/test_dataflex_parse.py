"""The keys of dataflex_mega and DataFlex: which roles they set, their defaults and their refusals."""

import math
from dataclasses import fields

import pytest

from dataflex_mega.config.dataflex_parse import ENGINE_OPTIONS, ROLE_KEYS, RunArguments, parse
from dataflex_mega.config.proportions import initial_proportions
from dataflex_mega.errors import ConfigError

DATAFLEX_DEFAULTS = {
    "components_cfg_file": None, "component_name": None, "warmup_step": 0, "update_step": 0, "update_times": 1,
    "static_mix": False, "train_step": 0, "freeze_gate": False, "early_stopping_min_delta": 0.0,
    "mixture_sample_rule": None, "init_mixture_proportions": None, "mixer_eval_dataset": None,
}  # fmt: skip
MOVING = {"warmup_step": 2, "update_step": 5}


def arguments(**keys):
    return parse(keys).arguments


def roles(**keys):
    return parse(keys).roles.specs


def start(sizes, **keys):
    parsed = parse(keys)
    return initial_proportions(parsed.arguments, parsed.roles.specs.get("mixer"), sizes)


def fails(**keys):
    with pytest.raises(ConfigError) as caught:
        parse(keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_key_of_ours_is_static_training_with_dataflex_defaults():
    parsed = parse({})
    found = parsed.arguments
    assert (found.train_type, found.engine, parsed.notes) == ("static", "auto", ())
    assert {key: getattr(found, key) for key in DATAFLEX_DEFAULTS} == DATAFLEX_DEFAULTS
    assert parsed.roles.specs == {}


def test_every_key_is_documented():
    for f in fields(RunArguments):
        assert f.metadata["help"], f.name


def test_every_key_is_classed_by_what_it_does_in_static_training():
    always = {"train_type", "components_cfg_file", "engine", "callbacks", "corpus_dir", "eval_corpus_dir"}
    assert {f.name for f in fields(RunArguments)} == {*ROLE_KEYS, *ENGINE_OPTIONS, *always}


# -- which roles are on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_type", "name", "role", "spec"),
    [
        ("dynamic_select", "loss", "selector", {"name": "loss", "focus": "medium"}),
        ("dynamic_mix", "odm", "mixer", {"name": "odm", "alpha": 0.9}),
        ("dynamic_weight", "loss", "weighter", {"name": "loss", "strategy": "linupper"}),
        ("dynamic_reorder", "dynamic_folding", "reorder", {"name": "folding", "layers": 3}),
        ("dynamic_weighting", "loss_extremes", "weighter", {"name": "loss", "strategy": "extremes"}),
    ],
)
def test_train_type_and_component_name_pick_one_role_as_in_dataflex(train_type, name, role, spec):
    assert roles(train_type=train_type, component_name=name, **MOVING) == {role: spec}


def test_a_role_key_alone_is_enough():
    parsed = parse({"weighter": "loss"})
    assert parsed.arguments.train_type == "dynamic"
    assert parsed.roles.specs["weighter"] == {"name": "loss"}


def test_all_three_roles_at_once():
    mixer = {"name": "odm", "params": {"alpha": 0.5}}
    assert roles(selector="loss", mixer=mixer, weighter="loss", **MOVING) == {
        "selector": {"name": "loss"}, "mixer": {"name": "odm", "alpha": 0.5}, "weighter": {"name": "loss"},
    }  # fmt: skip


def test_a_train_type_and_further_roles_go_together():
    specs = roles(train_type="dynamic_mix", component_name="odm", weighter="loss", **MOVING)
    assert specs["mixer"]["name"] == "odm"
    assert specs["weighter"] == {"name": "loss"}


def test_a_train_type_with_its_role_key_needs_no_component():
    assert roles(train_type="dynamic_mix", mixer="odm", **MOVING)["mixer"] == {"name": "odm"}


def test_a_parameter_given_beside_a_component_changes_it():
    assert roles(train_type="dynamic_mix", component_name="odm", mixer={"alpha": 0.3}, **MOVING)["mixer"] == {
        "name": "odm",
        "alpha": 0.3,
    }


def test_dynamic_by_name_means_the_roles_listed():
    assert roles(train_type="dynamic", weighter="loss")["weighter"] == {"name": "loss"}
    assert fails(train_type="dynamic") == "train_type: dynamic needs at least one of selector, mixer, reorder, weighter"


def test_static_full_is_static():
    assert arguments(train_type="static_full").train_type == "static"


def test_a_components_file_of_the_users(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("mixers: {sharp: {name: odm, params: {alpha: 0.2}}}")
    assert roles(train_type="dynamic_mix", component_name="sharp", components_cfg_file=str(path), **MOVING)[
        "mixer"
    ] == {"name": "odm", "alpha": 0.2}


def test_a_plug_in_is_named_by_module_and_class():
    assert roles(mixer="dataflex_mega.algorithms.mixers.odm:Odm", **MOVING)["mixer"] == {
        "name": "dataflex_mega.algorithms.mixers.odm:Odm"
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_type": "dynamic_mx"}, "train_type: expected one of static, dynamic_select, dynamic_mix, dynamic_reorder, "
         "dynamic_weight, dynamic_lego, dynamic, found 'dynamic_mx' (did you mean 'dynamic_mix'?)"),
        ({"train_type": "dynamic_reorder"}, "train_type: dynamic_reorder needs component_name (one of sorting, shuffle, "),
        ({"reorder": "folding"}, "update_step: must be >= 1 for reorder folding to act, found 0"),
        ({"reorder": "folding", "max_epochs": 2, "mixer": "odm", **MOVING}, "max_epochs: does not go with a reorder, which"),
        ({"train_type": "dynamic_lego"}, "train_type: dynamic_lego needs component_name (one of hier"),
        ({"train_type": 3}, "train_type: expected text, found 3"),
        ({"train_type": "dynamic_select"}, "train_type: dynamic_select needs component_name (one of random, loss, "
         "loss_low, loss_high, "),
        ({"train_type": "dynamic_mix", "selector": "loss"}, "train_type: dynamic_mix needs component_name"),
        ({"train_type": "dynamic_weight", "component_name": "lss"}, "component_name: no weighter 'lss' in the packaged "
         "components file (did you mean 'loss'?)"),
        ({"train_type": "dynamic_mix", "component_name": "odm", "mixer": "random"}, "mixer: random differs from"),
        ({"train_type": "dynamic", "component_name": "odm", "mixer": "odm", **MOVING}, "component_name: 'odm' needs a "
         "train_type that says its role: dynamic_select, dynamic_mix, dynamic_reorder, dynamic_weight"),
        ({"component_name": "odm"}, "component_name: has no effect without a role"),
        ({"train_type": "static", "mixer": "odm"}, "mixer: has no effect with train_type: static; drop train_type or "
         "choose dynamic_*"),
        ({"train_type": "static_full", "weighter": "loss"}, "weighter: has no effect with train_type: static"),
        ({"mixer": "odn", **MOVING}, "mixer: no mixer is called 'odn' (did you mean 'odm'?)"),
        ({"mixer": {"name": "odm", "alpa": 1}, **MOVING}, "mixer.odm.alpa: unknown parameter (did you mean 'alpha'?)"),
        ({"mixer": {"name": "odm", "alpha": "x"}, **MOVING}, "mixer.odm.alpha: expected a number, found 'x'"),
        ({"selector": {"name": "loss", "focus_wieght": 2.0}, **MOVING}, "selector.loss.focus_wieght: unknown parameter "
         "(did you mean 'focus_weight'?)"),
        ({"selector": {"focus": "low"}}, "selector.name: missing"),
        ({"selector": ["loss"]}, "selector: expected text, or a mapping, or nothing, found ['loss']"),
        ({"components_cfg_file": "no/such.yaml", "train_type": "dynamic_mix", "component_name": "odm"},
         "components_cfg_file: no/such.yaml not found"),
    ],
)  # fmt: skip
def test_roles_that_cannot_be_resolved(keys, message):
    assert fails(**keys).startswith(message)


# -- single values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("warmup_step", -1, "must be >= 0, found -1"),
        ("warmup_step", "ten", "expected a whole number, found 'ten'"),
        ("warmup_step", 1.5, "expected a whole number, found 1.5"),
        ("update_step", -5, "must be >= 0, found -5"),
        ("update_times", None, "expected a whole number, found nothing"),
        ("train_step", -1, "must be >= 0, found -1"),
        ("prefetch", -1, "must be >= 0, found -1"),
        ("score_batch_size", 0, "must be >= 1, found 0"),
        ("early_stopping_min_delta", -0.1, "must be >= 0, found -0.1"),
        ("early_stopping_min_delta", math.inf, "must be finite and >= 0, found inf"),
        ("early_stopping_min_delta", math.nan, "expected a number, found nan"),
        ("static_mix", "yes", "expected true or false, found 'yes'"),
        ("freeze_gate", 1, "expected true or false, found 1"),
        ("tensorboard", "on", "expected true or false, found 'on'"),
        ("weight_scope", "stepp", "expected one of micro_batch, step, found 'stepp' (did you mean 'step'?)"),
        ("loss_normalization", "tokens", "expected one of token, sample, found 'tokens' (did you mean 'token'?)"),
        ("on_non_finite", "ignore", "expected one of stop, continue, found 'ignore'"),
        ("engine", "fsdp2", "expected one of auto, fsdp, megatron, found 'fsdp2' (did you mean 'fsdp'?)"),
        ("mixture_sample_rule", "mixtur", "expected one of mixture, stratified, uniform, or nothing, found 'mixtur'"),
        ("callbacks", ["my.module.Class"], "expected package.module:Class, found 'my.module.Class'"),
        ("callbacks", [3], "expected a list of text, found [3]"),
        ("resume_ignore", {"a": 1}, "expected a list of text, found {'a': 1}"),
        ("init_mixture_proportions", [0.5, "x"], "expected a list of numbers, or nothing"),
        ("init_mixture_proportions", [1.5, -0.5], "must be finite, >= 0 and not all 0, found [1.5, -0.5]"),
        ("init_mixture_proportions", [0, 0], "must be finite, >= 0 and not all 0, found [0.0, 0.0]"),
        ("init_mixture_proportions", [math.inf, 1], "must be finite, >= 0 and not all 0"),
        ("init_mixture_proportions", [math.nan, 1], "expected a list of numbers"),
        ("init_mixture_proportions", [], "must be finite, >= 0 and not all 0, found []"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(key, value, message):
    assert fails(weighter="loss", **{key: value}).startswith(f"{key}: {message}")


def test_the_megatron_engine_passes_the_type_check_and_is_refused_where_it_is_resolved():
    assert arguments(engine="megatron").engine == "megatron"


def test_a_list_may_be_written_with_commas():
    found = arguments(weighter="loss", callbacks="a.b:C, d:E", resume_ignore="global_batch_size")
    assert found.callbacks == ["a.b:C", "d:E"]
    assert found.resume_ignore == ["global_batch_size"]


@pytest.mark.parametrize("role", [{"selector": "loss"}, {"mixer": "odm"}, {"mixer": "random"}])
def test_update_step_must_let_a_selector_or_a_moving_mixer_act(role):
    name, value = next(iter(role.items()))
    assert fails(**role) == f"update_step: must be >= 1 for {name} {value} to act, found 0"


@pytest.mark.parametrize("role", [{"weighter": "loss"}, {"mixer": "static"}])
def test_update_step_may_be_0_where_nothing_is_updated(role):
    assert arguments(**role).update_step == 0


def test_warmup_step_0_is_legal():
    assert arguments(mixer="odm", update_step=5).warmup_step == 0


# -- static training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("train_step", 10, "use max_steps"),
        ("static_mix", True, "choose train_type: dynamic_mix"),
        ("init_mixture_proportions", [0.5, 0.5], "choose train_type: dynamic_mix"),
        ("freeze_gate", True, "choose a dynamic train_type"),
        ("early_stopping_min_delta", 0.1, "choose a dynamic train_type"),
    ],
)
def test_static_training_refuses_what_would_change_what_is_trained(key, value, hint):
    assert fails(train_type="static", **{key: value}) == f"{key}: has no effect with train_type: static; {hint}"


def test_static_training_says_what_it_does_not_use():
    parsed = parse(
        {"train_type": "static", "component_name": "loss", "warmup_step": 4, "update_step": 0, "prefetch": 3}
    )
    assert parsed.arguments.train_type == "static"
    assert list(parsed.notes) == ["static training does not use component_name, warmup_step, prefetch"]


def test_a_schedule_without_a_role_was_meant_to_do_something():
    message = fails(warmup_step=100)
    assert message.startswith(
        "warmup_step: has no effect without a role; set selector, mixer, reorder, weighter or train_type"
    )
    assert message.endswith("the learning rate's warm-up is warmup_steps")


# -- proportions -------------------------------------------------------------------------------------------------------

SIZES = [100, 300]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"weighter": "loss"}, (0.25, 0.75)),
        ({"selector": "loss", **MOVING}, (0.25, 0.75)),
        ({"mixer": "odm", **MOVING}, (0.5, 0.5)),
        ({"mixer": "static"}, (0.5, 0.5)),
        ({"weighter": "loss", "mixture_sample_rule": "mixture"}, (0.5, 0.5)),
        ({"weighter": "loss", "mixture_sample_rule": "uniform"}, (0.5, 0.5)),
        ({"mixer": "static", "mixture_sample_rule": "stratified"}, (0.25, 0.75)),
        ({"mixer": "static", "mixture_sample_rule": "uniform"}, (0.5, 0.5)),
        ({"mixer": "odm", "init_mixture_proportions": [3, 1], **MOVING}, (0.75, 0.25)),
        ({"weighter": "loss", "init_mixture_proportions": [3, 1]}, (0.75, 0.25)),
        ({"mixer": {"name": "static", "proportions": [1, 4]}}, (0.2, 0.8)),
        ({"mixer": {"name": "odm", "initial_proportions": [1, 4]}, **MOVING}, (0.2, 0.8)),
        ({"mixer": {"name": "static", "proportions": [1, 3]}, "init_mixture_proportions": [0.25, 0.75]}, (0.25, 0.75)),
    ],
)
def test_the_proportions_a_run_starts_with(keys, expected):
    assert start(SIZES, **keys) == pytest.approx(expected, abs=1e-15)


def test_proportions_are_normalised_exactly():
    found = start([1, 1, 1, 1], mixer="odm", init_mixture_proportions=[0.4, 0.3, 0.2, 0.1], **MOVING)
    assert found == (0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"mixer": "odm", "init_mixture_proportions": [1, 1, 1], **MOVING}, "init_mixture_proportions"),
        ({"mixer": {"name": "static", "proportions": [1, 1, 1]}}, "mixer.proportions"),
    ],
)
def test_proportions_of_another_length_than_the_datasets(keys, key):
    with pytest.raises(ConfigError, match=f"^{key}: 3 numbers for 2 datasets"):
        start(SIZES, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"mixer": "odm", "mixture_sample_rule": "uniform", **MOVING},
            "mixture_sample_rule: uniform fixes the proportions, mixer odm could not set them; use mixture",
        ),
        (
            {"mixer": {"name": "static", "proportions": [1, 2]}, "mixture_sample_rule": "stratified"},
            "mixture_sample_rule: stratified fixes the proportions, mixer static could not set them",
        ),
        (
            {"weighter": "loss", "mixture_sample_rule": "uniform", "init_mixture_proportions": [1, 2]},
            "init_mixture_proportions: has no effect with mixture_sample_rule: uniform; use mixture",
        ),
        (
            {"mixer": {"name": "static", "proportions": [1, 2]}, "init_mixture_proportions": [1, 1]},
            "mixer.proportions: [1, 2] differs from init_mixture_proportions [0.5, 0.5]; drop one",
        ),
        (
            {"mixer": {"name": "static", "proportions": [1, 2, 3]}, "init_mixture_proportions": [1, 1]},
            "mixer.proportions: [1, 2, 3] differs from init_mixture_proportions [0.5, 0.5]; drop one",
        ),
        ({"mixer": {"name": "static", "proportions": [0, 0]}, "init_mixture_proportions": [1, 1]}, "mixer.static.prop"),
    ],
)  # fmt: skip
def test_proportions_that_contradict_each_other(keys, message):
    assert fails(**keys).startswith(message)


def test_an_evaluation_set_that_no_mixer_reads_is_noted():
    assert parse({"mixer": "odm", "mixer_eval_dataset": "a_eval", **MOVING}).notes == (
        "mixer_eval_dataset: no mixer reads it yet",
    )


def test_candidates_are_a_share_of_the_pool_for_a_selector():
    made = arguments(selector="less", update_step=2, candidate_fraction=0.1, score_reuse="latest")
    assert (made.candidate_fraction, made.score_reuse) == (0.1, "latest")
    for keys, message in (
        ({"selector": "less", "candidate_fraction": 0}, r"candidate_fraction: must be > 0 and <= 1, found 0"),
        ({"selector": "less", "candidate_fraction": 1.5}, r"candidate_fraction: must be > 0 and <= 1, found 1.5"),
        (
            {"selector": "less", "score_reuse": "latest"},
            r"score_reuse: latest has no effect with candidate_fraction: 1",
        ),
        ({"mixer": "odm", "candidate_fraction": 0.5}, r"candidate_fraction: has no effect without a selector"),
        (
            {"selector": "delta_loss", "candidate_fraction": 0.5},
            r"candidate_fraction: below 1 does not go with selector delta_loss",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            parse({"update_step": 2, **keys})
