"""Find broken tables in Markdown files: rows with another number of cells than the header, and missing rulers.

    python tools/markdown_tables.py FILE ...

A row that does not fit is cut or shown as text by Markdown renderers, without an error. Standard library only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

RULER = re.compile(r"\|(\s*:?-+:?\s*\|)+")


def num_cells(row: str) -> int:
    """Cells of a row that starts and ends with a vertical bar; `\\|` belongs to a cell."""
    return len(re.split(r"(?<!\\)\|", row.strip())) - 2


def breaches(text: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, message) of every broken row. Fenced code is skipped.

    `state` is 0 outside a table, 1 after its header, 2 after its ruler.
    """
    fence, state, columns, previous = "", 0, 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark.group(1)
        if fence or not line.startswith("|"):
            if state == 1 and not fence:
                yield number - 1, "a table of one line: the ruler below its header is missing"
            state, previous = 0, line
            continue
        if not re.search(r"(?<!\\)\|\s*$", line):
            yield number, "a row must end with a vertical bar"
        if state == 0:
            if previous.strip() and not previous.startswith("#"):
                yield number, "a table needs an empty line above its header"
            columns, state = num_cells(line), 1
            if RULER.fullmatch(line.strip()):
                yield number, "a table without a header"
        else:
            if state == 1 and not RULER.fullmatch(line.strip()):
                yield number, f"expected the ruler below a header, found {line.strip()[:40]!r}"
            if num_cells(line) != columns:
                yield number, f"{num_cells(line)} cells, the header has {columns}"
            state = 2
        previous = line


def main(paths: list[str]) -> int:
    """Print one line per broken row. Returns the exit status: 0, or 1 when there is one."""
    found = [f"{path}:{line}: {message}" for path in paths for line, message in breaches(Path(path).read_text())]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
