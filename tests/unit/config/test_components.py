"""Components files: entries become specifications, and wrong entries are named."""

import pytest

from dataflex_mega.config import components, reorder_arguments
from dataflex_mega.config.components import (
    ROLE_OF_TYPE,
    entries,
    flatten_spec,
    merge_spec,
    packaged_file,
    read_component,
    read_components,
)
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import list_builtin_names, validate


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "components.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("role", components.SECTIONS)
def test_every_packaged_entry_can_be_built(role):
    for name in entries(None, role):
        spec = read_component(None, role, name).spec
        validate(role, reorder_arguments.read_reorder(spec)[0] if role == "reorder" else spec)


@pytest.mark.parametrize("role", components.SECTIONS)
def test_every_algorithm_has_a_packaged_entry_of_its_name(role):
    for name in list_builtin_names(role):
        assert read_component(None, role, name).spec["name"] == name


def test_the_weighter_strategies_have_entries():
    picked = [read_component(None, "weighter", name).spec for name in entries(None, "weighter")]
    assert {spec["strategy"] for spec in picked if spec["name"] == "loss"} == {
        "linupper", "quadratic", "extremes", "uniform",
    }  # fmt: skip


def test_the_packaged_file_is_in_the_package():
    assert packaged_file().parent.name == "config"
    assert packaged_file().is_file()


def test_roles_of_the_train_types_are_the_roles_of_the_sections():
    assert set(ROLE_OF_TYPE.values()) == set(components.SECTIONS)


def test_an_entry_becomes_a_flat_specification_with_variables_replaced(write):
    path = write("root: /data\nselectors:\n  mine:\n    name: loss\n    params: {cache_dir: '${root}/x', focus: low}\n")
    assert read_component(path, "selector", "mine").spec == {"name": "loss", "cache_dir": "/data/x", "focus": "low"}


def test_an_entry_without_parameters(write):
    assert read_component(write("mixers: {odm: {name: odm}}"), "mixer", "odm").spec == {"name": "odm"}
    assert read_component(write("mixers: {odm: {name: odm, params: }}"), "mixer", "odm").spec == {"name": "odm"}


def test_the_old_name_of_a_section_still_works(write):
    path = write("reorders: {a: {name: sorting}}\nreorderers: {a: {name: saw}, b: {name: zigzag}}\n")
    assert entries(path, "reorder") == ["a", "b"] and read_component(path, "reorder", "b").spec == {"name": "zigzag"}
    assert read_component(path, "reorder", "a").spec == {"name": "sorting"}


def test_an_entry_of_another_section_is_named(write):
    path = write("reorders: {sorting: {name: sorting}}\npipelines: {}\nmixers: {odm: {name: odm}}\n")
    assert entries(path, "mixer") == ["odm"]
    with pytest.raises(ConfigError, match=r"no mixer 'sorting' in .* \(it is one of reorders\); there is odm"):
        read_component(path, "mixer", "sorting")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selector: {a: {name: loss}}", r"unknown section 'selector' \(did you mean 'selectors'\?\)"),
        ("selectors: [loss]", r"selectors must hold entries by name, found \['loss'\]"),
    ],
)
def test_a_wrong_layout_is_named(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_components(write(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixers: {a: odm}", "mixers.a must be a mapping with `name` and `params`, found 'odm'"),
        ("mixers: {a: {params: {}}}", "mixers.a must be a mapping"),
        ("mixers: {a: {name: odm, alpha: 0.5}}", "mixers.a has alpha beside name and params"),
        ("mixers: {a: {name: odm, params: [1]}}", r"mixer.params: expected a mapping of parameters, found \[1\]"),
        ("mixers: {a: {name: odm, params: {alpha: '${x}'}}}", "Interpolation key 'x' not found"),
    ],
)
def test_a_wrong_entry_is_named(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_component(write(text), "mixer", "a")


def test_an_unknown_entry_is_named_with_the_nearest_and_all():
    with pytest.raises(ConfigError) as caught:
        read_component(None, "mixer", "odn")
    message = str(caught.value)
    assert message.startswith("component_name: no mixer 'odn' in the packaged components file (did you mean 'odm'?)")
    assert "static, random, odm" in message


def test_dataflex_own_default_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no weighter 'Loss' .*did you mean 'loss'"):
        read_component(None, "weighter", "Loss")


def test_a_file_without_the_section_has_none(write):
    with pytest.raises(ConfigError, match="no weighter 'loss' in .*; there is none"):
        read_component(write("mixers: {odm: {name: odm}}"), "weighter", "loss")


def test_a_missing_file_is_named_with_the_way_out(tmp_path):
    path = "src/dataflex/configs/components.yaml"
    with pytest.raises(ConfigError) as caught:
        read_components(path)
    assert str(caught.value).startswith(f"components_cfg_file: {path} not found")
    assert "leave the key out for the packaged one" in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["odm", {"name": "odm"}, {"name": "odm", "params": None}, {"name": "odm", "params": {}}]
)
def test_all_forms_of_a_specification_are_one(spec):
    assert flatten_spec("mixer", spec) == {"name": "odm"}


def test_parameters_beside_and_under_params_are_an_error():
    with pytest.raises(ConfigError, match="^mixer: alpha must stand under params"):
        flatten_spec("mixer", {"name": "odm", "alpha": 1, "params": {"variant": "paper"}})


def test_nothing_and_nothing_is_off():
    assert merge_spec("mixer", None, None, None) is None


def test_the_same_said_twice_is_no_contradiction():
    assert merge_spec("mixer", "odm", {"name": "odm"}, "odm") == {"name": "odm"}


def test_two_different_specifications_are_an_error():
    with pytest.raises(ConfigError) as caught:
        merge_spec("mixer", "random", {"name": "odm", "alpha": 0.5}, "mine")
    assert str(caught.value) == (
        "mixer: random differs from component_name 'mine', which is {name: odm, alpha: 0.5}; drop one"
    )


def test_a_mapping_without_a_name_changes_the_component():
    component = {"name": "odm", "alpha": 0.5}
    assert merge_spec("mixer", {"alpha": 0.8}, component, "odm") == {"name": "odm", "alpha": 0.8}
    assert component == {"name": "odm", "alpha": 0.5}


def test_a_mapping_without_a_name_and_without_a_component_is_an_error():
    with pytest.raises(ConfigError, match="^mixer.name: missing; expected the name of a mixer, found only alpha"):
        merge_spec("mixer", {"alpha": 0.8}, None, None)
