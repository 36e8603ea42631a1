"""The notes on a configuration are written by every command that reads one, and by Python's `dm.train`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import dataflex_mega.api as api
from dataflex_mega.commands._configuration import read_dynamic_config
from dataflex_mega.compare.command import check_runs
from dataflex_mega.compare.suite import TrainingRun

KEYS = {
    "model_name_or_path": "hub/model", "dataset": "a,b", "output_dir": "out", "mixer": "odm", "update_step": 1,
    "stage": "pt", "max_steps": 10, "hub_token": "hf_0123456789", "evaluation_strategy": "no",
}  # fmt: skip
NOTES = (
    "note: evaluation_strategy is now eval_strategy: no\n"
    "note: hub_token: has no effect in dynamic training; nothing is uploaded during a run\n"
)


class Reached(Exception):
    """The run would begin here."""


def test_by_the_commands_that_read_a_training_configuration(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(KEYS))
    read_dynamic_config(str(tmp_path / "run.yaml"), [], "no role")
    assert capsys.readouterr().err == NOTES


def test_by_training_from_python(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(api, "run_training", begin)
    with pytest.raises(Reached):
        api.train(KEYS)
    assert capsys.readouterr().err == NOTES


def test_by_a_comparison_once_for_all_methods_that_have_them(capsys: Any) -> None:
    def run(method: str, **keys: Any) -> TrainingRun:
        return TrainingRun(method, 1, "", True, Path("out"), {**KEYS, **keys}, needs_earlier_phase=False)

    plan: Any = SimpleNamespace(runs=[run("one"), run("two", dataloader_drop_last=True)], seeds=[1])
    check_runs(plan)
    assert capsys.readouterr().err == NOTES + (
        "note: methods.two: dataloader_drop_last: has no effect in dynamic training; every step has a full batch\n"
    )


def test_by_a_static_run_that_does_nothing(tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataflex_mega.llamafactory import static
    from dataflex_mega.train import main

    monkeypatch.setattr(static, "run_static", lambda *_: None)
    keys = {"model_name_or_path": "hub/model", "dataset": "a", "output_dir": str(tmp_path / "out"), "stage": "pt"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    assert main([str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().err.startswith("note: do_train: is not true, nor is do_eval, so this run")
    assert main([str(tmp_path / "run.yaml"), "do_train=true"]) == 0
    assert capsys.readouterr().err == ""
