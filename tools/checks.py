"""The rules that no linter knows: sizes, forbidden constructs, who may import whom. Standard library only.

`python tools/checks.py [ROOT]` prints one line for every breach and exits with 1 when there is one. Sizes and constructs
hold for the package, tools and tests; layers for the package. A new module at the top of the package must be entered
in LAYERS: where it stands is a decision, not an accident.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "dataflex_mega"
FOLDERS = (PACKAGE, "tools", "tests")
MAX_FILE, MAX_FUNCTION, MAX_NESTING, MAX_PARAMETERS = 400, 60, 4, 8

# Room -> the other rooms it may import (a room is a module or folder at the top of the package). "*": all of them.
# `types`, `errors`, `files`, `log` and `rng_streams` are open to everyone. A dotted name opens only that module of a room.
LAYERS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "log": set(),
    "exit_status": set(),
    "files": set(),
    "rng_streams": set(),
    "data": set(),
    "distributed": set(),
    "store": {"distributed.protocol"},
    "schema": set(),
    "algorithms": {"schema"},
    "signals": {"data", "distributed.protocol"},
    "objective": {"signals"},
    "engines": {"objective", "signals", "store", "distributed"},
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
        "progress",
    },
    "trainer": {"checkpoint", "control", "data.loader", "engines.base", "metrics"},
    "checkpoint": {"distributed.protocol"},
    "metrics": {"checkpoint", "control.plan_report", "progress"},
    "plots": {"metrics"},
    "progress": set(),
    "config": {"plugins", "registry", "schema", "data.manifest"},
    "corpus": {"data.manifest"},
    "offline": {"data", "distributed", "store"},
    "llamafactory": {"data"},
    "doctor": set(),
    "compare": {"checkpoint", "config", "data", "llamafactory", "metrics", "objective", "signals"},
    "run": {"*"},
    "commands": {"*"},
    "train": {"*"},
    "cli": {"*"},
    "__main__": {"cli"},
    "__init__": set(),
}
# Library -> the rooms that may name it. What is not listed here is open to all rooms but `algorithms`.
OWNERS: dict[str, set[str]] = {
    "llamafactory": {"llamafactory"},
    "torch.distributed": {"distributed", "engines", "doctor"},
    "megatron": {"engines", "distributed", "data"},
}
NEVER: dict[str, set[str]] = {"trainer": {"transformers"}, "control": {"transformers"}}
ALGORITHM_LIBRARIES = {"torch", *sys.stdlib_module_names}
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, order=True)
class Breach:
    """One rule broken in one place."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Import:
    """One imported module. `typing_only`: under `if TYPE_CHECKING`, so it is no import at run time."""

    module: str
    line: int
    typing_only: bool


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep blocks lie in one another below `node`; an elif is as deep as its if, inner functions count anew."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not chained)))
    return deepest


def parameter_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """All parameters but self and cls. A Triton kernel has as many as it needs: it takes no objects."""
    if any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list):
        return []
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return [a.arg for a in every if a is not None and a.arg not in {"self", "cls"}]


def size_breaches(file: str, source: str, tree: ast.AST) -> Iterator[Breach]:
    """Files, functions, nesting and parameter lists that are too long."""
    length = len(source.splitlines())
    if length > MAX_FILE:
        yield Breach(file, 1, f"{length} lines; at most {MAX_FILE}")
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        for what, found, limit in (
            ("lines", lines, MAX_FUNCTION),
            ("levels of nesting", nesting(node), MAX_NESTING),
            ("parameters", len(parameter_names(node)), MAX_PARAMETERS),
        ):
            if found > limit:
                yield Breach(file, node.lineno, f"{node.name} has {found} {what}; at most {limit}")


def imported_names(tree: ast.AST) -> set[str]:
    """Names that import statements bind anywhere in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return names


def root_name(node: ast.expr) -> str | None:
    """`a` of `a.b.c`; None when it does not start at a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def assigned(node: ast.AST) -> list[ast.expr]:
    """Everything one statement assigns to or deletes, with tuples taken apart."""
    targets: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    return [part for target in targets for part in ast.walk(target) if isinstance(part, ast.expr)]


def is_setattr_on(node: ast.AST, names: set[str]) -> bool:
    """Whether this is `setattr(x, ...)` or `delattr(x, ...)` where x starts at one of `names`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
        return False
    return node.func.id in {"setattr", "delattr"} and root_name(node.args[0]) in names


def patch_breaches(file: str, node: ast.AST, names: set[str]) -> Iterator[Breach]:
    """Assignments to attributes of what was imported, outside functions that rebind the name as a parameter."""
    if isinstance(node, FUNCTIONS):
        names = names - set(parameter_names(node))
    for part in assigned(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, (ast.Store, ast.Del)) and root_name(part) in names:
            yield Breach(file, part.lineno, f"changes {ast.unparse(part)}, which was imported (a monkey patch)")
    if is_setattr_on(node, names):
        yield Breach(file, getattr(node, "lineno", 1), "setattr or delattr on something imported (a monkey patch)")
    for child in ast.iter_child_nodes(node):
        yield from patch_breaches(file, child, names)


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """Whether it is a bare except, or names Exception or BaseException."""
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(c, ast.Name) and c.id in {"Exception", "BaseException"} for c in caught)


def construct_breaches(file: str, tree: ast.AST) -> Iterator[Breach]:
    """`global`, catch-all handlers, relative imports (they would hide from the layer rules), monkey patches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield Breach(file, node.lineno, f"global {', '.join(node.names)}")
        elif isinstance(node, ast.ExceptHandler) and catches_everything(node):
            yield Breach(file, node.lineno, "catches everything; name the exceptions that can come")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield Breach(file, node.lineno, "relative import; write the whole name")
    yield from patch_breaches(file, tree, imported_names(tree))


def imports(tree: ast.AST, modules: set[str], typing_only: bool = False) -> Iterator[Import]:
    """Every import below `tree`. `from a import b` is a.b where that is one of `modules`, else a."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                whole = inner in modules or inner in OWNERS
                yield Import(inner if whole else node.module or "", node.lineno, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports(node, modules, True)
        else:
            yield from imports(node, modules, typing_only)


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
    if other in {room, "types", "errors", "files", "log", "rng_streams", "__init__"} or "*" in LAYERS[room]:
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


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another (strongly connected, larger than one or importing themselves)."""
    reach: dict[str, set[str]] = {}
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
    graph: dict[str, set[str]] = {}
    for path in files:
        source = (root / path).read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
        breaches += [*size_breaches(str(path), source, tree), *construct_breaches(str(path), tree)]
        if path.parts[0] != PACKAGE:
            continue
        module, found = module_name(path), list(imports(tree, set(modules)))
        breaches += layer_breaches(str(path), module, tree, found)
        graph[module] = {i.module for i in found if i.module in modules and not i.typing_only}
    for group in cycles(graph):
        breaches.append(Breach(modules[group[0]], 1, f"import cycle: {', '.join(group)}"))
    return sorted(set(breaches))


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 1 when a rule is broken."""
    arguments = sys.argv[1:] if argv is None else argv
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    breaches = check(root)
    for breach in breaches:
        print(breach)
    print(f"checks: {len(breaches)} breaches" if breaches else "checks: sizes, constructs and layers are in order")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
