"""The progress of `dataflex-cli corpus`: a bar on a terminal, a line every few seconds elsewhere, on standard error."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dataflex_mega.corpus.encoded_units import EncodedUnit

SECONDS_BETWEEN_LINES = 10.0  # where standard error is not a terminal


class ProgressDisplay:
    """A progress bar on a terminal, a line every few seconds elsewhere; both on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._total = self._done = self._tokens = self._bad = 0
        self._start = self._last_line = 0.0

    def on_begin(self, total: int, done: int) -> None:
        """Start at `done` of `total` bytes."""
        self._total, self._done, self._start = total, done, time.monotonic()
        self._last_line = self._start
        if done:
            self._console.print(f"continuing: {done / (total or 1):.1%} was done before", highlight=False)
        if sys.stderr.isatty():
            columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._bar.add_task("read", total=total, completed=done, text="")
            self._bar.start()

    def on_unit(self, size: int, encoded: EncodedUnit) -> None:
        """Add a unit of `size` bytes."""
        self._done, self._tokens = self._done + size, self._tokens + encoded.num_tokens
        self._bad += encoded.num_bad_rows
        now = time.monotonic()
        per_second = self._tokens / max(now - self._start, 1e-9)
        text = f"{self._tokens:,} tokens, {per_second:,.0f} per second, {self._bad} bad rows"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=text)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = now
            self._console.print(f"{self._done / (self._total or 1):.1%}  {text}", highlight=False, soft_wrap=True)

    def on_merge(self, num_domains: int) -> None:
        """Close the bar and print that domains are merged."""
        self.close()
        self._console.print(f"merging {num_domains} domain{'s' if num_domains > 1 else ''}", highlight=False)

    def close(self) -> None:
        """Stop updating the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
