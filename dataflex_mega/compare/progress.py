"""Progress of a comparison: two bars on a terminal, one line per run in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dataflex_mega.compare.suite import TrainingRun


class ComparisonProgress:
    """A runner.RunListener that shows a progress bar and one line per finished run."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.runs_task: Any = None
        self.run_task: Any = None
        self.num_done = self.num_total = 0
        self.start_time = 0.0

    def on_begin(self, done: int, total: int) -> None:
        """`done` of `total` runs are finished already."""
        self.num_done, self.num_total = done, total
        if done:
            self.print_line(f"{done} of {total} runs are finished already")
        if sys.stderr.isatty() and done < total:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.progress = Progress(TextColumn("{task.description:<24}"), *columns, console=self.console)
            self.runs_task = self.progress.add_task("runs", total=total, completed=done)
            self.progress.start()

    def on_run_start(self, run: TrainingRun, step: int) -> None:
        """A run starts, or continues after `step` steps."""
        self.start_time = time.perf_counter()
        if self.progress is not None:
            self.run_task = self.progress.add_task(run.key, total=run.num_steps, completed=step)
        else:
            self.print_line(
                f"run {self.num_done + 1} of {self.num_total}: {run.key}, {run.num_steps} steps"
                f"{f' from {step}' if step else ''}"
            )

    def on_step(self, run: TrainingRun, step: int) -> None:
        """The run has finished `step` steps."""
        if self.progress is not None and self.run_task is not None:
            self.progress.update(self.run_task, completed=step)

    def on_run_end(self, run: TrainingRun, problem: str | None) -> None:
        """A run has ended; `problem` says why it failed, or is None."""
        self.num_done += 1
        if self.progress is not None:
            if self.run_task is not None:
                self.progress.remove_task(self.run_task)
            self.run_task = None
            self.progress.update(self.runs_task, completed=self.num_done)
        if problem is not None:
            self.print_line(f"FAILED {run.key}: {problem}")
        elif self.start_time:
            self.print_line(f"done {run.key} in {time.perf_counter() - self.start_time:.0f} s")

    @contextmanager
    def evaluation_bar(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar on a terminal while a model is evaluated -> a callback for (batches done, batches in all)."""
        if not sys.stderr.isatty():
            self.print_line(f"measuring {name}")
            yield lambda done, total: None
            return
        columns = (TextColumn(f"measuring {name}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def print_line(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Stop the bars and leave them on the screen."""
        if self.progress is not None:
            self.progress.stop()
