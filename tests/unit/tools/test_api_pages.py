"""The API reference: every public name has a directive, and plain docstrings become reStructuredText."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dataflex_mega
from tests.support.corpus import tool


@pytest.fixture(scope="module")
def api_pages() -> Any:
    return tool("api_pages")


def test_every_public_name_and_the_contracts_have_a_directive(api_pages: Any, tmp_path: Path) -> None:
    text = api_pages.write(tmp_path / "new").read_text()
    for name in api_pages.public_names(dataflex_mega):
        assert f":: dataflex_mega.{name}\n" in text
    assert ".. automodule:: dataflex_mega.algorithms.base\n   :members:" in text


def test_a_new_name_of_the_package_needs_no_edit(api_pages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("dataflex_mega")
    package.__dict__.update(__all__=["Path", "run", "LIMIT", "__version__"], Path=Path, run=lambda: None, LIMIT=3)
    monkeypatch.setattr(api_pages.importlib, "import_module", lambda name: package)
    text = api_pages.render()
    assert ".. autoclass:: dataflex_mega.Path\n   :members:" in text and "__version__" not in text
    assert ".. autofunction:: dataflex_mega.run\n" in text and ".. autodata:: dataflex_mega.LIMIT\n" in text


def test_a_plain_docstring_becomes_restructuredtext(api_pages: Any) -> None:
    docstring = [
        "Sums x_i of `values` * 2.", "", "    y_i = x_i * 2", "", "More.", "", "Args:", "    values: [n] float32,",
        "        with `n` > 0.", "    key_: any.", "", "Raises:", "    ConfigError: an empty one.",
    ]  # fmt: skip
    assert [line for line in api_pages.to_rst(docstring) if line] == [
        "Sums x\\_i of ``values`` \\* 2.", "::", "    y_i = x_i * 2", "More.", ":param values: [n] float32,",
        "    with ``n`` > 0.", ":param key_: any.", ":raises ConfigError: an empty one.",
    ]  # fmt: skip
