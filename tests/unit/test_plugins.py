"""Names that other packages register are available, refused when already used, and listed in errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dataflex_mega import plugins
from dataflex_mega.algorithms.base import Mixer
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build, list_builtin_names, list_names

MODULE = """
from dataclasses import dataclass
import torch
from dataflex_mega.algorithms.base import Mixer, Weighter
from dataflex_mega.plugins import register_mixer, register_weighter

@register_mixer("evenly")
@dataclass
class Evenly(Mixer):
    sharpness: float = 2.0

    def proportions(self, context, rng):
        return torch.ones(2).double() / 2

@register_weighter("old")
class Old:
    def get_weighted_loss(self, losses, ctx=None, model=None, inputs=None):
        return losses.mean()
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_registered", {})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"evenly_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_module_of_the_configuration_registers_names(module: str) -> None:
    with pytest.raises(ConfigError, match="no mixer is called 'evenly'"):
        build("mixer", "evenly")
    run = parse_config({"plugins": [module], "mixer": {"name": "evenly", "sharpness": 3}, "update_step": 1}, {})
    assert run.roles["mixer"] == {"name": "evenly", "sharpness": 3}
    built = build("mixer", {"name": "evenly", "sharpness": 3})
    assert isinstance(built, Mixer) and built.sharpness == 3.0
    assert "evenly" in list_names("mixer") and "evenly" not in list_builtin_names("mixer")
    with pytest.raises(ConfigError, match="did you mean 'evenly'"):
        build("mixer", "evenli")
    with pytest.raises(ConfigError, match="did you mean 'sharpness'"):
        build("mixer", {"name": "evenly", "sharpnes": 3})


def test_a_class_written_for_dataflex_is_told_how_to_move(module: str) -> None:
    plugins.load_modules([module])
    with pytest.raises(ConfigError, match=r"weighter: old must be a subclass of .*Weighter; docs/coming-from.md"):
        build("weighter", "old")


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="plugins: cannot import 'no_such_module_here'"):
        parse_config({"plugins": ["no_such_module_here"], "mixer": "odm", "update_step": 1}, {})


def test_two_classes_cannot_have_one_name(module: str) -> None:
    plugins.load_modules([module])

    with pytest.raises(ConfigError, match="'evenly' is registered by"):

        @plugins.register_mixer("evenly")
        class Another(Mixer):
            pass


def test_a_name_of_the_package_is_taken() -> None:
    @plugins.register_mixer("odm")
    class Another(Mixer):
        pass

    with pytest.raises(ConfigError, match="'odm', registered by .* comes with the package"):
        build("mixer", "oddm")


SELECTOR = """
from dataclasses import dataclass
from dataflex_mega.algorithms.base import Selector
from dataflex_mega.plugins import register_selector

@register_selector("longest")
@dataclass
class Longest(Selector):
    at_least: int  # without a default

    def score(self, table):
        return table.sample_ids.float()

    def select(self, scores, count, context, rng):
        return scores.topk(count).indices
"""


def test_every_selector_has_the_folder_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in DataFlex's components files, where each entry of a selector names it."""
    name = f"longest_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SELECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_modules([name])
    built = build("selector", {"name": "longest", "params": {"cache_dir": "saves/mine", "at_least": 3}})
    assert built.cache_dir == "saves/mine" and built.at_least == 3
    assert build("selector", {"name": "rho_loss", "cache_dir": "saves/rho"}).cache_dir == "saves/rho"
    with pytest.raises(ConfigError, match="at_least"):
        build("selector", "longest")
