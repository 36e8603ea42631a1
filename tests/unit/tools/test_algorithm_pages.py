"""The pages that `make docs` writes: one for every algorithm, complete, and with a command that is a sound run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dataflex_mega.config.load import load
from dataflex_mega.config.parse import parse_config
from dataflex_mega.llamafactory.args import argument_types
from dataflex_mega.registry import CONTRACTS, get_parameters, list_builtin_names
from tests.support.corpus import ROOT, tool

EVERY = [(kind, name) for kind in CONTRACTS for name in list_builtin_names(kind)]


@pytest.fixture(scope="module")
def pages():
    return tool("algorithm_pages")


@pytest.fixture(scope="module")
def peer_keys() -> dict[str, str]:
    return argument_types()


@pytest.fixture(scope="module")
def written(pages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "mixer_gone.md").write_text("of a removed algorithm")
    assert {path.stem for path in pages.write(folder)} == {f"{kind}_{name}" for kind, name in EVERY}
    return folder


def test_the_index_names_every_page_and_no_old_one_stays(written: Path) -> None:
    listed = re.findall(r"^(\w+_\w+)$", (written / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(p.stem for p in written.glob("*_*.md")) == sorted(f"{k}_{n}" for k, n in EVERY)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_page_has_every_parameter_with_a_meaning(written: Path, kind: str, name: str) -> None:
    text = (written / f"{kind}_{name}.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE))
    assert set(rows) == set(get_parameters(kind, name))
    assert all(meaning.strip() for meaning in rows.values()), rows
    for title in ("## Inputs", "## Run it", "**Cost**", "**Check**"):
        assert title in text, title


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_command_of_a_page_is_a_sound_run_of_the_algorithm(
    pages, peer_keys: dict[str, str], kind: str, name: str
) -> None:
    path, *overrides = pages.example_arguments(kind, name)
    run = parse_config(load(str(ROOT / path), overrides), peer_keys)
    assert run.roles[kind]["name"] == name


def test_a_docstring_becomes_markdown(pages) -> None:
    given = "About `a_b` and x_i * y.\n\n    w_i = <a, b>\n    v\n\nEnd."
    assert pages.to_markdown(given) == "About `a_b` and x\\_i \\* y.\n\n```text\nw_i = <a, b>\nv\n```\n\nEnd."
