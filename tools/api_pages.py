"""The API reference of the documentation: autodoc directives for every public name, written into a folder.

    python tools/api_pages.py [FOLDER]

`make docs` runs this; docs/api.md includes FOLDER/api.txt (docs/generated is not committed). The public names are those of
`dataflex_mega.__all__`, so a new name needs no edit here.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "generated"
PACKAGE = "dataflex_mega"
# Title -> module whose public classes and functions a plug-in needs.
MODULES = {
    "Contracts of algorithms": f"{PACKAGE}.algorithms.base",
    "Requests of algorithms": f"{PACKAGE}.algorithms.requests",
    "Data of a step": f"{PACKAGE}.types",
}
FIELDS = {"Args:": "param", "Raises:": "raises", "Returns:": "returns", "Yields:": "yields"}


def directive(target: str, value: Any) -> str:
    """The autodoc directive of one object; `target` is its dotted name."""
    if inspect.ismodule(value):
        kind, options = "automodule", ["members"]
    elif inspect.isclass(value):
        kind, options = "autoclass", ["members", "show-inheritance"]
    elif callable(value):
        kind, options = "autofunction", []
    else:
        kind, options = "autodata", []
    return "\n".join([f".. {kind}:: {target}", *(f"   :{option}:" for option in options)])


def public_names(package: Any) -> list[str]:
    """The names of `__all__` that need an entry, in its order; version strings and the like have none."""
    return [name for name in getattr(package, "__all__", ()) if not name.startswith("__")]


def render() -> str:
    """The directives of all public names, as reStructuredText."""
    package = importlib.import_module(PACKAGE)
    parts = []
    if names := public_names(package):
        parts += [
            ".. rubric:: Public names",
            *(directive(f"{PACKAGE}.{name}", getattr(package, name)) for name in names),
        ]
    for title, module in MODULES.items():
        parts += [f".. rubric:: {title}", f".. automodule:: {module}\n   :members:\n   :member-order: bysource"]
    return "\n\n".join(parts) + "\n"


def to_rst(lines: list[str]) -> list[str]:
    """A plain docstring as reStructuredText: code spans, indented blocks as literal blocks, special characters escaped.

    The entries of sections such as `Args:` become fields.
    """
    result: list[str] = []
    field, in_block = "", False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.rstrip() in FIELDS:
            field, in_block = FIELDS[line.rstrip()], False
            result.append("")
            continue
        if line.strip() and indent == 0:
            field, in_block = "", False
        if field and line.strip():
            name, colon, text = line.strip().partition(": ")
            is_entry = indent == 4 and bool(colon) and re.fullmatch(r"\*{0,2}\w+(, \w+)*", name) is not None
            if is_entry or (indent == 4 and result[-1] == ""):
                line = (
                    f":{field} {name.lstrip('*')}: {escape(text)}" if is_entry else f":{field}: {escape(line.strip())}"
                )
            else:
                line = f"    {escape(line.strip())}"
        elif indent and not field and not in_block:
            result += ["", "::", ""]
            in_block = True
        elif not in_block:
            line = escape(line)
        result.append(line)
    return result


def escape(line: str) -> str:
    """One line of prose: `code` becomes a literal, and characters with a meaning in reStructuredText are escaped."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(f"`{p}`" if p.startswith("`") and len(p) > 2 else re.sub(r"([*_|\\])", r"\\\1", p) for p in parts)


def write(folder: Path) -> Path:
    """Write the directives into `folder` -> the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "api.txt"
    path.write_text(render(), encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=TARGET)
    print(write(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
