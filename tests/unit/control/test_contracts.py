"""What an algorithm returns against its contract, and what it raises, ends in one line that names class and method."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Reorder, Selector, Weighter
from dataflex_mega.algorithms.requests import LossSignal
from dataflex_mega.control import contracts
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.weight_checks import COMPARE_EVERY, COMPARE_FIRST, CheckedWeighter
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.testing import run_distributed_test
from dataflex_mega.errors import DataError, TrainingFault
from dataflex_mega.types import SampleStats, StepLossWeights, TokenSelection, UpdateContext
from tests.unit.control.test_controller import ALONE, SIZES, controller, drive

RNG = torch.Generator()
CONTEXT = UpdateContext(4, 100, 0, 1)
NAN, INF = float("nan"), float("inf")


@dataclass
class Broken(Selector):
    """Returns what it is given; calls it where that is a function."""

    scores: object = None
    positions: object = None
    combined: object = None
    replacement: bool = False

    def requests(self):
        return (LossSignal(),)

    def score(self, table):
        return table["loss"] if self.scores is None else value(self.scores, len(table.sample_ids))

    def combine_updates(self, ids, scores, context):
        return scores if self.combined is None else value(self.combined, len(ids))

    def select(self, scores, count, context, rng):
        return torch.arange(count) if self.positions is None else value(self.positions, count)


@dataclass
class Uneven(Mixer):
    """Returns what it is given."""

    returns: dict = field(default_factory=dict)

    def proportions(self, context, rng):
        return value(self.returns.get("proportions", torch.full((3,), 1 / 3, dtype=torch.float64)), 3)

    def loss_weights(self):
        return value(self.returns.get("loss_weights"), 3)

    def step_loss_weights(self):
        return value(self.returns.get("step_loss_weights"), 3)

    def average_weights(self):
        return value(self.returns.get("average_weights"), 3)

    def observe(self, stats, proportions, step):
        value(self.returns.get("observe"), 3)

    def report(self):
        return value(self.returns.get("report", {}), 3)

    def state_dict(self):
        return value(self.returns.get("state_dict", {}), 3)


@dataclass
class Given(Weighter):
    """Returns what it is given."""

    result: object = None
    tokens: object = None
    narrow: object = None

    def weights(self, samples, step, total_steps):
        return value(self.result, len(samples.sample_ids))

    def token_selection(self):
        return self.tokens

    def reduce(self, samples):
        return samples if self.narrow is None else self.narrow(samples)


@dataclass
class Order(Reorder):
    """Returns what it is given."""

    ranks: object = None

    def rank_order(self, count, seed):
        return value(self.ranks, count)


def value(given, count):
    return given(count) if callable(given) else given


def fail(_):
    raise ValueError("the table\nis empty")


SELECTORS = {
    "score raises": ({"scores": fail}, "score raised ValueError: the table is empty (test_contracts.py, line"),
    "score: nothing": ({"scores": lambda n: None}, "score returned None, a tensor of 117 numbers"),
    "score: a list": ({"scores": lambda n: [0.0] * n}, "score returned a list"),
    "score: one row less": ({"scores": lambda n: torch.zeros(n - 1)}, "a tensor [116] of float32; [117] or [117, m]"),
    "score: a number": ({"scores": lambda n: torch.tensor(1.0)}, "a tensor [] of float32"),
    "score: three dimensions": ({"scores": lambda n: torch.zeros(n, 1, 1)}, "a tensor [117, 1, 1]"),
    "score: complex": ({"scores": lambda n: torch.zeros(n, dtype=torch.complex64)}, "complex64"),
    "score: all NaN": ({"scores": lambda n: torch.full((n,), NAN)}, "score returned NaN for all 117 candidates"),
    "combine raises": ({"combined": fail}, "combine_updates raised ValueError"),
    "combine: too few": ({"combined": lambda n: torch.zeros(3)}, "combine_updates returned a tensor [3] of float32"),
    "select raises": ({"positions": fail}, "select raised ValueError"),
    "select: nothing": ({"positions": lambda n: None}, "select returned None, a tensor of 16 integers"),
    "select: an array": ({"positions": lambda n: torch.arange(n).numpy()}, "select returned a ndarray"),
    "select: one": ({"positions": lambda n: torch.tensor([5])}, "select returned 1 ids, 16 were asked for"),
    "select: too many": ({"positions": lambda n: torch.arange(n + 2)}, "select returned 18 ids, 16 were asked for"),
    "select: none": ({"positions": lambda n: torch.arange(0)}, "select returned 0 ids, 16 were asked for"),
    "select: floats": ({"positions": lambda n: torch.arange(n).float()}, "a tensor [16] of float32, a tensor of 16 int"),
    "select: a mask": ({"positions": lambda n: torch.ones(n, dtype=torch.bool)}, "of bool"),
    "select: two dimensions": ({"positions": lambda n: torch.zeros(n, 1, dtype=torch.int64)}, "[16, 1]"),
    "select: negative": ({"positions": lambda n: torch.arange(n) - 1}, "select returned -1; positions are 0 to 116"),
    "select: beyond": ({"positions": lambda n: torch.arange(n) + 110}, "select returned 117; positions are 0 to 116"),
    "select: the same": ({"positions": lambda n: torch.full((n,), 7)}, "select returned 15 of 16 ids again, 7 16 times"),
    "select: one twice": ({"positions": lambda n: torch.arange(n).clamp(max=n - 2)}, "1 of 16 ids again, 14 2 times"),
}  # fmt: skip


def update(role, algorithm):
    """What the controller does at its first update."""
    made = controller(UpdateSchedule(0, 2, -1, repeat_cycles=False), **{role: algorithm})
    drive(made, 1)
    return made


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_that_breaks_its_contract_is_named(name):
    parameters, message = SELECTORS[name]
    with pytest.raises(TrainingFault) as caught:
        update("selector", Broken(**parameters))
    text = str(caught.value)
    assert message in text and text.startswith("selector tests.unit.control.test_contracts:Broken.")
    assert "\n" not in text
    if "raised" in message:
        assert isinstance(caught.value.__cause__, ValueError)


def test_what_a_selector_may_do():
    update("selector", Broken())
    update("selector", Broken(scores=lambda n: torch.arange(n)))
    update("selector", Broken(positions=lambda n: torch.zeros(n, dtype=torch.int32), replacement=True))
    made = update("selector", Broken(scores=lambda n: torch.ones(n, 4)))
    assert made.selection.last_record.selected_ids.tolist() == list(range(16))
    few = contracts.select(Broken(positions=lambda n: torch.arange(n) % 3), torch.zeros(3), 8, CONTEXT, RNG)
    assert few.tolist() == [0, 1, 2, 0, 1, 2, 0, 1], "fewer candidates than are asked for"


def test_a_users_mistake_that_an_algorithm_finds_stays_one():
    def refuse(_):
        raise DataError("shorten update_step")

    with pytest.raises(DataError, match="shorten update_step"):
        update("selector", Broken(positions=refuse))
    with pytest.raises(KeyboardInterrupt):
        update("selector", Broken(positions=lambda n: (_ for _ in ()).throw(KeyboardInterrupt())))


def test_candidates_without_a_score_are_counted(capsys):
    update("selector", Broken(scores=lambda n: torch.arange(n).float().masked_fill(torch.arange(n) < 5, NAN)))
    assert "score gave 5 of 117 candidates no score (NaN)" in capsys.readouterr().err


THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64)
MIXERS = {
    "raises": ({"proportions": fail}, "proportions raised ValueError"),
    "nothing": ({"proportions": None}, "proportions returned None"),
    "a list": ({"proportions": [0.5, 0.5, 0.0]}, "proportions returned a list"),
    "sum": ({"proportions": torch.ones(3)}, "finite numbers >= 0 with sum 1, found [1.0, 1.0, 1.0]"),
    "negative": ({"proportions": torch.tensor([1.5, -0.5, 0.0])}, "3 finite numbers >= 0, found [1.5, -0.5, 0.0]"),
    "NaN": ({"proportions": torch.tensor([NAN, 0.5, 0.5])}, "found [nan, 0.5, 0.5]"),
    "shape": ({"proportions": torch.tensor([0.5, 0.5])}, "found [0.5, 0.5]"),
    "loss weights: NaN": ({"loss_weights": torch.tensor([NAN, 1.0, 1.0])}, "loss_weights must return 3 finite numbers"),
    "loss weights: 0": ({"loss_weights": torch.zeros(3)}, "loss_weights returned [0.0, 0.0, 0.0]: 0 for every domain"),
    "loss weights: list": ({"loss_weights": [1.0, 1.0, 1.0]}, "loss_weights returned a list"),
    "loss weights: shape": ({"loss_weights": torch.ones(4)}, "loss_weights must return 3 finite"),
    "step weights: a tensor": ({"step_loss_weights": THIRDS}, "StepLossWeights or None was expected"),
    "step weights: inf": (
        {"step_loss_weights": StepLossWeights(THIRDS * INF, "token")},
        "step_loss_weights must return",
    ),
    "state": ({"state_dict": [1]}, "state_dict returned a list, a dict was expected"),
    "report": ({"report": None}, "report returned None, a dict was expected"),
    "observe": ({"observe": fail}, "observe raised ValueError"),
    "averages": ({"average_weights": THIRDS}, "average_weights returned a tensor [3]"),
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_that_breaks_its_contract_is_named(name):
    returns, message = MIXERS[name]
    mixer = Uneven(returns)
    with pytest.raises(TrainingFault) as caught:
        made = update("mixer", mixer)
        state = SimpleNamespace(step=1, plan=made.initial_plan())
        made.weight_fn(state)
        made.observe(None, state)
        made.plan_report(state)
        made.state_dict()
        contracts.average_weights(mixer, 3)
    assert message in str(caught.value) and "mixer tests.unit.control.test_contracts:Uneven." in str(caught.value)


ORDERS = {
    "raises": (fail, "rank_order raised ValueError"),
    "short": (lambda n: torch.arange(n - 1), "rank_order returned a tensor [4] of int64, [5] was expected"),
    "twice": (lambda n: torch.arange(n).clamp(min=1), "each of 0 to 4 once, found [1, 1, 2, 3, 4]"),
    "beyond": (lambda n: torch.arange(n) + 1, "each of 0 to 4 once, found [1, 2, 3, 4, 5]"),
    "negative": (lambda n: torch.arange(n) - 1, "each of 0 to 4 once"),
    "floats": (lambda n: torch.arange(n).float(), "a tensor of 5 integers was expected"),
    "a list": (lambda n: list(range(n)), "rank_order returned a list"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_reorder_that_is_no_permutation_is_named(name):
    ranks, message = ORDERS[name]
    with pytest.raises(TrainingFault) as caught:
        contracts.rank_order(Order(ranks), 5, 0)
    assert message in str(caught.value) and "reorder tests.unit.control.test_contracts:Order." in str(caught.value)


def samples(losses=(1.0, 2.0, 3.0, 2.0)):
    n = len(losses)
    return SampleStats(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.tensor(losses), torch.ones(n).long())


WEIGHTS = {
    "raises": (fail, "weights raised ValueError"),
    "nothing": (None, "weights returned None, a tensor of 4 numbers"),
    "a list": ([1.0] * 4, "weights returned a list"),
    "one": (torch.ones(1), "weights returned a tensor [1] of float32, [4] was expected"),
    "a column": (torch.ones(4, 1), "weights returned a tensor [4, 1]"),
    "too many": (torch.ones(5), "weights returned a tensor [5]"),
    "negative": (torch.tensor([-5.0, 3.0, 3.0, 3.0]), "finite numbers >= 0, found -5 at step 8"),
    "NaN": (torch.tensor([NAN, 1.0, 1.0, 1.0]), "finite numbers >= 0, found a weight that is NaN or infinite"),
    "inf": (torch.tensor([INF, 1.0, 1.0, 1.0]), "found a weight that is NaN or infinite"),
    "mean 7": (torch.full((4,), 7.0), "mean 1 over the samples of a step, found 7 at step 8"),
    "mean 0": (torch.zeros(4), "mean 1 over the samples of a step, found 0 at step 8"),
    "sum 1": (torch.full((4,), 0.25), "found 0.25 at step 8"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weighter_that_breaks_its_contract_is_named(name):
    result, message = WEIGHTS[name]
    checked = CheckedWeighter(Given(result), ALONE)
    with pytest.raises(TrainingFault) as caught:
        checked.weights(samples(), 7, 100)
        checked.end_step(7, last=False)
    assert message in str(caught.value) and "weighter tests.unit.control.test_contracts:Given." in str(caught.value)


def test_the_mean_is_that_of_a_step_and_not_of_a_call():
    """greats weighs the samples of a step 0 or G / K: a micro-batch may have any mean."""
    checked = CheckedWeighter(Given(), ALONE)
    for result in (torch.zeros(4), torch.full((4,), 2.0), torch.ones(4)):
        checked.weighter.result = result
        checked.weights(samples(), 0, 100)
    checked.end_step(0, last=False)
    checked.weighter.result = torch.full((4,), 2.0)
    checked.weights(samples(), 1, 100)
    with pytest.raises(TrainingFault, match="found 2 at step 2"):
        checked.end_step(1, last=False)


def test_a_loss_that_is_not_finite_is_not_the_weighters_fault():
    checked = CheckedWeighter(Given(torch.full((4,), NAN)), ALONE)
    checked.weights(samples((1.0, NAN, 2.0, 1.0)), 0, 100)
    checked.end_step(0, last=False)


TOKENS = {
    "type": (0.5, "token_selection returned a float, TokenSelection or None"),
    "ratio": (TokenSelection(1.5, lambda a, b: a), "keep_ratio must be above 0 and at most 1, found 1.5"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_selection_of_tokens_is_checked(name):
    tokens, message = TOKENS[name]
    made = controller(UpdateSchedule(0, 2, -1, repeat_cycles=False), weighter=Given(torch.ones(4), tokens))
    with pytest.raises(TrainingFault, match=message):
        made.weight_fn(SimpleNamespace(step=0, plan=made.initial_plan()))


def test_what_a_rank_sends_has_a_row_for_each_sample():
    def lose(stats):
        return SampleStats(stats.sample_ids, stats.domain_ids, stats.loss_sum[:2], stats.num_tokens)

    for narrow, message in (
        (lose, "as loss_sum; one row for each of 4"),
        (lambda _: None, "returned None, SampleStats"),
    ):
        with pytest.raises(TrainingFault, match=message):
            CheckedWeighter(Given(narrow=narrow), ALONE).reduce(samples())


def test_algorithms_of_the_package_have_their_names_in_configurations():
    from dataflex_mega.algorithms.selectors.delta_loss import DeltaLoss

    assert contracts.label(DeltaLoss()) == "selector delta_loss"
    assert contracts.label(Order(), "setup") == "reorder tests.unit.control.test_contracts:Order.setup"


def test_setup_is_called_with_the_domains():
    with pytest.raises(TrainingFault, match=r"Order.setup raised AttributeError"):
        made = Order()
        made.setup = lambda domains: domains.no_such_field
        contracts.setup(made, DomainInfo(("a",), SIZES[:1], (1.0,)))


# -- two processes -------------------------------------------------------------------------------------------------------


def _differ(info, first_bad_step):
    """Step after which each rank stops, and why."""
    checked = CheckedWeighter(Given(), TorchCollectives(info))
    even, odd = torch.ones(4), torch.tensor([0.5, 1.5, 1.0, 1.0])
    for step in range(100):
        checked.weighter.result = odd if info.rank == 1 and step == first_bad_step else even
        checked.weights(samples(), step, 100)
        try:
            checked.end_step(step, last=step == 99)
        except TrainingFault as fault:
            return step, str(fault)
    return None


def _scores_of_one_rank(info):
    """A selector that raises on rank 1 alone."""
    from dataflex_mega.types import SignalTable

    table = SignalTable(torch.arange(3), torch.zeros(3).long(), {"loss": torch.arange(3.0)})
    messages = []
    for scores in (fail, lambda n: torch.zeros(n, 2), lambda n: torch.full((n,), NAN)):
        selector = Broken(scores=scores) if info.rank == 1 else Broken()
        try:
            gathered = contracts.gather_scores(selector, table, [3, 3], TorchCollectives(info))
            messages.append(gathered.tolist())
        except TrainingFault as fault:
            messages.append(str(fault))
    return messages


@pytest.fixture(scope="module")
def of_two_ranks():
    return run_distributed_test(_both, 2)


def _both(info):
    return [_differ(info, 0), _differ(info, 40), _differ(info, 97), _differ(info, None)], _scores_of_one_rank(info)


def test_other_weights_on_one_rank_end_the_run_on_every_rank(of_two_ranks):
    ends = [[result[0][case] for result in of_two_ranks] for case in range(4)]
    # At once among the first steps, then at the next comparison, at the latest at the end.
    assert [end[0][0] for end in ends[:3]] == [0, 2 * COMPARE_EVERY - 1, 99] and COMPARE_FIRST < 40
    for end in ends[:3]:
        assert end[0] == end[1], "both ranks stop after the same step with the same line"
        assert "Given.weights returned other weights on data-parallel rank 1 than on rank 0" in end[0][1]
    assert ends[3] == [None, None]


def test_what_one_rank_scores_wrongly_ends_all(of_two_ranks):
    (zero, one) = (result[1] for result in of_two_ranks)
    assert one[0].startswith("selector tests.unit.control.test_contracts:Broken.score raised ValueError")
    assert zero[0] == f"rank 1: {one[0]}"
    assert "shapes that differ" in zero[1] and "shapes that differ" in one[1]
    assert zero[2][:3] == [0.0, 1.0, 2.0] and len(one[2]) == 6, "NaN of some candidates is no fault"
