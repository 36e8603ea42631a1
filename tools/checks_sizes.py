"""Rules of tools/checks.py for single files: sizes, and constructs that the project does not use. Standard library only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

MAX_FILE, MAX_FUNCTION, MAX_NESTING, MAX_PARAMETERS = 400, 60, 4, 8
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LAST_HANDLER = "dataflex_mega/exit_status.py"  # the one file that may catch everything: it ends the program with a line


@dataclass(frozen=True, order=True)
class Breach:
    """One rule broken in one place."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


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
        elif isinstance(node, ast.ExceptHandler) and catches_everything(node) and not file.endswith(LAST_HANDLER):
            yield Breach(file, node.lineno, "catches everything; name the exceptions that can come")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield Breach(file, node.lineno, "relative import; write the whole name")
    yield from patch_breaches(file, tree, imported_names(tree))
