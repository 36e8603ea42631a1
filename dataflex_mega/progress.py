"""The progress bar of training: one line that moves on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Count:
    """How much of one piece of work is done: a bar on a terminal, a line for each tenth in a log file."""

    def __init__(self, what: str, total: int) -> None:
        """`what`: `store: 12 blocks`, at the front of every line."""
        self.what, self.total, self.told = what, total, 0
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task(what, total=total)
            self.progress.start()

    def __call__(self, done: int) -> None:
        """`done` of `total`; the bar goes away with the last."""
        if self.progress is not None:
            self.progress.update(self.task, completed=done)
            if done >= self.total:
                self.progress.stop()
        elif done * 10 // max(self.total, 1) > self.told or done == self.total:
            self.told = done * 10 // max(self.total, 1)
            self.console.print(f"{self.what}: {done}/{self.total}", highlight=False, soft_wrap=True)


class Bar:
    """Shows step, loss, speed and the current mixture."""

    def __init__(self, every: int = 10) -> None:
        """`every`: steps between lines where standard error is not a terminal."""
        self.console = Console(stderr=True)
        self.every = every
        self.progress: Progress | None = None
        self.task: Any = None
        self.scored: Any = None
        self.total = 0

    def begin(self, step: int, total: int) -> None:
        """Start at `step` of `total`."""
        self.total = total
        if not sys.stderr.isatty():
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.progress = Progress(*columns, console=self.console)
        self.task = self.progress.add_task("train", total=total, completed=step, text="")
        self.progress.start()

    def step(self, step: int, parts: dict[str, str]) -> None:
        """`step` steps are done."""
        text = "  ".join(f"{name} {value}" for name, value in parts.items())
        if self.progress is not None:
            self.progress.update(self.task, completed=step, text=text)
        elif step % self.every == 0 or step == self.total:
            self.console.print(f"step {step}/{self.total}  {text}", highlight=False, soft_wrap=True)

    def scoring(self, done: int, batches: int) -> None:
        """`done` of `batches` batches of candidates are scored. Shown on a terminal only, while it lasts."""
        if self.progress is None:
            return
        if self.scored is None:
            self.scored = self.progress.add_task("score", total=batches, text="scoring candidates")
        self.progress.update(self.scored, completed=done)
        if done == batches:
            self.progress.remove_task(self.scored)
            self.scored = None

    def note(self, text: str) -> None:
        """A line of its own above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self.progress is not None:
            self.progress.stop()
