"""The events of our loop are those of a Hugging Face Trainer, for evaluations with scripted losses: best model, patience,
evaluations before and after, several evaluation sets, and a run that goes on from a checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as HFTrainer

from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.callbacks import CallbackHooks
from dataflex_mega.trainer import Trainer
from dataflex_mega.types import TrainState

EVENTS = (
    "on_train_begin", "on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end",
    "on_log", "on_evaluate", "on_save", "on_epoch_end", "on_train_end",
)  # fmt: skip
SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss", "epoch"}
SPEED = ("runtime", "samples_per_second", "steps_per_second")
ROWS: Any = [{"x": torch.ones(2)}] * 12


class Script(TrainerCallback):
    """Puts the given losses into the results of evaluations, and writes every event down with the step and what it sees.
    The losses go by step, so that a run that goes on sees those that come next."""

    def __init__(self, losses):
        self.losses, self.events = losses, []

    def see(self, event, state, control, logs=None, metrics=None):
        if metrics is not None:
            for name in [name for name in metrics if name.endswith("_loss")]:
                metrics[name] = self.losses[state.global_step]
        best = (state.best_metric, state.best_global_step, Path(state.best_model_checkpoint or "none").name)
        found = tuple(sorted(set(logs or metrics or ()) - {"loss", "grad_norm", "learning_rate"}))
        self.events.append((event, state.global_step, round(state.epoch or 0.0, 9), best, found))


def _see(event):
    def handler(self, args, state, control, **kwargs):
        self.see(event, state, control, kwargs.get("logs"), kwargs.get("metrics"))

    return handler


for _event in EVENTS:
    setattr(Script, _event, _see(_event))


class Linear(torch.nn.Module):
    """A model with a loss, as Hugging Face's loop wants one."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


class Parts:
    """The other parts of our loop, as little of them as it needs. Checkpoints are folders with the state of the hooks."""

    def __init__(self, folder):
        self.folder, self.optimizer = folder, torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        self.loaded = None

    def learning_rate(self):
        return 0.0

    def train_step(self, *_):
        self.optimizer.step()
        return SimpleNamespace(num_tokens=1, stop_requested=False, mean_loss=1.0)

    def needs_new_plan(self, _):
        return False

    def next_update_step(self, step, last):
        return last

    def flush(self, _):
        return {"loss": 1.0}

    def micro_batches(self, *_):
        return []

    def save(self, state, engine, extra):
        checkpoint = self.folder / f"checkpoint-{state.step}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.json").write_text(json.dumps([state.step, state.samples_seen, extra["hooks"]]))

    def restore(self, path, engine):
        step, samples, hooks = json.loads((path / "state.json").read_text())
        return TrainState(step, None, 0, samples), {"controller": {}, "hooks": hooks}  # type: ignore[arg-type]

    def load_model(self, path, engine):
        self.loaded = path.name
        return int(path.name.removeprefix("checkpoint-"))

    def __getattr__(self, name):
        return lambda *_: {} if name == "state_dict" else None


def arguments_for(folder, keys):
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 2, "max_steps": 8, "label_names": ["x"],
    }  # fmt: skip
    return TrainingArguments(**{**common, **keys})


def theirs(folder, keys, losses, patience, sets, resume=None):
    """The events of Hugging Face's Trainer."""
    script = Script(losses)
    stopping = [EarlyStoppingCallback(patience)] if patience else []
    evaluation = dict.fromkeys(sets, ROWS[:4]) if sets else ROWS[:4]
    trainer = HFTrainer(
        Linear(),
        arguments_for(folder, keys),
        train_dataset=ROWS,
        eval_dataset=evaluation,
        callbacks=[script, *stopping],
    )
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    return script.events, trainer


def ours(folder, keys, losses, patience, sets, resume=None):
    """Ours, and the loop."""
    script, parts, arguments = Script(losses), Parts(folder), arguments_for(folder, keys)
    finetuning = SimpleNamespace(early_stopping_steps=patience, use_swanlab=False)
    args = LFArgs(SimpleNamespace(), SimpleNamespace(), arguments, finetuning, SimpleNamespace())
    given = dict.fromkeys(("model", "processing_class", "lr_scheduler")) | {"optimizer": parts.optimizer}
    hooks = CallbackHooks(args, given, 8, [script], 0.0, 3)
    names = [f"eval_{name}" for name in sets] or ["eval"]
    results = {f"{name}_{metric}": 9.0 for name in names for metric in ("loss", *SPEED)}
    loop = Trainer(
        parts, parts, parts, parts, hooks, parts, max_steps=8, global_batch_size=4, pool_size=12,
        evaluate=lambda: dict(results), evaluation_sets=sets, evaluates_at_start=arguments.eval_on_start,
        loads_best=arguments.load_best_model_at_end,
    )  # fmt: skip
    loop.fit(resume and folder / resume)
    return script.events, loop


STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
LOSSES = [9.0, 3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # by step; the best is that of step 3
CASES = {
    "best": ({**STEPS, **BEST}, LOSSES, None, ()),
    "best by steps": ({**STEPS, **BEST, "eval_steps": 2, "save_steps": 4}, LOSSES, None, ()),
    "best by epochs": ({"eval_strategy": "epoch", "save_strategy": "epoch", **BEST}, LOSSES, None, ()),
    "save the best": ({**STEPS, **BEST, "save_strategy": "best"}, LOSSES, None, ()),
    "save the highest": ({**STEPS, **BEST, "save_strategy": "best", "greater_is_better": True}, LOSSES, None, ()),
    "patience": ({**STEPS, **BEST}, LOSSES, 2, ()),
    "patience without a best": ({**STEPS, "metric_for_best_model": "loss"}, LOSSES, 3, ()),
    "at the start": ({**STEPS, **BEST, "eval_on_start": True}, [0.5, *LOSSES[1:]], 2, ()),
    "two sets": ({**STEPS, **BEST, "metric_for_best_model": "b_loss"}, LOSSES, 2, ("a", "b")),
    "ties": ({**STEPS, **BEST}, [9.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 4, ()),
    "no number": ({**STEPS, **BEST}, [9.0, 2.0, float("nan"), 1.0, float("nan"), 3.0, 1.0, 0.5, 1.0], None, ()),
    "late": ({**STEPS, **BEST, "eval_delay": 4}, LOSSES, None, ()),
    "no evaluation": ({"eval_strategy": "no", "save_strategy": "epoch"}, LOSSES, None, ()),
}  # fmt: skip


MAIN = ("save the best", "two sets")  # the others run with `make test-all`
EVERY = [case if case in MAIN else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]


@pytest.mark.parametrize("case", EVERY)
def test_the_events_of_scripted_evaluations_are_hugging_faces(tmp_path, case):
    expected, trainer = theirs(tmp_path / "theirs", *CASES[case])
    actual, loop = ours(tmp_path / "ours", *CASES[case])
    assert without_nan(actual) == without_nan(expected)
    state, peer = loop.hooks.state, trainer.state  # type: ignore[attr-defined]
    assert set(state.log_history[-1]) >= SUMMARY and set(peer.log_history[-1]) >= SUMMARY
    assert (state.num_train_epochs, state.train_batch_size) == (peer.num_train_epochs, peer.train_batch_size)
    written = json.loads((tmp_path / "ours" / "trainer_state.json").read_text())
    assert written["best_global_step"] == peer.best_global_step and written["global_step"] == peer.global_step
    best = peer.best_model_checkpoint
    loaded = loop.engine.loaded  # type: ignore[attr-defined]
    assert loaded == (Path(best).name if best and trainer.args.load_best_model_at_end else None)


def without_nan(events):
    """The same with a text for a value that equals nothing."""
    return json.loads(json.dumps(events).replace("NaN", '"nan"'))


# In the middle of an epoch, or after its end: where a checkpoint is written before the end of its epoch, Hugging Face's loop
# forgets that end when it goes on, and ours does not.
GOES_ON = {
    "best": 4, "patience": 4, "save the best": 2, "at the start": 4, "two sets": 4, "best by epochs": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [case if case == "patience" else pytest.param(case, marks=pytest.mark.exhaustive) for case in GOES_ON]
)
def test_a_run_that_goes_on_has_the_events_that_hugging_faces_has(tmp_path, case):
    keys, losses, patience, sets = CASES[case]
    resume = f"checkpoint-{GOES_ON[case]}"
    theirs(tmp_path / "theirs", keys, losses, patience, sets)
    ours(tmp_path / "ours", keys, losses, patience, sets)
    expected, _ = theirs(
        tmp_path / "theirs", {**keys, "restore_callback_states_from_checkpoint": True}, *CASES[case][1:], resume
    )
    actual, loop = ours(tmp_path / "ours", keys, losses, patience, sets, resume)
    where = {"on_epoch_begin"}  # Hugging Face's loop begins a new epoch in the middle of one; ours when one begins
    assert [e for e in actual if e[0] not in where] == [e for e in expected if e[0] not in where]
    assert loop.engine.loaded == "checkpoint-3"  # type: ignore[attr-defined]
