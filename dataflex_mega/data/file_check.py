"""Files compared with the hashes that they should have, in a thread beside the training."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOWEST_PRIORITY = 19  # of Linux's `nice`: the thread runs where nothing else wants to


@dataclass(frozen=True)
class ExpectedFile:
    """A file and the SHA-256 that `source`, a manifest, says it has."""

    path: Path
    sha256: str
    source: Path

    def fault(self) -> str | None:
        """Read all of it -> what is wrong, or None."""
        try:
            with self.path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return f"{self.path} cannot be read: {error.strerror}"
        if found != self.sha256:
            return (
                f"{self.path} has the SHA-256 {found[:12]}..., {self.source} says {self.sha256[:12]}...: it has changed"
            )
        return None


class FileCheck:
    """Hashes `files` one after the other until one is wrong. `fault`: what was found."""

    def __init__(self, files: Sequence[ExpectedFile]) -> None:
        self.files, self.fault = list(files), ""
        self._thread = threading.Thread(target=self._run, name="file check", daemon=True)
        self._thread.start()

    @property
    def is_finished(self) -> bool:
        """Whether all files were read, or a wrong one found."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is finished."""
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        for file in self.files:
            self.fault = file.fault() or ""
            if self.fault:
                return
