"""Who may rename and write whole files: files.py alone, so that everything a user has is written durably."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from checks_sizes import Breach

RENAMES = {"os.replace", "os.rename", "os.renames", "shutil.move"}
WRITES = {"write_text", "write_bytes"}
RENAMER = "dataflex_mega/files.py"
# These write into a folder that files.replace_folder flushes and renames, or for a test.
WRITERS = {
    "dataflex_mega/checkpoint.py",
    "dataflex_mega/checkpoint_format.py",
    "dataflex_mega/engines/checkpoint_index.py",
    "dataflex_mega/engines/fsdp/checkpoint.py",
    "dataflex_mega/engines/megatron/checkpoint.py",
    "dataflex_mega/distributed/testing.py",
}


def write_breaches(file: str, tree: ast.AST) -> Iterator[Breach]:
    """Renames outside files.py, and files that are written under their final names."""
    if file == RENAMER:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        renames = name in RENAMES or method == "rename" or (method == "replace" and len(node.args) == 1)
        if renames and not node.keywords:
            yield Breach(file, node.lineno, f"{name} renames; files.py does that, after the content is on the disk")
        elif method in WRITES and file not in WRITERS:
            yield Breach(file, node.lineno, f"{name} writes under a final name; use files.atomic_write")
        elif name in {"np.save", "numpy.save", "np.savez"} and not _is_stream(node):
            yield Breach(
                file, node.lineno, f"{name} writes under a final name; give it the stream of files.atomic_file"
            )


def _is_stream(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Name) and call.args[0].id == "stream"
