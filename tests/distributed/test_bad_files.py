"""Files that are not what they should be: configurations, dataset_info.json, components, corpora, files of models."""

import json
import shutil

import pytest
import yaml

from dataflex_mega.train import main
from tests.support import corpus, runs
from tests.support.bad_inputs import MIX, SELECT, check_line, check_run, llamafactory, no_model  # noqa: F401

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
# name -> (bytes of run.yaml, words)
CONFIGURATIONS = {
    "empty": (b"", ["empty"]),
    "comments only": (b"# nothing\n", ["empty"]),
    "a list": (b"- mixer: odm\n", ["sequence at the top"]),
    "a word": (b"mixer\n", ["scalar at the top"]),
    "two documents": (b"mixer: odm\n---\nmixer: odm\n", ["another document"]),
    "tabs": (b"mixer:\n\tname: odm\n", ["line 2"]),
    "not closed": (b"dataset: [a, b\n", ["line"]),
    "no colon": (b"mixer: odm\nupdate_step 1\n", ["line"]),
    "key twice": (b"mixer: odm\nmixer: random\n", ["'mixer'", "line 2", "line 1"]),
    "inner key twice": (b"mixer: {name: odm, alpha: 0.1, alpha: 0.2}\n", ["'alpha'", "twice"]),
    "a key of numbers": (b"1: 2\n", ["unknown key '1'"]),
    "a key of truth": (b"on: 2\n", ["unknown key"]),
    "a key of nothing": (b"~: 2\n", ["key"]),
    "a key that is a list": (b"[a, b]: 2\n", ["key must be text"]),
    "a value in itself": (b"mixer: &m [*m]\n", ["line 1", "contains itself"]),
    "a mapping in itself": (b"mixer: &m {name: *m}\n", ["contains itself"]),
    "aliases that multiply": (BOMB.encode(), ["aliases"]),
    "undefined alias": (b"mixer: *none\n", ["'none'"]),
    "deep list": (b"mixer: " + b"[" * 2000, ["nested too deeply"]),
    "deep mapping": (b"mixer: " + b"{a: " * 300 + b"}" * 300, ["nested too deeply"]),
    "deep block": ("".join(" " * i + "a:\n" for i in range(80)).encode(), ["nested too deeply"]),
    "code": (b"mixer: !!python/object/apply:os.system ['true']\n", ["line 1", "tag"]),
    "number of 5000 digits": (b"max_steps: " + b"9" * 5000, ["digits"]),
    "no such key": (b"output_dir: ${nothing}\n", ["output_dir", "nothing"]),
    "no such variable": (b"output_dir: ${oc.env:SURELY_NOT_SET_XYZ}\n", ["output_dir", "SURELY_NOT_SET_XYZ"]),
    "a circle": (b"output_dir: ${seed}\nseed: ${output_dir}\n", ["output_dir", "ecursive"]),
    "broken reference": (b"output_dir: ${oc.env:}}\n", ["output_dir"]),
    "binary": (bytes(range(256)), ["UTF-8"]),
    "UTF-16": ("mixer: odm\n".encode("utf-16"), ["UTF-8"]),
    "a zero byte": (b"mixer: odm\0\n", ["#x0000"]),
}
JSON_CONFIGURATIONS = {
    "empty": (b"", ["empty"]),
    "cut": (b'{"mixer": "odm"', ["line 1"]),
    "a list": (b"[1]", ["list"]),
    "key twice": (b'{"mixer": "odm", "mixer": "random"}', ["'mixer'", "twice"]),
    "deep": (b'{"a": ' + b"[" * 100_000, ["levels deep"]),
    "number of 5000 digits": (b'{"max_steps": ' + b"9" * 5000 + b"}", ["digits"]),
    "infinity": (b'{"learning_rate": Infinity}', ["learning_rate", "finite"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("suffix", "name"), [*(("yaml", n) for n in CONFIGURATIONS), *(("json", n) for n in JSON_CONFIGURATIONS)]
)
def test_an_odd_configuration_is_named_with_the_place(suffix, name, tmp_path, capsys):
    content, words = (CONFIGURATIONS if suffix == "yaml" else JSON_CONFIGURATIONS)[name]
    file = tmp_path / f"run.{suffix}"
    file.write_bytes(content)
    named = [] if any("key" in word or "learning_rate" in word for word in words) else [f"run.{suffix}"]
    check_line(main([str(file)]), capsys.readouterr().err, [*words, *named])


def test_a_byte_order_mark_is_no_mistake(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfmixr: odm\n")
    check_line(main([str(tmp_path / "run.yaml")]), capsys.readouterr().err, ["'mixr'", "'mixer'"])


ARGUMENTS = {
    "no suffix": (["run"], ["run", ".yaml"]),
    "a folder": (["FOLDER.yaml"], ["FOLDER.yaml"]),
    "an option": (["--stage", "sft"], ["--stage", "key=value"]),
    "a key first": (["mixer=odm"], ["mixer=odm", "first"]),
    "no value": (["RUN", "learning_rate"], ["learning_rate", "key=value"]),
    "no key": (["RUN", "=1"], ["=1"]),
    "broken value": (["RUN", "mixer=["], ["mixer=["]),
    "deep value": (["RUN", "mixer=" + "[" * 3000], ["nested too deeply"]),
    "into a number": (["RUN", "seed.a=1"], ["seed"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_odd_command_line_is_named(name, tmp_path, capsys):
    arguments, words = ARGUMENTS[name]
    (tmp_path / "FOLDER.yaml").mkdir()
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    places = {"RUN": str(tmp_path / "run.yaml"), "FOLDER.yaml": str(tmp_path / "FOLDER.yaml")}
    check_line(main([places.get(a, a) for a in arguments]), capsys.readouterr().err, words)


# -- dataset_info.json -------------------------------------------------------------------------------------------------

ENTRY = {"file_name": "code.jsonl", "columns": {"prompt": "text"}}
# name -> (the entry `odd`, words)
ENTRIES = {
    "nothing": (None, ["null"]),
    "an empty mapping": ({}, ["file_name"]),
    "a list": (["code.jsonl"], ["file_name"]),
    "text": ("code.jsonl", ["file_name"]),
    "a number": (3, ["file_name"]),
    "no source": ({"columns": {"prompt": "text"}}, ["file_name", "columns"]),
    "a file of numbers": ({"file_name": 3}, ["file_name", "3"]),
    "a file without a name": ({"file_name": ""}, ["file_name"]),
    "columns a list": ({**ENTRY, "columns": ["text"]}, ["columns", "mapping"]),
    "columns text": ({**ENTRY, "columns": "text"}, ["columns"]),
    "a column of numbers": ({**ENTRY, "columns": {"prompt": 3}}, ["columns.prompt"]),
    "a misspelt column": ({**ENTRY, "columns": {"promt": "text"}}, ["columns.promt", "prompt"]),
    "misspelt columns": ({"file_name": "code.jsonl", "column": {"prompt": "text"}}, ["column", "columns"]),
    "tags a list": ({**ENTRY, "tags": ["a"]}, ["tags"]),
    "a misspelt tag": ({**ENTRY, "tags": {"role_tags": "role"}}, ["role_tags", "role_tag"]),
    "a misspelt format": ({**ENTRY, "formatting": "sharegtp"}, ["formatting", "sharegpt"]),
    "no rows": ({**ENTRY, "num_samples": 0}, ["num_samples"]),
    "rows in words": ({**ENTRY, "num_samples": "all"}, ["num_samples"]),
    "ranking in words": ({**ENTRY, "ranking": "yes"}, ["ranking"]),
    "a split of numbers": ({**ENTRY, "split": 3}, ["split"]),
}
# name -> (bytes of dataset_info.json, words)
INFOS = {
    "an empty file": (b"", ["not JSON"]),
    "binary": (bytes(range(256)), ["UTF-8"]),
    "a list": (b"[]", ["list"]),
    "nothing": (b"null", ["NoneType"]),
    "cut": (b'{"code": {', ["line 1"]),
    "3,000 levels": (b'{"code": ' + b"[" * 3000, ["levels deep"]),
    "100,000 levels": (b'{"code": ' + b"[" * 100_000, ["levels deep"]),
    "100,000 closed levels": (b"[" * 100_000 + b"]" * 100_000, ["levels deep"]),
    "a number of 5000 digits": (b'{"code": ' + b"9" * 5000 + b"}", ["digits"]),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.usefixtures("no_model")
def test_an_odd_entry_of_dataset_info_is_named(folder, name, tmp_path):
    entry, words = ENTRIES[name]
    (tmp_path / "dataset_info.json").write_text(json.dumps({"odd": entry}))
    shutil.copy(folder / "data" / "code.jsonl", tmp_path)
    keys = {**MIX, "dataset_dir": str(tmp_path), "dataset": "odd"}
    check_run(folder, f"entry {name}", keys, ["'odd'", "dataset_info.json", *words])


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.usefixtures("no_model")
def test_an_odd_dataset_info_is_named(folder, name, tmp_path):
    content, words = INFOS[name]
    (tmp_path / "dataset_info.json").write_bytes(content)
    keys = {**MIX, "dataset_dir": str(tmp_path), "dataset": "code"}
    check_run(folder, f"info {name}", keys, ["dataset_info.json", *words])


# -- components, shares, corpora, models -------------------------------------------------------------------------------

COMPONENTS = {
    "empty": ("", ["empty"]),
    "a list": ("- mixers\n", ["sequence"]),
    "a value in itself": ("mixers: &m [*m]\n", ["contains itself"]),
    "deep": ("mixers: " + "[" * 2000, ["nested too deeply"]),
    "a misspelt section": ("mixer:\n  odm: {name: odm}\n", ["mixer", "mixers"]),
    "a section of words": ("mixers: odm\n", ["mixers"]),
    "an entry of words": ("mixers:\n  odm: odm\n", ["odm"]),
    "an entry without a name": ("mixers:\n  odm: {params: {alpha: 0.1}}\n", ["name"]),
    "parameters beside params": ("mixers:\n  odm: {name: odm, alpha: 0.1}\n", ["alpha"]),
    "parameters of another type": ("mixers:\n  odm: {name: odm, params: {alpha: .inf}}\n", ["alpha"]),
    "no such entry": ("mixers:\n  other: {name: odm}\n", ["'odm'", "other"]),
}


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.usefixtures("no_model")
def test_an_odd_components_file_is_named(folder, name, tmp_path):
    content, words = COMPONENTS[name]
    (tmp_path / "components.yaml").write_text(content)
    keys = {**MIX, "mixer": None, "train_type": "dynamic_mix", "component_name": "odm",
            "components_cfg_file": str(tmp_path / "components.yaml")}  # fmt: skip
    check_run(folder, f"components {name}", keys, words)


SHARES = {
    "empty": "", "words": "a, b, c", "a word": '"text"', "a mapping": '{"a": 1}', "truth": "[true, 1, 1]",
    "infinite": "[Infinity, 1, 1]", "negative": "[-1, 1, 1]", "all nothing": "[0, 0, 0]", "deep": "[" * 100_000,
    "cut": "[1, 2", "of another number": "[1, 1]",
}  # fmt: skip


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.usefixtures("no_model")
def test_an_odd_file_of_proportions_is_named(folder, name, tmp_path):
    (tmp_path / "shares.json").write_text(SHARES[name])
    keys = {**MIX, "init_mixture_proportions_file": str(tmp_path / "shares.json")}
    check_run(folder, f"shares {name}", keys, ["init_mixture_proportions"])


MODEL_FILES = {
    "config cut": ("config.json", b'{"model_type": "llama"', ["config.json", "not JSON"]),
    "config a list": ("config.json", b"[]", ["config.json", "list"]),
    "config binary": ("config.json", b"\xff\xfe", ["config.json", "UTF-8"]),
    "config deep": ("config.json", b'{"a":' + b"[" * 100_000, ["config.json", "levels deep"]),
    "tokenizer config cut": ("tokenizer_config.json", b'{"a"', ["tokenizer_config.json"]),
    "tokenizer cut": ("tokenizer.json", b'{"version": "1.0",', ["tokenizer.json"]),
    "generation config a word": ("generation_config.json", b'"a"', ["generation_config.json"]),
}


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.usefixtures("no_model")
def test_an_odd_file_of_a_model_is_named(folder, name, tmp_path):
    file, content, words = MODEL_FILES[name]
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(content)
    check_run(folder, f"model {name}", {**MIX, "model_name_or_path": str(tmp_path / "model")}, words)


DOMAIN = {
    "name": "code",
    "prefix": "code",
    "documents": 1,
    "tokens": 4,
    "proportion": 1.0,
    "bin_sha256": "",
    "idx_sha256": "",
}
MANIFEST = {
    "format": "dataflex_mega corpus", "version": 1, "dtype": "uint16", "rows": 1, "bad_rows": 0, "inputs": [], "recipe": "",
    "tokenizer": {"fingerprint": "", "vocabulary": 10, "end": 0}, "domains": [DOMAIN],
}  # fmt: skip
MANIFESTS = {
    "a name of nothing": ({"domains": [{**DOMAIN, "name": None}]}, ["name", "None"]),
    "a name of numbers": ({"domains": [{**DOMAIN, "name": 3}]}, ["name", "3"]),
    "a file outside": ({"domains": [{**DOMAIN, "prefix": "../code"}]}, ["../code"]),
    "a file anywhere": ({"domains": [{**DOMAIN, "prefix": "/etc/code"}]}, ["/etc/code"]),
    "a file of nothing": ({"domains": [{**DOMAIN, "prefix": ""}]}, ["damaged"]),
    "tokens in words": ({"domains": [{**DOMAIN, "tokens": "many"}]}, ["tokens", "many"]),
    "negative tokens": ({"domains": [{**DOMAIN, "tokens": -1}]}, ["tokens", "-1"]),
    "a domain twice": ({"domains": [DOMAIN, DOMAIN]}, ["'code'", "2 times"]),
    "no domains": ({"domains": []}, ["0 domains"]),
    "domains a mapping": ({"domains": {"code": DOMAIN}}, ["damaged"]),
    "a domain of words": ({"domains": ["code"]}, ["damaged"]),
    "another type of number": ({"dtype": "float8"}, ["float8"]),
    "a type of list": ({"dtype": ["uint16"]}, ["uint16"]),
    "tokenizer of words": ({"tokenizer": "llama"}, ["damaged"]),
    "vocabulary of words": ({"tokenizer": {"fingerprint": "", "vocabulary": "all", "end": 0}}, ["vocabulary"]),
    "another version": ({"version": 9}, ["version 9"]),
    "another format": ({"format": "other"}, ["format"]),
    "no file": ({}, ["code.bin", "not found"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.usefixtures("no_model")
def test_an_odd_manifest_of_a_corpus_is_named(folder, name, tmp_path):
    change, words = MANIFESTS[name]
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **change}))
    keys = {**MIX, "dataset": None, "dataset_dir": None, "corpus_dir": str(tmp_path)}
    check_run(folder, f"manifest {name}", keys, ["corpus_dir", *words])


SCORES = {
    "objects": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,), }" + b" " * 60 + b"\n",
    "a broken header": b"\x93NUMPY\x01\x00\x76\x00{'descr': __import__('os')}" + b" " * 90,
    "cut": b"\x93NUMPY\x01\x00", "text": b"1 2 3", "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_odd_scores_are_named(folder, name, tmp_path):
    (tmp_path / "scores.npy").write_bytes(SCORES[name])
    order = {
        "name": "sorting",
        "score_source": "precomputed",
        "score_params": {"score_path": str(tmp_path / "scores.npy")},
    }
    check_run(folder, f"scores {name}", {"reorder": order, "update_step": 2, "update_times": -1}, ["scores.npy"])


def test_a_selectors_file_that_is_not_there_is_named(folder):
    keys = {**SELECT, "selector": {"name": "near", "indices_path": "/nonexistent.npy"}}
    check_run(folder, "near", keys, ["indices_path", "/nonexistent.npy"])


@pytest.mark.parametrize(
    "content", ["", "- a\n", "base: 3\n", "methods: {}\n", "a: &a [*a]\n", "base: {}\nmethods: [1]\n"]
)
def test_an_odd_suite_is_named(content, tmp_path, capsys):
    from dataflex_mega import cli

    (tmp_path / "suite.yaml").write_text(content)
    check_line(cli.main(["compare", str(tmp_path / "suite.yaml")]), capsys.readouterr().err, [])


def test_the_table_has_configurations_that_are_right_but_for_the_mistake(folder):
    """Without its mistake a run of the table trains: it is the mistake that is found."""
    config = runs.base(folder, output_dir=str(folder / "out" / "right"), **{**MIX, "max_steps": 1})
    assert runs.train_here(config)[0] == 0
    assert yaml.safe_load("a: 1") == {"a": 1}
