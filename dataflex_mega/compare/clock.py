"""How long a run's steps took: one line a step in the run's own folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dataflex_mega.checkpoint import truncate_log
from dataflex_mega.compare.step_times import FILE


class Clock(TrainerCallback):
    """Writes {"step", "seconds"}: from the end of the step before, or from the start of training, to the end of this one.

    A step's seconds so hold its choice of data, and an evaluation or a checkpoint that came just before it. Loading the
    model and the data is left out. A run that continues drops the lines of steps that it does again.
    """

    def __init__(self) -> None:
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The clock starts."""
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            truncate_log(Path(args.output_dir) / FILE, state.global_step)
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One line."""
        now = time.perf_counter()
        if state.is_world_process_zero:
            with (Path(args.output_dir) / FILE).open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, "seconds": now - self.last}) + "\n")
        self.last = now
