"""The algorithm that CONTRIBUTING.md shows does what its docstring says."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import Mixer
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build
from tests.unit.algorithms.examples import DOMAINS, generator, stats, update_context


@pytest.fixture
def spec(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mixer that CONTRIBUTING.md shows, as a plug-in."""
    shown = re.search(r"^```python\n(.*?)^```", (root / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    (tmp_path / "contributed_mixer.py").write_text(shown.group(1))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda power: {"name": "contributed_mixer:LossShare", "power": power}
    sys.modules.pop("contributed_mixer", None)


def test_the_shown_algorithm_does_what_its_docstring_says(spec: Any) -> None:
    mixer = build("mixer", spec(2.0))
    assert isinstance(mixer, Mixer)
    mixer.setup(DOMAINS)
    mixer.observe(stats({0: 1.0, 1: 2.0}), DOMAINS.initial_proportions, 1)
    assert mixer.proportions(update_context(), generator()).tolist() == pytest.approx(DOMAINS.initial_proportions)
    mixer.observe(stats({0: 1.0, 1: 2.0, 2: 3.0}), DOMAINS.initial_proportions, 2)
    assert mixer.proportions(update_context(), generator()).tolist() == pytest.approx([1 / 14, 4 / 14, 9 / 14])


def test_the_shown_algorithm_survives_a_restart_and_refuses_a_wrong_parameter(spec: Any) -> None:
    first, second = build("mixer", spec(1.0)), build("mixer", spec(1.0))
    assert isinstance(first, Mixer) and isinstance(second, Mixer)
    first.setup(DOMAINS)
    second.setup(DOMAINS)
    first.observe(stats({0: 1.0, 1: 2.0, 2: 5.0}), DOMAINS.initial_proportions, 1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(
        first.proportions(update_context(), generator()), second.proportions(update_context(), generator())
    )
    with pytest.raises(ConfigError, match="power: must be >= 0, found -1"):
        build("mixer", spec(-1.0))
