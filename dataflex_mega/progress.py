"""Progress of training and of other long work: one line that moves on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dataflex_mega.log import get_logger


class ProgressCounter:
    """How much of one piece of work is done: a bar on a terminal, a line for each tenth in a log file."""

    def __init__(self, description: str, total: int) -> None:
        """`description` stands at the front of every line: `gradient store s: blocks`."""
        self.description, self.total = description, total
        self.tenths = 0  # of the work, for which a line was written
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.task = self.progress.add_task(description, total=total)
            self.progress.start()

    def __call__(self, done: int) -> None:
        """`done` of `total`; the bar disappears with the last."""
        tenths = done * 10 // max(self.total, 1)
        if self.progress is not None:
            self.progress.update(self.task, completed=done)
            if done >= self.total:
                self.progress.stop()
        elif tenths > self.tenths or done == self.total:
            self.tenths = tenths
            get_logger().info("%s: %d/%d", self.description, done, self.total)


class TrainingProgressBar:
    """Shows step, loss, speed and the current mixture."""

    def __init__(self, every: int = 10) -> None:
        """`every`: steps between lines where standard error is not a terminal."""
        self.every = every
        self.progress: Progress | None = None  # None where standard error is not a terminal
        self.training_task: TaskID | None = None
        self.scoring_task: TaskID | None = None
        self.total = 0

    def start(self, step: int, total: int) -> None:
        """Show the bar, `step` of `total` steps done."""
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
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.training_task = self.progress.add_task("train", total=total, completed=step, text="")
        self.progress.start()

    def update(self, step: int, fields: dict[str, str]) -> None:
        """`step` steps are done; `fields` are shown beside them, name and value."""
        text = "  ".join(f"{name} {value}" for name, value in fields.items())
        if self.progress is not None and self.training_task is not None:
            self.progress.update(self.training_task, completed=step, text=text)
        elif step % self.every == 0 or step == self.total:
            self.print_line(f"step {step}/{self.total}  {text}")

    def update_scoring(self, done: int, total: int) -> None:
        """`done` of `total` batches of candidates are scored. Shown on a terminal only, until all are done."""
        if self.progress is None:
            return
        if self.scoring_task is None:
            self.scoring_task = self.progress.add_task("score", total=total, text="scoring candidates")
        self.progress.update(self.scoring_task, completed=done)
        if done == total:
            self.progress.remove_task(self.scoring_task)
            self.scoring_task = None

    def print_line(self, text: str) -> None:
        """Write a line of its own; on a terminal above the bar, which redirects standard error while it is shown."""
        get_logger().info("%s", text)

    def stop(self) -> None:
        """Stop moving; the bar stays on the screen as it is."""
        if self.progress is not None:
            self.progress.stop()
