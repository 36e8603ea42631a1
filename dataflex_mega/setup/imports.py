"""Why an installed package cannot be imported. Standard library only."""

from __future__ import annotations

import traceback

LONGEST = 100  # characters of an error in a line of a report


def first_cause(error: BaseException) -> str:
    """One line of what an import failed on: the error that started the chain, and the package that raised it.

    Such as `No module named 'termcolor' (imported by hqq)`, where all that the last error says is that transformers failed.
    """
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if not isinstance(earlier, Exception):
            break
        error = earlier
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    importer = _importer(error)
    return f"{text} (imported by {importer})" if importer else text


def _importer(error: BaseException) -> str:
    """The installed package whose code asked for a module that is not there; empty for another error."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(f.f_globals.get("__name__")) for f in frames if "site-packages" in f.f_code.co_filename]
    return names[-1].partition(".")[0] if names else ""
