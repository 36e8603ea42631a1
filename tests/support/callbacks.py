"""A callback for runs that name one in their YAML."""

import json
from pathlib import Path

from transformers import TrainerCallback


class StopAtThree(TrainerCallback):
    """Ends training after three steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3
        return control


class ScriptedLosses(TrainerCallback):
    """Evaluations find 3, 2, 1, 2, 3 after the steps 1 to 5, whatever the model is."""

    LOSSES = (3.0, 2.0, 1.0, 2.0, 3.0)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = self.LOSSES[state.global_step - 1]


class StopAtFour(TrainerCallback):
    """Asks to end training after four steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 4
        return control


class Listener(TrainerCallback):
    """Writes what a tracker would get into seen-RANK.jsonl."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._write(args, {"arguments": {k: str(v) for k, v in args.to_dict().items()}, "report_to": args.report_to})

    def on_log(self, args, state, control, logs, **kwargs):
        self._write(args, {"step": state.global_step, **logs})

    def _write(self, args, row):
        with (Path(args.output_dir) / f"seen-{args.process_index}.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
