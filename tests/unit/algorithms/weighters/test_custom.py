"""The uniform weighter gives every sample weight 1."""

from __future__ import annotations

import pytest

from dataflex_mega.algorithms.weighters.custom import UniformWeighter
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build
from tests.unit.algorithms.examples import observed


def test_every_sample_weighs_exactly_one() -> None:
    found = UniformWeighter().weights(observed([0.1, 70.0, float("nan")]), 0, 10)
    assert found.tolist() == [1.0, 1.0, 1.0]


def test_another_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weighter\.custom\.strategy: expected one of uniform, found 'linupper'"):
        build("weighter", {"name": "custom", "strategy": "linupper"})
