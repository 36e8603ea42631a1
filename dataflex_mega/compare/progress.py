"""How a comparison goes: two bars on a terminal, a line for each run in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dataflex_mega.compare.suite import Run


class Board:
    """Implements runner.Watcher."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.runs: Any = None
        self.now: Any = None
        self.done = self.total = 0
        self.started = 0.0

    def begin(self, done: int, total: int) -> None:
        """`done` of `total` runs are finished already."""
        self.done, self.total = done, total
        if done:
            self.note(f"{done} of {total} runs are finished already")
        if sys.stderr.isatty() and done < total:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.progress = Progress(TextColumn("{task.description:<24}"), *columns, console=self.console)
            self.runs = self.progress.add_task("runs", total=total, completed=done)
            self.progress.start()

    def start(self, run: Run, step: int) -> None:
        """A run starts, or continues after `step` steps."""
        self.started = time.perf_counter()
        if self.progress is not None:
            self.now = self.progress.add_task(run.key, total=run.steps, completed=step)
        else:
            self.note(
                f"run {self.done + 1} of {self.total}: {run.key}, {run.steps} steps{f' from {step}' if step else ''}"
            )

    def step(self, run: Run, step: int) -> None:
        """`step` steps are done."""
        if self.progress is not None and self.now is not None:
            self.progress.update(self.now, completed=step)

    def finish(self, run: Run, problem: str | None) -> None:
        """A run is over."""
        self.done += 1
        if self.progress is not None:
            if self.now is not None:
                self.progress.remove_task(self.now)
            self.now = None
            self.progress.update(self.runs, completed=self.done)
        if problem is not None:
            self.note(f"FAILED {run.key}: {problem}")
        elif self.started:
            self.note(f"done {run.key} in {time.perf_counter() - self.started:.0f} s")

    @contextmanager
    def measuring(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal while a model is measured -> what is told (batches done, batches in all)."""
        if not sys.stderr.isatty():
            self.note(f"measuring {name}")
            yield lambda done, total: None
            return
        columns = (TextColumn(f"measuring {name}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def end(self) -> None:
        """Leave the bars as they are."""
        if self.progress is not None:
            self.progress.stop()
