"""Rules of tools/checks.py for the package as a whole: circles of imports, class names, requests, docstrings.

* No circle of imports between modules or between rooms (see rooms.py). An import under `if TYPE_CHECKING` or inside a
  function counts: a circle that only works because an import is postponed is a circle all the same.
* A class name is used once, so that a traceback and a search lead to one place.
* Nothing asks what kind of request an algorithm made, except the registry of providers: a new request must work without
  an edit elsewhere. Nor does anything ask an algorithm for a marker class (NeedsX, UsesX).
* A docstring says something: it has at least three words and does more than point elsewhere.

Standard library only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import rooms
from checks_sizes import FUNCTIONS, Breach

PACKAGE = "dataflex_mega"
MIN_WORDS = 3
REQUEST_BASE = "Request"
MAY_ASK_FOR_KINDS = (f"{PACKAGE}/algorithms/requests.py", f"{PACKAGE}/providers/registry.py")
MARKER = re.compile(r"(Needs|Uses)[A-Z]\w*")
POINTER = re.compile(r"(See|The inverse of|Implements) \S+")
Graph = dict[str, set[str]]


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import one another (strongly connected, larger than one or importing themselves)."""
    reach: Graph = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph.get(module, set())
        reach[start] = seen
    groups = {tuple(sorted({a} | {b for b in reach[a] if a in reach.get(b, set())})) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def circle_breaches(root: Path, modules: Mapping[str, str], graph: Graph) -> Iterator[Breach]:
    """Circles between modules, and between rooms, which need not be circles between modules.

    Args:
        modules: module -> its file.
        graph: module -> the modules of the package that it imports.
    """
    for group in cycles(graph):
        yield Breach(modules[group[0]], 1, f"import cycle: {', '.join(group)}")
    between_rooms: Graph = {}
    first_file: dict[str, str] = {}
    for module, targets in sorted(graph.items()):
        room, *others = (rooms.room_of(name.partition(".")[2], root / PACKAGE) for name in (module, *sorted(targets)))
        first_file.setdefault(room, modules[module])
        between_rooms.setdefault(room, set()).update(set(others) - {room})
    for group in cycles(between_rooms):
        yield Breach(first_file[group[0]], 1, f"rooms import one another: {', '.join(group)}")


def class_name_breaches(trees: Mapping[str, ast.Module]) -> Iterator[Breach]:
    """Class names that are used twice, at each place but the first."""
    first: dict[str, str] = {}
    for file, tree in sorted(trees.items()):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                place = f"{file}:{node.lineno}"
                if first.setdefault(node.name, place) != place:
                    yield Breach(file, node.lineno, f"class {node.name} is also at {first[node.name]}")


def last_name(node: ast.expr) -> str:
    """`C` of `a.b.C`; the source text of what is no name."""
    return ast.unparse(node).rpartition(".")[2]


def request_classes(trees: Mapping[str, ast.Module]) -> set[str]:
    """Names of Request and of all classes of the package that derive from it."""
    bases = {
        node.name: {last_name(base) for base in node.bases}
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    kinds = {REQUEST_BASE}
    while more := {name for name, parents in bases.items() if parents & kinds} - kinds:
        kinds |= more
    return kinds


def asked_classes(node: ast.AST) -> list[str]:
    """Names of the classes that `isinstance(x, C)`, `issubclass(x, C)`, `type(x) is C` or `case C():` asks for."""
    asked: list[ast.expr] = []
    if isinstance(node, ast.Call) and last_name(node.func) in {"isinstance", "issubclass"} and len(node.args) == 2:
        asked = [node.args[1]]
    elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node.left):
        asked = node.comparators
    elif isinstance(node, ast.MatchClass):
        asked = [node.cls]
    names = [part for kind in asked for part in ast.walk(kind) if isinstance(part, (ast.Name, ast.Attribute))]
    return [last_name(name) for name in names]


def request_breaches(trees: Mapping[str, ast.Module]) -> Iterator[Breach]:
    """Places that ask for a kind of request, or for a marker class, outside MAY_ASK_FOR_KINDS."""
    kinds = request_classes(trees)
    for file, tree in trees.items():
        if file in MAY_ASK_FOR_KINDS:
            continue
        for node in ast.walk(tree):
            for name in asked_classes(node):
                if name in kinds or MARKER.fullmatch(name):
                    line = getattr(node, "lineno", 1)
                    yield Breach(file, line, f"asks whether something is a {name}; only the registry of providers may")


def docstring_breaches(file: str, tree: ast.Module) -> Iterator[Breach]:
    """Docstrings that say nothing. None at all is better, and ruff's D rules say where one must be."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        if text and (len(text.split()) < MIN_WORDS or POINTER.fullmatch(text)):
            line = getattr(node, "lineno", 1)
            yield Breach(file, line, f"the docstring {text!r} says nothing; remove it, or state a fact")


def package_breaches(
    root: Path, trees: Mapping[str, ast.Module], modules: Mapping[str, str], graph: Graph
) -> Iterator[Breach]:
    """All breaches of the rules of this file.

    Args:
        trees: file of the package -> its source, parsed.
        modules: module -> its file.
        graph: module -> the modules of the package that it imports.
    """
    yield from circle_breaches(root, modules, graph)
    yield from class_name_breaches(trees)
    yield from request_breaches(trees)
    for file, tree in trees.items():
        yield from docstring_breaches(file, tree)
