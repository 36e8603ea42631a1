"""The generated page of keys: every key and parameter has a row, and docs/ holds the current page."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from dataflex_mega.config.dataflex_parse import RunArguments
from dataflex_mega.config.fates import FATES
from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.registry import CONTRACTS, get_parameters, list_builtin_names

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("dataflex_config_reference", ROOT / "tools" / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_and_every_parameter_has_a_row(tool):
    text = tool.document()
    for cls in (RunArguments, MegatronArguments):
        for field in dataclasses.fields(cls):
            assert f"\n| `{field.name}` | " in text
    for role in CONTRACTS:
        for name in list_builtin_names(role):
            section = text.partition(f"#### {role}: `{name}`")[2].partition("\n#")[0]
            for key in get_parameters(role, name):
                assert f"\n| `{key}` | " in section
    for key in FATES:
        assert f"\n| `{key}` | " in text


def test_every_parameter_of_an_algorithm_is_explained(tool):
    for role in CONTRACTS:
        for name in list_builtin_names(role):
            doc = tool.load_class(role, name).__doc__
            explained = {**tool.argument_help(CONTRACTS[role].__doc__), **tool.argument_help(doc)}
            assert {p.attribute for p in get_parameters(role, name).values()} <= set(explained), (role, name)


def test_the_page_in_docs_is_what_the_code_says(tool):
    assert tool.main(["--check"]) == 0, "run python tools/config_reference.py"


def test_check_finds_a_page_that_differs_or_is_missing(tool, tmp_path, capsys):
    page = tmp_path / "docs" / "configuration.md"
    assert tool.main(["--check", "--output", str(page)]) == 1
    assert not page.exists()
    assert tool.main(["--output", str(page)]) == 0
    assert tool.main(["--check", "--output", str(page)]) == 0
    page.write_text(page.read_text().replace("| `0` |", "| `1` |", 1))
    assert tool.main(["--check", "--output", str(page)]) == 1
    assert "is out of date" in capsys.readouterr().err


def test_writing_twice_gives_the_same_bytes(tool):
    assert tool.document() == tool.document()


def test_a_bar_in_a_cell_does_not_end_it(tool):
    assert tool.table(["a"], [["x | y"]]).splitlines()[-1] == "| x \\| y |"


def test_indented_lines_of_an_argument_belong_to_it(tool):
    doc = """First.

    Args:
        a: one
            two.
        b: three.

    Returns nothing.
    """
    assert tool.argument_help(doc) == {"a": "one two.", "b": "three."}
