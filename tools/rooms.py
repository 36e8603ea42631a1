"""The rooms of the package and their imports: the table of docs/architecture.md and the picture docs/images/rooms.svg.

    python tools/rooms.py            # print the table
    python tools/rooms.py --write    # replace the table on the page, and the picture

A room is a module or a folder at the top of the package; the two engines are rooms of their own. Every import counts,
also inside functions and under `if TYPE_CHECKING`. The level of a room is 0 when it imports no other room, otherwise one
more than the highest level that it imports; rooms in a cycle share a level. The description of a room is kept from the
page; a new room gets the first sentence of its docstring. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dataflex_mega"
PAGE, PICTURE = Path("docs/architecture.md"), Path("docs/images/rooms.svg")
BEGIN, END = "<!-- rooms: written by `python tools/rooms.py --write` -->", "<!-- end of rooms -->"
OPEN_TO_ALL = (
    "types",
    "errors",
    "files",
    "json_text",
    "rng_streams",
    "log",
    "redaction",
)  # every room may import these; the table leaves them out
SUBROOMS = {"engines": ("fsdp", "megatron")}
Graph = dict[str, set[str]]


def room_of(module: str, package: Path) -> str:
    """`engines.fsdp.engine` -> `engines.fsdp`, `data.pool` -> `data`, `trainer` -> `trainer`; "" is `__init__`."""
    first, *rest = module.split(".") if module else ["__init__"]
    if rest and rest[0] in SUBROOMS.get(first, ()):
        return f"{first}.{rest[0]}"
    is_room = (package / first).is_dir() or (package / f"{first}.py").is_file()
    return first if is_room else "__init__"  # `from dataflex_mega import name` imports a name of __init__


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a file imports, without the package's name. Imports are absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            base = node.module.split(".")[1:]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == PACKAGE)


def import_graph(root: Path = ROOT) -> Graph:
    """Room -> the other rooms that it imports, without those that are open to all."""
    package = root / PACKAGE
    graph: Graph = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        room = room_of(module, package)
        targets = {room_of(name, package) for name in imported_modules(ast.parse(path.read_text(encoding="utf-8")))}
        graph.setdefault(room, set()).update(targets - {room, *OPEN_TO_ALL})
    return {room: targets for room, targets in graph.items() if targets or not _is_empty(package / room)}


def _is_empty(path: Path) -> bool:
    """Whether a room holds nothing but an empty `__init__.py` or module."""
    files = list(path.rglob("*.py")) if path.is_dir() else [path.parent / f"{path.name}.py"]
    return all(not file.is_file() or not file.read_text(encoding="utf-8").strip() for file in files)


def reachable(graph: Graph, room: str) -> set[str]:
    """All rooms that `room` imports directly or through others."""
    seen: set[str] = set()
    pending = [room]
    while pending:
        for target in graph.get(pending.pop(), ()):
            if target not in seen:
                seen.add(target)
                pending.append(target)
    return seen


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of rooms that import one another."""
    below = {room: reachable(graph, room) for room in graph}
    groups = {tuple(sorted(r for r in graph if r in below[room] and room in below[r])) for room in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def levels(graph: Graph) -> dict[str, int]:
    """Room -> its level: the longest chain of imports below it, a cycle counted as one room."""
    below = {room: reachable(graph, room) for room in graph}
    found: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in found:
            lower = [r for r in below[room] if r in below and room not in below[r]]
            found[room] = 1 + max((level(r) for r in lower), default=-1)
        return found[room]

    return {room: level(room) for room in graph}


def first_sentence(room: str, root: Path = ROOT) -> str:
    """The first sentence of a room's docstring in one line; empty without one."""
    base = root / PACKAGE / room.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return re.split(r"\.(?: |$)", text)[0].replace("|", "\\|")


def table_rows(text: str) -> dict[str, tuple[str, set[str]]]:
    """The table of the page: room -> (description, rooms that it imports). Raises ValueError without the table."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"no table between {BEGIN} and {END}")
    rows = {}
    for line in text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]:
        _, room, description, imports = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))
        rows[room.strip("`")] = description, set(re.findall(r"`([\w.]+)`", imports))
    return rows


def render_table(graph: Graph, descriptions: dict[str, str]) -> str:
    """The table as Markdown, the highest level first."""
    lines = ["| level | room | holds | imports |", "|---|---|---|---|"]
    height = levels(graph)
    for room in sorted(graph, key=lambda room: (-height[room], room)):
        imports = ", ".join(f"`{target}`" for target in sorted(graph[room]))
        lines.append(f"| {height[room]} | `{room}` | {descriptions[room]} | {imports} |")
    return "\n".join(lines)


def render_picture(graph: Graph) -> str:
    """An SVG: one row of boxes per level, the highest on top; a line per import that no other chain of imports implies."""
    graph = {room: targets for room, targets in graph.items() if room not in OPEN_TO_ALL}
    height = levels(graph)
    rows = [sorted(room for room in graph if height[room] == level) for level in range(max(height.values()) + 1)]
    box, gap, step, margin = 128, 14, 78, 20
    width = max(len(row) for row in rows) * (box + gap) - gap + 2 * margin
    total = len(rows) * step - (step - 30) + 2 * margin
    place: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        left = (width - len(row) * (box + gap) + gap) / 2
        for number, room in enumerate(row):
            place[room] = left + number * (box + gap) + box / 2, margin + (len(rows) - 1 - level) * step
    lines = []
    for room in sorted(graph):
        for target in sorted(graph[room]):
            others = graph[room] - {target}
            if target in place and not any(target in reachable(graph, other) for other in others):
                (x1, y1), (x2, y2) = place[room], place[target]
                lines.append(f'<line x1="{x1:g}" y1="{y1 + 30:g}" x2="{x2:g}" y2="{y2:g}"/>')
    boxes = [
        f'<rect x="{x - box / 2:g}" y="{y:g}" width="{box}" height="30" rx="5"/>'
        f'<text x="{x:g}" y="{y + 19:g}">{escape(room)}</text>'
        for room, (x, y) in sorted(place.items())
    ]
    style = (
        "line{stroke:#8a94a6;stroke-width:1} rect{fill:#eef3fb;stroke:#3b5b92} "
        "text{font:13px sans-serif;fill:#1c2b45;text-anchor:middle}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {total:g}" width="{width:g}" height="{total:g}">'
    return "\n".join([head, f"<style>{style}</style>", *lines, *boxes, "</svg>"]) + "\n"


def render(root: Path = ROOT) -> tuple[str, str]:
    """(text of the page, picture) for the code as it is."""
    graph, text = import_graph(root), (root / PAGE).read_text(encoding="utf-8")
    old = table_rows(text)
    descriptions = {room: old[room][0] if room in old else first_sentence(room, root) for room in graph}
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{render_table(graph, descriptions)}\n\n{END}{after}", render_picture(graph)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 1 when rooms import one another in a cycle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and {PICTURE}")
    arguments = parser.parse_args(argv)
    page, picture = render()
    if arguments.write:
        (ROOT / PAGE).write_text(page, encoding="utf-8")
        (ROOT / PICTURE).write_text(picture, encoding="utf-8")
    else:
        print(page.split(BEGIN)[1].split(END)[0].strip())
    groups = cycles(import_graph())
    for group in groups:
        print(f"rooms: {', '.join(group)} import one another", file=sys.stderr)
    return 1 if groups else 0


if __name__ == "__main__":
    sys.exit(main())
