"""Loading a YAML or JSON file: scalars, interpolations, overrides, and files that cannot be read."""

import json

import pytest

from dataflex_mega.config.load import load, read_mapping
from dataflex_mega.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def fails(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_yaml_and_json_of_the_same_keys_load_alike(write):
    keys = {"learning_rate": 0.001, "dataset": ["a", "b"], "mixer": {"name": "odm", "alpha": 0.8}, "bf16": True}
    text = "learning_rate: 1e-3\ndataset: [a, b]\nmixer: {name: odm, alpha: 0.8}\nbf16: yes\n"
    assert load(write(text)) == keys
    assert load(write(json.dumps(keys), "run.json")) == keys
    assert load(write(text, "run.yml")) == keys


def test_a_number_in_scientific_notation_is_a_number(write):
    assert load(write("a: 1e-3\nb: 5e4")) == {"a": 0.001, "b": 50000.0}


def test_interpolations_are_resolved_after_overrides(write, monkeypatch):
    monkeypatch.setenv("DATAFLEX_TEST_ROOT", "/data")
    path = write("base: one\noutput_dir: ${oc.env:DATAFLEX_TEST_ROOT}/${base}\n")
    assert load(path, ["base=two"])["output_dir"] == "/data/two"


@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy", "logging_strategy", "evaluation_strategy"])
def test_a_strategy_of_no_stays_no(write, key):
    assert load(write(f"{key}: no"))[key] == "no"
    assert load(write("a: 1"), [f"{key}=no"])[key] == "no"


def test_no_stays_false_for_other_keys(write):
    assert load(write("bf16: no"))["bf16"] is False


@pytest.mark.parametrize(
    ("base", "override", "key", "expected"),
    [
        ("mixer: odm", "mixer.alpha=0.8", "mixer", {"name": "odm", "alpha": 0.8}),
        ("mixer: {name: odm, alpha: 0.1}", "mixer.alpha=0.8", "mixer", {"name": "odm", "alpha": 0.8}),
        ("mixer: {name: odm, params: {alpha: 0.1}}", "mixer.alpha=0.8", "mixer", {"name": "odm", "params": {"alpha": 0.8}}),
        ("mixer: {name: odm, params: {alpha: 0.1}}", "mixer.name=x", "mixer", {"name": "x", "params": {"alpha": 0.1}}),
        ("mixer: {name: odm, params: {a: 1}}", "mixer.params.a=2", "mixer", {"name": "odm", "params": {"a": 2}}),
        ("mixer: {name: odm}", "mixer=random", "mixer", "random"),
        ("a: 1", "mixer.alpha=0.8", "mixer", {"alpha": 0.8}),
        ("a: 1", "selector.name=loss", "selector", {"name": "loss"}),
        ("a: 1", "fsdp_config.version=2", "fsdp_config", {"version": 2}),
        ("fsdp_config: {version: 1, x: y}", "fsdp_config.version=2", "fsdp_config", {"version": 2, "x": "y"}),
        ("a: 1", "a=1e-3", "a", 0.001),
        ("a: 1", "a=", "a", None),
        ("a: 1", "a=x,y", "a", "x,y"),
        ("a: 1", "a=[0.5, 0.5]", "a", [0.5, 0.5]),
        ("a: 1", "a=b=c", "a", "b=c"),
        ("a: 1", "a='5'", "a", "5"),
    ],
)  # fmt: skip
def test_overrides(write, base, override, key, expected):
    assert load(write(base), [override])[key] == expected


def test_later_overrides_win_and_build_on_earlier_ones(write):
    path = write("mixer: random")
    assert load(path, ["mixer=odm", "mixer.alpha=0.5"])["mixer"] == {"name": "odm", "alpha": 0.5}


@pytest.mark.parametrize(
    "override", ["learning_rate", "--learning_rate=1", "=3", "mixer.=3", ".alpha=1", "--learning_rate", ""]
)
def test_an_override_that_is_not_key_value_is_an_error(write, override):
    message = fails(write("a: 1"), [override])
    assert repr(override) in message
    assert "expected key=value" in message


def test_an_override_into_something_that_has_no_keys_is_an_error(write):
    assert "learning_rate is 0.1, not a mapping" in fails(write("learning_rate: 0.1"), ["learning_rate.x=1"])
    assert "mixer.alpha is 1, not a mapping" in fails(write("mixer: {name: o, alpha: 1}"), ["mixer.alpha.x=1"])


def test_an_override_with_broken_yaml_is_an_error(write):
    assert "the value is not YAML" in fails(write("a: 1"), ["a=[1"])


def test_a_missing_file_is_named_with_its_neighbour(write, tmp_path):
    write("a: 1", "train.yaml")
    message = fails(str(tmp_path / "trian.yaml"))
    assert "trian.yaml not found (did you mean 'train.yaml'?)" in message


def test_a_missing_folder_is_named(tmp_path):
    assert f"there is no folder {tmp_path / 'no'}" in fails(str(tmp_path / "no" / "run.yaml"))


def test_a_folder_and_another_suffix_are_refused(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in fails(str(tmp_path / "folder.yaml"))
    assert "expected a file that ends in .yaml, .yml, .json" in fails("learning_rate")
    assert "then key=value; found 'learning_rate=1'" in fails("learning_rate=1")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: \xff\xfe")
    assert "not UTF-8" in fails(str(path))


@pytest.mark.parametrize(
    ("text", "name", "parts"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "x.yaml", ["x.yaml, line 3", "expected ',' or ']'"]),
        ("a: 1\nb:\n\t- 2\n", "x.yaml", ["x.yaml, line 3", "cannot start any token"]),
        ("a: 1\na: 2\n", "x.yaml", ["line 2", "'a' is given twice, first on line 1"]),
        ("m:\n  k: 1\n  k: 2\n", "x.yaml", ["line 3", "'k' is given twice, first on line 2"]),
        ("l:\n- {k: 1, k: 2}\n", "x.yaml", ["line 2", "'k' is given twice"]),
        ("- a\n- b\n", "x.yaml", ["expected `key: value` lines, found a sequence"]),
        ("just words", "x.yaml", ["found a scalar at the top"]),
        ("", "x.yaml", ["the file is empty"]),
        ("# only a comment\n", "x.yaml", ["the file is empty"]),
        ("a: 1\n---\nb: 2\n", "x.yaml", ["line 2", "another document"]),
        ("a: ${b}\n", "x.yaml", ["x.yaml: a: Interpolation key 'b' not found"]),
        ("a: ${b\n", "x.yaml", ["x.yaml"]),
        ("a: ???\n", "x.yaml", ["Missing mandatory value: a"]),
        ('{"a": 1,\n "b": }', "x.json", ["x.json, line 2", "Expecting value"]),
        ('{"a": 1, "a": 2}', "x.json", ["'a' is given twice"]),
        ('{"m": {"a": 1, "a": 2}}', "x.json", ["'a' is given twice"]),
        ("[1]", "x.json", ["expected a JSON object, found a list"]),
    ],
)
def test_files_that_cannot_be_read_as_keys_and_values(write, text, name, parts):
    message = fails(write(text, name))
    for part in parts:
        assert part in message


def test_an_interpolation_is_left_alone_when_only_read(write):
    assert read_mapping(write("a: ${b}\nb: 1")) == {"a": "${b}", "b": 1}
