"""Why an installed package cannot be imported. Standard library only."""

from __future__ import annotations

LONGEST = 100  # characters of an error in a line of a report


def first_cause(error: BaseException) -> str:
    """One line of what an import failed on: the error that started the chain, such as `No module named 'termcolor'`."""
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if not isinstance(earlier, Exception):
            break
        error = earlier
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
