"""The rules that no linter knows: sizes, forbidden constructs, who may import whom, names. Standard library only.

`python tools/checks.py [ROOT]` prints one line for every breach and exits with 1 when there is one. Sizes and constructs
(checks_sizes.py) hold for the package, tools and tests; layers (here), renames and writes (checks_writes.py), circles of
imports, class names, requests and docstrings (checks_package.py) for the package. A new module at the top of the package
must be entered in LAYERS: where it stands is a decision, not an accident.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from checks_package import PACKAGE, package_breaches
from checks_sizes import Breach, construct_breaches, size_breaches
from checks_writes import write_breaches
from rooms import OPEN_TO_ALL

FOLDERS = (PACKAGE, "tools", "tests")

# Room -> the other rooms it may import (a room is a module or folder at the top of the package). "*": all of them.
# Those of OPEN_TO_ALL are open to everyone. A dotted name opens only that module of a room.
LAYERS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "log": set(),
    "redaction": set(),
    "error_lines": set(),
    "exit_status": {"error_lines"},
    "files": set(),
    "folder_hints": set(),
    "json_text": set(),
    "locks": set(),
    "preemption": set(),
    "rng_streams": set(),
    "data": set(),
    "distributed": {"locks"},
    "store": {"distributed.protocol"},
    "schema": set(),
    "algorithms": {"schema"},
    "signals": {"data", "distributed.protocol"},
    "objective": {"signals"},
    "losses": {"objective"},
    "preference": set(),
    "engines": {"losses", "objective", "signals", "store", "distributed"},
    "plugins": set(),
    "registry": {"algorithms.base", "plugins", "schema"},
    "control": {"algorithms.base", "algorithms.requests", "data", "distributed.protocol"},
    "providers": {
        "algorithms.base",
        "algorithms.requests",
        "data",
        "signals",
        "store",
        "distributed",
        "engines",
        "locks",
        "progress",
    },
    "trainer": {"checkpoint", "control", "data.loader", "engines.base", "metrics"},
    "checkpoint_format": set(),
    "checkpoint_folder": {"checkpoint_format"},
    "checkpoint": {
        "checkpoint_folder",
        "checkpoint_format",
        "distributed.agreement",
        "distributed.protocol",
        "log_files",
    },
    "log_files": set(),
    "gauges": set(),
    "metrics": {"control.plan_report", "gauges", "log_files", "progress"},
    "plots": {"log_files", "metrics"},
    "progress": set(),
    "config": {"folder_hints", "plugins", "registry", "schema", "data.manifest", "engines.capabilities"},
    "corpus": {"data.dataset_info", "data.manifest", "exit_status", "locks"},
    "offline": {"data", "distributed", "exit_status", "locks", "store"},
    "setup": {"exit_status"},
    "llamafactory": {"data", "folder_hints", "setup.imports"},
    "doctor": {"exit_status", "setup"},
    "demo": {"exit_status", "setup.packages"},
    "mixture_sampler": {"algorithms.base", "control.contracts", "control.schedule", "data", "registry"},
    "integrations": {"mixture_sampler"},
    "api": {"*"},
    "compare": {"checkpoint_folder", "config", "data", "llamafactory", "log_files", "metrics", "objective", "signals"},
    "run": {"*"},
    "commands": {"*"},
    "train": {"*"},
    "cli": {"*"},
    "__main__": {"cli"},
    "__init__": {"*"},  # names that are imported when they are first used
}
# Library -> the rooms that may name it. What is not listed here is open to all rooms but `algorithms`.
OWNERS: dict[str, set[str]] = {
    "llamafactory": {"llamafactory"},
    "torch.distributed": {"distributed", "engines", "doctor", "integrations"},
    "megatron": {"engines", "distributed", "data"},
}
NEVER: dict[str, set[str]] = {"trainer": {"transformers"}, "control": {"transformers"}}
ALGORITHM_LIBRARIES = {"torch", *sys.stdlib_module_names}


@dataclass(frozen=True)
class Import:
    """One imported module; an import under `if TYPE_CHECKING` or inside a function counts like any other."""

    module: str
    line: int


def imports(tree: ast.AST, modules: set[str]) -> Iterator[Import]:
    """Every import below `tree`. `from a import b` is a.b where that is one of `modules`, else a; from the package itself it
    is both, since the package answers for its names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                whole = inner in modules or inner in OWNERS
                yield Import(inner if whole else node.module or "", node.lineno)
                if whole and node.module == PACKAGE:
                    yield Import(PACKAGE, node.lineno)


