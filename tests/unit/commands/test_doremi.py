"""The chain of DoReMi's three runs: what is handed on, and what stops it before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex_mega.commands.doremi import run_steps
from dataflex_mega.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        (tmp_path / f"step{step}.yaml").write_text(f"output_dir: out/{step}\ndataset: a,b\n")
    return tmp_path


def test_each_step_is_given_what_the_one_before_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[list[str]] = []

    def start(arguments: list[str]) -> int:
        started.append(arguments)
        return 0

    assert run_steps([str(folder), "max_steps=3"], start) == 0
    assert started == [
        [str(folder / "step1.yaml"), "max_steps=3"],
        [str(folder / "step2.yaml"), "max_steps=3", "reference_model=out/1"],
        [
            str(folder / "step3.yaml"),
            "max_steps=3",
            "init_mixture_proportions_file=out/2/doremi_average_weights.json",
        ],
    ]
    assert "step2" in capsys.readouterr().err


def test_the_first_failure_ends_the_chain_with_its_status(folder: Path) -> None:
    statuses = iter([0, 7])
    assert run_steps([str(folder)], lambda arguments: next(statuses)) == 7


def test_a_missing_step_is_named_before_anything_runs(folder: Path) -> None:
    (folder / "step2.yaml").rename(folder / "step_2.yaml")
    with pytest.raises(ConfigError, match=r"needs one step2\.yaml, found none .*did you mean 'step_2\.yaml'"):
        run_steps([str(folder)], lambda arguments: pytest.fail("started"))
    with pytest.raises(ConfigError, match="is not a folder"):
        run_steps([str(folder / "nowhere")], lambda arguments: pytest.fail("started"))


def test_runs_that_would_share_an_output_folder_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="output_dir: same, same, same: each"):
        run_steps([str(folder), "output_dir=same"], lambda arguments: pytest.fail("started"))
    (folder / "step3.yaml").write_text("dataset: a\n")
    with pytest.raises(ConfigError, match=r"output_dir: missing in .*step3\.yaml"):
        run_steps([str(folder)], lambda arguments: pytest.fail("started"))
