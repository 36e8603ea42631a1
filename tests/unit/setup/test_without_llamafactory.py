"""Before `dataflex-cli setup`: every command that needs LLaMA-Factory ends in the same line."""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex_mega import cli
from dataflex_mega.llamafactory import compat

LINE = "error: llamafactory is not installed: run dataflex-cli setup\n"
RUN = {"model_name_or_path": "m", "stage": "pt", "dataset": "d", "output_dir": "o", "mixer": "odm"}


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without llamafactory, in a folder with some configurations."""
    find, version = importlib.util.find_spec, metadata.version

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name.split(".")[0] == "llamafactory" else find(name, package)

    def installed(name: str) -> str:
        if name == "llamafactory":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    for name in [n for n in sys.modules if n.split(".")[0] == "llamafactory"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dataflex-cli"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "static.yaml").write_text(yaml.safe_dump({**RUN, "mixer": None}))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml"],
        ["train", "static.yaml"],
        ["reference", "run.yaml"],
        ["store", "build", "run.yaml"],
        ["embed", "run.yaml", "--model", "m", "--output", "e"],
        ["perplexity", "--config", "run.yaml"],
        ["perplexity", "--model", "m", "--dataset", "d"],
        ["demo"],
        ["export", "run.yaml"],
        ["chat", "run.yaml"],
        ["eval", "run.yaml"],
    ],
    ids=" ".join,
)
def test_the_command_that_helps_is_named_in_one_line(arguments: list[str], absent: None, capsys: Any) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == LINE


@pytest.mark.parametrize("arguments", [["help"], ["version"], ["components", "mixer"], ["setup", "--dry-run"]])
def test_other_commands_work(arguments: list[str], absent: None, capsys: Any) -> None:
    assert cli.main(arguments) == 0


def test_a_llamafactory_that_cannot_be_imported_is_one_line_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(name: str) -> Any:
        try:
            raise ModuleNotFoundError("No module named 'termcolor'", name="termcolor")
        except ModuleNotFoundError as error:
            raise RuntimeError("Failed to import transformers.x because of the following error\n(look up)") from error

    monkeypatch.delitem(sys.modules, "llamafactory.hparams", raising=False)
    monkeypatch.setattr(compat.importlib, "import_module", fails)
    monkeypatch.setattr(compat, "works", lambda module: True)
    with pytest.raises(compat.UserError) as caught:
        compat.ensure_importable()
    assert str(caught.value) == (
        "llamafactory cannot be imported (No module named 'termcolor'): run dataflex-cli setup; "
        "dataflex-cli env names what is broken"
    )