def room_of(module: str) -> str:
    """`dataflex_mega.engines.fsdp.engine` -> `engines`; the package itself -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def within(module: str, outer: str) -> bool:
    """Whether `module` is `outer` or inside it."""
    return module == outer or module.startswith(outer + ".")


def own_import_breach(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, another module of the package; None when it may."""
    room, other = room_of(module), room_of(target)
    if room not in LAYERS:
        return f"{room} has no place in LAYERS of tools/checks.py"
    inside, wanted = module.split(".")[1:], ".".join(target.split(".")[1:])
    if room == "algorithms" and other == room:
        contracts = {"algorithms", "algorithms.base", "algorithms.requests"}
        shared = wanted in contracts or wanted.rpartition(".")[2].startswith("_")
        return None if shared else f"an algorithm imports {wanted}, not only base and helpers whose names begin with _"
    if room == "engines" and other == room and len(inside) > 1 and inside[1] in {"fsdp", "megatron"}:
        rival = "megatron" if inside[1] == "fsdp" else "fsdp"
        return f"one engine imports the other: {wanted}" if within(wanted, f"engines.{rival}") else None
    if other in {room, "__init__", *OPEN_TO_ALL} or "*" in LAYERS[room]:
        return None
    allowed = any(within(wanted, name) for name in LAYERS[room])
    return None if allowed else f"{room} may not import {wanted} (allowed: {', '.join(sorted(LAYERS[room])) or 'none'})"


def library_breach(room: str, target: str) -> str | None:
    """Why a module of this room may not name a library; None when it may."""
    for library, owners in OWNERS.items():
        if within(target, library) and room not in owners:
            return f"{room} may not import {library} (only {', '.join(sorted(owners))})"
    for library in NEVER.get(room, set()):
        if within(target, library):
            return f"{room} may not import {library}"
    if room == "algorithms" and target.split(".")[0] not in ALGORITHM_LIBRARIES:
        return f"an algorithm imports {target}; only torch and the standard library are allowed"
    return None


def layer_breaches(file: str, module: str, tree: ast.AST, found: list[Import]) -> Iterator[Breach]:
    """Imports against the layers, and libraries named outside the rooms that own them."""
    room = room_of(module)
    for imported in found:
        ours = within(imported.module, PACKAGE)
        reason = own_import_breach(module, imported.module) if ours else library_breach(room, imported.module)
        if reason:
            yield Breach(file, imported.line, reason)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in OWNERS:
            reason = library_breach(room, ast.unparse(node))
            if reason:
                yield Breach(file, node.lineno, reason)


def module_name(path: Path) -> str:
    """`dataflex_mega/data/pool.py` -> `dataflex_mega.data.pool`; a package's `__init__.py` is the package."""
    parts = list(path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(root: Path) -> Iterable[Path]:
    """Relative paths of the Python files that the rules hold for."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            if not {"build", "__pycache__"} & set(relative.parts):
                yield relative


def check(root: Path) -> list[Breach]:
    """All breaches below `root`, sorted by place."""
    files = list(source_files(root))
    modules = {module_name(path): str(path) for path in files if path.parts[0] == PACKAGE}
    breaches: list[Breach] = []
    trees: dict[str, ast.Module] = {}  # of the package's modules
    graph: dict[str, set[str]] = {}
    for path in files:
        source = (root / path).read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
        breaches += [*size_breaches(str(path), source, tree), *construct_breaches(str(path), tree)]
        if path.parts[0] == PACKAGE:
            module, found = module_name(path), list(imports(tree, set(modules)))
            breaches += write_breaches(str(path), tree)
            breaches += layer_breaches(str(path), module, tree, found)
            trees[str(path)] = tree
            graph[module] = {i.module for i in found if i.module in modules}
    breaches += package_breaches(root, trees, modules, graph)
    return sorted(set(breaches))


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 1 when a rule is broken."""
    arguments = sys.argv[1:] if argv is None else argv
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    breaches = check(root)
    for breach in breaches:
        print(breach)
    print(
        f"checks: {len(breaches)} breaches" if breaches else "checks: sizes, constructs, layers and names are in order"
    )
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
