"""A comparison's YAML: which runs it describes, and what makes two of them incomparable."""

import pytest
import yaml

from dataflex_mega.compare import suite
from dataflex_mega.errors import ConfigError

BASE = {"model_name_or_path": "m", "max_steps": 4, "dataset": "a,b", "eval_dataset": "a_v,b_v", "cutoff_len": 8}


def keys(**changes):
    return {
        "base": BASE,
        "methods": {"plain": None, "odm": {"mixer": "odm"}},
        "seeds": [1, 2],
        "output_dir": "out",
    } | changes


def build(**changes):
    return suite.build(keys(**changes), "s.yaml")


def refusal(**changes):
    with pytest.raises(ConfigError) as error:
        build(**changes)
    return str(error.value)


def test_runs_are_methods_within_seeds_with_complete_configurations():
    plan = build()
    assert [run.key for run in plan.runs] == ["plain/seed-1", "odm/seed-1", "plain/seed-2", "odm/seed-2"]
    odm = plan.phases_of("odm", 2)[0]
    assert odm.config == BASE | {
        "mixer": "odm",
        "seed": 2,
        "output_dir": "out/odm/seed-2",
        "callbacks": [suite.STEP_TIMER],
    }
    assert odm.num_steps == 4 and odm.is_final and not odm.needs_earlier_phase and plan.baseline == "plain"
    assert "seed" not in BASE


def test_a_method_takes_a_key_out_with_null():
    run = build(base=BASE | {"weight_decay": 0.1}, methods={"plain": None, "none": {"weight_decay": None}}).runs[1]
    assert "weight_decay" not in run.config


def test_the_base_may_refer_to_its_own_keys():
    run = build(base=BASE | {"run_name": "steps-${max_steps}"}, methods={"long": {"max_steps": 9}}).runs[0]
    assert run.config["run_name"] == "steps-9"


PHASES = [
    {"phase": "reference", "max_steps": 2},
    {"phase": "proxy", "reference_model": "${reference.output_dir}"},
    {"phase": "final", "extra": ["${proxy.output_dir}/w.json"]},
]


def test_phases_are_handed_the_folders_of_earlier_ones_and_the_last_is_compared():
    first, second, third = build(methods={"doremi": PHASES}, seeds=[7]).runs
    assert second.config["reference_model"] == "out/doremi/seed-7/reference" == first.config["output_dir"]
    assert third.config["extra"] == ["out/doremi/seed-7/proxy/w.json"]
    assert [r.is_final for r in (first, second, third)] == [False, False, True]
    assert [r.needs_earlier_phase for r in (first, second, third)] == [False, True, True]
    assert third.key == "doremi/seed-7/final"


def test_a_phase_that_is_not_an_earlier_one_is_refused_with_the_nearest_name():
    phases = [PHASES[0], {"phase": "final", "reference_model": "${referenze.output_dir}"}]
    said = refusal(methods={"doremi": phases})
    assert "methods.doremi.final" in said and "did you mean 'reference'" in said


def test_phases_need_names_of_their_own():
    assert "name of its own" in refusal(methods={"doremi": [{"phase": "a"}, {"phase": "a"}]})
    assert "name of its own" in refusal(methods={"doremi": [{"mixer": "odm"}]})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"max_steps": 5}, "max_steps is 5, for plain it is 4"),
        ({"train_step": 5}, "max_steps is 5"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 16, for plain it is 8"),
        ({"cutoff_len": 16}, "cutoff_len is 16"),
        ({"eval_dataset": "a_v"}, "eval_dataset is ['a_v']"),
    ],
)
def test_another_budget_or_other_held_out_data_is_refusal(change, key):
    assert key in refusal(methods={"plain": None, "other": change})


def test_the_same_budget_may_be_cut_differently():
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_dataset": ["a_v", "b_v"]}
    assert len(build(methods={"plain": None, "other": cut}).runs) == 4


@pytest.mark.parametrize("key", sorted(suite.RESERVED_KEYS))
def test_keys_that_compare_sets_itself_are_refused_in_methods(key):
    assert f"methods.odm: {key} cannot be set here" in refusal(methods={"odm": {key: 1}})


def test_a_base_that_would_start_over_or_stop_early_is_refusal():
    assert "base.overwrite_output_dir" in refusal(base=BASE | {"overwrite_output_dir": True})
    assert "base.early_stopping_steps" in refusal(base=BASE | {"early_stopping_steps": 3})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methodes": {}}, "unknown key 'methodes' (did you mean 'methods'?)"),
        ({"seeds": [1, 1]}, "seeds: expected different whole numbers"),
        ({"seeds": []}, "seeds: expected different whole numbers"),
        ({"seeds": None}, "seeds is missing"),
        ({"methods": {}}, "methods: expected a name"),
        ({"methods": {"a/b": None}}, "'a/b' cannot be a folder's name"),
        ({"methods": {"a": 3}}, "methods.a: expected keys"),
        ({"launch": "later"}, "launch: expected run or print, found 'later'"),
        ({"processes": 0}, "processes: expected a whole number >= 1, found 0"),
        ({"base": {k: v for k, v in BASE.items() if k != "max_steps"}}, "max_steps (or train_step) must say"),
        ({"base": {k: v for k, v in BASE.items() if k != "eval_dataset"}}, "eval_dataset is missing"),
    ],
)
def test_mistakes_name_the_key_and_what_is_allowed(change, said):
    assert said in refusal(**change)
    assert "s.yaml" in refusal(**change)


def test_a_file_names_its_base_and_is_overridden(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(keys(base=str(tmp_path / "base.yaml")), sort_keys=False))
    plan = suite.read(str(path), ["base.max_steps=9", "base.mixer.name=odm", "seeds=[5]", "output_dir=there"])
    assert plan.seeds == (5,) and plan.runs[0].folder.parts[0] == "there"
    assert plan.runs[0].config["max_steps"] == 9 and plan.runs[0].config["mixer"] == {"name": "odm"}


def test_an_override_of_an_unknown_key_and_a_missing_base_are_named(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(keys()))
    with pytest.raises(ConfigError, match="did you mean 'seeds'"):
        suite.read(str(path), ["seed=[1]"])
    path.write_text(yaml.safe_dump(keys(base="nowhere.yaml")))
    with pytest.raises(ConfigError, match="base: nowhere.yaml not found"):
        suite.read(str(path))
