"""`dataflex-cli demo`: its folder, its configuration, and what it hands to training."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex_mega import cli
from dataflex_mega.commands import demo, train
from dataflex_mega.demo import data, model
from tests.support.corpus import ROOT


def test_the_configuration_is_the_example_with_the_paths_of_the_folder() -> None:
    example = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    folder = Path("a folder: #1")
    written = yaml.safe_load(demo.configuration(folder))
    assert {k: v for k, v in written.items() if written[k] != example[k]} == {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder / "data"),
        "output_dir": str(folder / "output"),
    }
    assert not any(demo.WRITTEN_FOR + "/" in str(value) for value in written.values())
    assert demo.configuration(folder).startswith("# A small Llama") and "torchrun" not in demo.configuration(folder)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was made and trained; nothing of it really is."""
    calls: list[Any] = []
    monkeypatch.setattr(data, "run", lambda output, source, options, cache: calls.append(("data", output, source)))
    monkeypatch.setattr(model, "run", lambda source, output, options: calls.append(("model", source, output)))
    monkeypatch.setattr(train, "main", lambda argv: calls.append(("train", list(argv))) or 7)
    monkeypatch.chdir(tmp_path)
    return calls


def test_it_makes_data_and_model_and_trains_with_changed_keys(made: list[Any]) -> None:
    assert cli.main(["demo", "max_steps=4", "here", "mixer.name=doge"]) == 7
    here = Path("here")
    assert made == [
        ("data", here / "data", None),
        ("model", here / "data", here / "model"),
        ("train", ["here/demo.yaml", "max_steps=4", "mixer.name=doge"]),
    ]


def test_a_configuration_that_was_changed_is_kept(made: list[Any]) -> None:
    Path("demo").mkdir()
    Path("demo/demo.yaml").write_text("mine")
    assert cli.main(["demo"]) == 7
    assert Path("demo/demo.yaml").read_text() == "mine"


def test_without_training_the_command_for_it_is_printed(made: list[Any], capsys: Any) -> None:
    assert cli.main(["demo", "--no-train", "--source", "x.tar.gz"]) == 0
    assert capsys.readouterr().out.endswith("train it with: dataflex-cli train demo/demo.yaml\n")
    assert made[0] == ("data", Path("demo/data"), Path("x.tar.gz")) and len(made) == 2


def test_two_folders_are_one_line(made: list[Any], capsys: Any) -> None:
    assert cli.main(["demo", "a", "b"]) == 2
    assert capsys.readouterr().err == "error: demo: expected one folder, found a, b; keys are changed by key=value\n"
