"""Weights that multiply: mean 1, each from its own warm-up on, state of all parts."""

from dataclasses import dataclass

import pytest
import torch

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.algorithms.requests import EmbeddingSignal, TargetEmbeddingSignal, requests_of
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.weighter_product import ProductWeighter, combine_weighters
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build
from tests.unit.algorithms.examples import observed

NOW, LATER = UpdateSchedule(0, 1, -1, False), UpdateSchedule(5, 1, -1, False)


@dataclass
class Fixed(Weighter):
    """These weights; counts its calls."""

    given: tuple[float, ...] = ()
    calls: int = 0

    def weights(self, samples, step, total_steps):
        self.calls += 1
        return torch.tensor(self.given)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_the_product_has_mean_one():
    product = ProductWeighter(((Fixed((0.5, 1.5, 1.0, 1.0)), NOW), (Fixed((2.0, 1.0, 0.5, 0.5)), NOW)))
    raw = [1.0, 1.5, 0.5, 0.5]
    assert product.weights(observed([1.0] * 4), 0, 9).tolist() == pytest.approx([4 * r / sum(raw) for r in raw])


def test_a_part_begins_after_its_warmup():
    product = ProductWeighter(((Fixed((0.5, 1.5)), NOW), (Fixed((1.8, 0.2)), LATER)))
    samples = observed([1.0, 2.0])
    assert product.weights(samples, 4, 9).tolist() == pytest.approx([0.5, 1.5])
    assert product.weights(samples, 5, 9).tolist() == pytest.approx([1.5, 0.5])
    other = ProductWeighter(((Fixed((0.5, 1.5)), NOW), (Fixed((1.8, 0.2)), LATER)))
    other.load_state_dict(product.state_dict())
    assert [part.calls for part, _ in other.members] == [2, 1]


def test_nothing_left_is_no_weighting():
    product = ProductWeighter(((Fixed((0.0, 2.0)), NOW), (Fixed((2.0, 0.0)), NOW)))
    assert product.weights(observed([1.0, 2.0]), 0, 9).tolist() == [1, 1]


def test_one_is_itself_and_requested_values_find_their_member():
    loss, joint = build("weighter", "loss"), build("weighter", "joint_update_aware")
    assert combine_weighters([(loss, NOW)]) is loss
    both = combine_weighters([(loss, NOW), (joint, LATER)])
    assert isinstance(both, ProductWeighter) and [member for member, _ in both.members] == [loss, joint]
    assert both.requests() == joint.requests() and len(requests_of(both, EmbeddingSignal)) == 1
    (target,) = requests_of(both, TargetEmbeddingSignal)
    assert both.is_due(target, 0)
    both.receive(target, torch.eye(5, dtype=torch.float64)[0], 0)
    assert not both.is_due(target, 0) and not joint.is_due(target, 0), "the member that asked has it"
    assert combine_weighters([(loss, NOW), (build("weighter", "focal"), NOW)]).requests() == ()


def test_wide_vectors_are_reduced_by_the_member_that_compares_them():
    adapt = build("weighter", "adapt")
    both = combine_weighters([(build("weighter", "loss"), NOW), (adapt, NOW)])
    target = torch.eye(5, dtype=torch.float64)[0]
    both.receive(requests_of(both, TargetEmbeddingSignal)[0], target, 0)
    samples = observed([1.0, 2.0])
    torch.testing.assert_close(both.reduce(samples).embeddings, samples.embeddings[:, :1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("loss", "rho1"), "weighter rho1 chooses tokens"),
        (
            ("adapt", "joint_update_aware"),
            "weighters adapt and jointupdateaware both request EmbeddingSignal; keep one",
        ),
    ],
)
def test_what_does_not_multiply_is_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        combine_weighters([(build("weighter", name), NOW) for name in names])
