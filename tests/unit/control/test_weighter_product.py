"""Weights that multiply: mean 1, each from its own warm-up on, state of all parts."""

from dataclasses import dataclass

import pytest
import torch

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.control.schedule import Schedule
from dataflex_mega.control.weighter_product import HiddenProduct, Product, multiplied
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build
from dataflex_mega.types import NeedsHidden
from tests.unit.algorithms.examples import observed

NOW, LATER = Schedule(0, 1, -1, False), Schedule(5, 1, -1, False)


@dataclass
class Fixed(Weighter):
    """These weights; counts its calls."""

    given: tuple[float, ...] = ()
    calls: int = 0

    def weights(self, obs, step, total_steps):
        self.calls += 1
        return torch.tensor(self.given)

    def state(self):
        return {"calls": self.calls}

    def restore(self, state):
        self.calls = state["calls"]


def test_the_product_has_mean_one():
    product = Product(((Fixed((0.5, 1.5, 1.0, 1.0)), NOW), (Fixed((2.0, 1.0, 0.5, 0.5)), NOW)))
    raw = [1.0, 1.5, 0.5, 0.5]
    assert product.weights(observed([1.0] * 4), 0, 9).tolist() == pytest.approx([4 * r / sum(raw) for r in raw])


def test_a_part_begins_after_its_warmup():
    product = Product(((Fixed((0.5, 1.5)), NOW), (Fixed((1.8, 0.2)), LATER)))
    obs = observed([1.0, 2.0])
    assert product.weights(obs, 4, 9).tolist() == pytest.approx([0.5, 1.5])
    assert product.weights(obs, 5, 9).tolist() == pytest.approx([1.5, 0.5])
    other = Product(((Fixed((0.5, 1.5)), NOW), (Fixed((1.8, 0.2)), LATER)))
    other.restore(product.state())
    assert [part.calls for part, _ in other.parts] == [2, 1]


def test_nothing_left_is_no_weighting():
    product = Product(((Fixed((0.0, 2.0)), NOW), (Fixed((2.0, 0.0)), NOW)))
    assert product.weights(observed([1.0, 2.0]), 0, 9).tolist() == [1, 1]


def test_one_is_itself_and_hidden_states_find_their_part():
    loss, joint = build("weighter", "loss"), build("weighter", "joint_update_aware")
    assert multiplied([(loss, NOW)]) is loss
    both = multiplied([(loss, NOW), (joint, LATER)])
    assert isinstance(both, HiddenProduct) and isinstance(both, NeedsHidden)
    assert both.hidden == joint.hidden and both.parts[0][0] is joint and both.parts[1][0] is loss
    assert not isinstance(multiplied([(loss, NOW), (build("weighter", "focal"), NOW)]), NeedsHidden)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("loss", "rho1"), "weighter rho1 chooses tokens"),
        (("adapt", "joint_update_aware"), "both compare hidden states"),
    ],
)
def test_what_does_not_multiply_is_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        multiplied([(build("weighter", name), NOW) for name in names])
