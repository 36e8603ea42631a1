"""Seconds per step of a run: one line per step in the run's own folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dataflex_mega.compare.step_times import STEP_TIMES_FILE
from dataflex_mega.log_files import truncate_log


class StepTimer(TrainerCallback):
    """Writes {"step", "seconds"}: from the end of the step before, or from the start of training, to the end of this one.

    So the seconds of a step include its data selection, and an evaluation or a checkpoint just before it. Loading the
    model and the data is not included. A resumed run drops the lines of steps that it repeats.
    """

    def __init__(self) -> None:
        self.last_time = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the timer, and drop the lines of steps after the resume point."""
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            truncate_log(Path(args.output_dir) / STEP_TIMES_FILE, state.global_step)
        self.last_time = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the line of this step."""
        now = time.perf_counter()
        if state.is_world_process_zero:
            with (Path(args.output_dir) / STEP_TIMES_FILE).open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, "seconds": now - self.last_time}) + "\n")
        self.last_time = now
