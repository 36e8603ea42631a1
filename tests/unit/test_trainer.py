"""The loop with small fakes: in which order it asks its parts, and what it says about a fault."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataflex_mega.control.plan_report import PlanReport
from dataflex_mega.errors import NotFinite, TrainingFault
from dataflex_mega.trainer import Trainer
from dataflex_mega.types import SamplingPlan, StepStats, TrainState

FIRST, SECOND = (SamplingPlan(start, (1.0,), (0,), (0.0,)) for start in (0, 2))
ZERO = torch.zeros(1, dtype=torch.float64)
REPORT = PlanReport(mixer={"alpha": 1})


class Parts:
    """Everything that a trainer joins, in one object that writes down what is asked of it."""

    def __init__(self, bad_ids=None):
        self.calls, self.bad_ids, self.epoch_ends = [], bad_ids, False
        self.control = SimpleNamespace(
            should_log=False, should_evaluate=False, should_save=False, should_training_stop=False
        )

    # -- engine --

    def learning_rate(self):
        return 0.5

    def train_step(self, micro_batches, weigh):
        self.calls.append(f"train {micro_batches}")
        if self.bad_ids is not None:
            raise NotFinite("the loss is nan", self.bad_ids)
        return StepStats(2.0, 1.0, ZERO, ZERO, ZERO, num_tokens=10)

    # -- controller --

    def initial_plan(self):
        return FIRST

    def needs_new_plan(self, state):
        return state.step == 2

    def next_plan(self, state):
        return SECOND

    def plan_report(self, state):
        assert state.plan is SECOND
        return REPORT

    def next_update_step(self, step, last):
        return min(last, step + 2)

    def check_weights(self, state):
        pass

    def weight_fn(self, state):
        return None

    def observe(self, stats, state):
        self.calls.append(f"observe {state.step}")

    def state_dict(self):
        return {"t": 1}

    def load_state_dict(self, saved):
        self.calls.append(f"load {saved}")

    # -- loader --

    def micro_batches(self, plan, step, last_step):
        return (plan.start_step, step, last_step)

    # -- checkpointer --

    def save(self, state, engine, extra):
        self.calls.append(f"save {state.step} {extra}")

    def restore(self, path, engine):
        return TrainState(3, FIRST, 30, 12), {"controller": "of controller", "hooks": "of hooks"}

    # -- hooks and metrics --

    def on_train_begin(self, *arguments):
        self.calls.append("begin")

    def on_step_begin(self):
        self.epoch_ends = False

    def on_step_end(self, *arguments):
        if isinstance(arguments[0], TrainState):
            return
        self.control.should_log = self.control.should_evaluate = self.control.should_save = arguments[0] == 2

    def on_epoch_end(self):
        ends, self.epoch_ends = self.epoch_ends, False
        if ends:
            self.calls.append("epoch ends")
        return ends

    def stop_reason(self):
        return "a reason"

    def on_plan(self, state, report):
        self.calls.append(f"plan {state.plan.start_step} {report.mixer}")

    def flush(self, state):
        return {"loss": 2.0}

    def on_log(self, logs):
        self.calls.append(f"log {logs}")

    def on_evaluate(self, *arguments):
        self.control.should_training_stop = arguments[-1]["eval_loss"] < 1

    def on_save(self):
        self.calls.append("saved")

    def on_train_end(self, *arguments):
        self.calls.append("end")


def trainer(parts, **changes):
    arguments = {"max_steps": 4, "global_batch_size": 4, "pool_size": 16, "evaluate": lambda: {"eval_loss": 3.0}}
    return Trainer(parts, parts, parts, parts, parts, parts, **{**arguments, **changes})


def test_a_run_asks_its_parts_in_order():
    parts = Parts()
    state = trainer(parts).fit()
    assert parts.calls == [
        "begin", "begin",
        "train (0, 0, 2)", "observe 1",
        "train (0, 1, 3)", "observe 2", "log {'loss': 2.0}", "log {'eval_loss': 3.0}",
        "save 2 {'controller': {'t': 1}, 'hooks': {'t': 1}}", "saved",
        "plan 2 {'alpha': 1}", "train (2, 2, 4)", "observe 3",
        "train (2, 3, 4)", "observe 4",
        "end", "end",
    ]  # fmt: skip
    assert (state.step, state.tokens_seen, state.samples_seen) == (4, 40, 16)


def test_a_run_stops_when_the_hooks_say_so_after_an_evaluation():
    parts = Parts()
    loop = trainer(parts, evaluate=lambda: {"eval_loss": 0.5})
    assert loop.fit().step == 2 and loop.outcome == "stopped at step 2 of 4: a reason"
    assert "saved" in parts.calls and parts.calls[-1] == "end"


def test_an_epoch_that_ended_after_the_checkpoint_was_written_ends_when_the_run_goes_on():
    parts = Parts()
    parts.epoch_ends = True
    loop = trainer(parts)
    loop.fit(Path("there"))
    assert parts.calls[:5] == ["load of controller", "load of hooks", "begin", "begin", "epoch ends"]
    assert loop.outcome == "done: 4 steps"


def test_a_run_goes_on_from_a_checkpoint_with_its_plan_restated():
    parts = Parts()
    state = trainer(parts, restate_plan=lambda plan, step: SamplingPlan(step, (1.0,), (0,), (0.0,))).fit(Path("there"))
    assert parts.calls[:3] == ["load of controller", "load of hooks", "begin"]
    assert "train (3, 3, 4)" in parts.calls and (state.step, state.samples_seen) == (4, 16)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "step 1: the loss is nan; parameters"),
        ([5], "step 1: the loss is nan; samples 5 (row 5); parameters"),
        (list(range(10)), "7 (row 7) and 2 more; parameters"),
    ],
)
def test_a_loss_that_is_not_finite_is_reported_with_step_and_samples(ids, text):
    with pytest.raises(TrainingFault) as fault:
        trainer(Parts(ids), describe_sample=lambda i: f"row {i}").fit()
    assert text in str(fault.value)
