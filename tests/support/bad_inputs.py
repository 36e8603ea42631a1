"""How a bad input must end: one line that names key or file, status 2, no traceback, nothing trained."""

from __future__ import annotations

import pytest

from tests.support import runs

SELECT = {"selector": {"name": "loss"}, "warmup_step": 1, "update_step": 1, "update_times": 2}
MIX = {"mixer": {"name": "odm"}, "warmup_step": 1, "update_step": 1, "update_times": -1}
WEIGHT = {"weighter": {"name": "loss"}}
SFT = {"stage": "sft", "dataset": "sft", "template": "default"}


def check_line(status, stderr, words, expected=2):
    """One `error: ` line with these words, the expected status, and no traceback."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == expected and len(lines) == 1, stderr
    assert "Traceback" not in stderr and "internal:" not in lines[0], stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def check_run(folder, name, keys, words, expected=2):
    """A run with `keys` ends so; `ROOT` in a value stands for the folder of the data."""
    config = runs.base(folder, **{"output_dir": str(folder / "out" / name.replace(" ", "-")), **keys})
    config = {
        key: value.replace("ROOT", str(folder)) if isinstance(value, str) else value for key, value in config.items()
    }
    return check_line(*runs.train_here(config), words, expected)


@pytest.fixture(scope="module", autouse=True)
def llamafactory():
    """LLaMA-Factory is imported first: its log keeps the standard output that it finds, which `capsys` closes."""
    from dataflex_mega.llamafactory.args import argument_types

    argument_types()


@pytest.fixture
def no_model(monkeypatch):
    """Building a model fails the test."""
    from dataflex_mega.run import fsdp_factory

    def built(*_):
        raise AssertionError("the model was built before the mistake was found")

    monkeypatch.setattr(fsdp_factory, "build_model", built)
