"""One documentation page for every algorithm, from its docstrings, its parameters and docs/algorithms.md.

    python tools/algorithm_pages.py [FOLDER]

`make docs` runs this; FOLDER (docs/generated) is not committed, so a page cannot say what the code no longer does.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.registry import CONTRACTS, available, load_class, parameters

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "generated"
TITLES = {"selector": "Selectors", "mixer": "Mixers", "reorder": "Orders", "weighter": "Weighters"}
START_FROM = {
    "selector": "examples/select.yaml", "mixer": "examples/demo.yaml", "reorder": "examples/demo.yaml",
    "weighter": "examples/weight.yaml",
}  # fmt: skip
# A class that an algorithm also derives from -> what it wants beside the signals.
ALSO_WANTS = {
    "NeedsReference": "token losses of `reference_model`",
    "NeedsHidden": "hidden states of the training forward pass, and of target samples",
    "StepWeighing": "the loss sums of every step",
    "NeedsLoads": "how many tokens of each domain every expert gets, counted in the training forward pass",
    "NeedsGradients": "inner products of the domains' gradients, at every update",
    "TokenChoice": "the loss of every token",
    "UsesPolicy": "answers of the model to the prompts of `eval_dataset`",
    "UsesClusters": "hidden states of the whole pool, once",
    "NeedsBatchGradients": "gradients of the batch that is about to be trained",
}
OF_ROLE = {
    "mixer": "the loss sums and token counts of every domain, reduced once a step",
    "reorder": "a score of every sample in the order's hands, see `score_source`",
    "weighter": "the loss, token count and domain of every sample of the step",
}


def prose(text: str) -> str:
    """A plain docstring as Markdown: indented blocks become code, and signs that Markdown would take are escaped."""
    out = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        if all(line.startswith("    ") for line in block.splitlines()):
            out.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            parts = re.split(r"(`[^`]*`)", block)
            out.append("".join(p if p.startswith("`") else re.sub(r"([*_<\[\]|])", r"\\\1", p) for p in parts))
    return "\n\n".join(out)


def arguments(cls: type) -> dict[str, str]:
    """Parameter -> what its line under `Args:` says."""
    _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
    listed = re.split(r"\n(?=\w+:\n)", listed)[0]  # Raises: and the like
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def signals(kind: str, cls: type) -> list[str]:
    """What has to be computed for an algorithm."""
    found = [OF_ROLE[kind]] if kind in OF_ROLE else []
    if issubclass(cls, Selector):
        found += [f"`{name}` of every candidate" for name in sorted(cls.needs)] or ["nothing of the candidates"]
    return found + [text for name, text in ALSO_WANTS.items() if name in {base.__name__ for base in cls.__mro__}]


def section(kind: str, name: str) -> str:
    """The part of docs/algorithms.md on an algorithm: what it costs, how it is checked, how it differs elsewhere."""
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (\w+): `(\w+)`$", text, flags=re.MULTILINE)
    own = {(k, n): body for k, n, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}[kind, name]
    own = re.split(r"^## ", own, flags=re.MULTILINE)[0]
    shared = re.split(r"^#", text.split(f"\n## {TITLES[kind]}\n")[1], flags=re.MULTILINE)[0]  # said of the whole role
    notes = re.findall(r"^\*\*.*?(?=\n\n|\Z)", f"{own}\n\n{shared}", re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\((?!https?:|#)([^)]*)\)", r"](../\1)", "\n\n".join(notes))


def examples() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every YAML of examples/ that needs no file of an earlier run, by path, with its keys."""
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        ready = "init_mixture_proportions_file" not in (found or {})  # else it waits for what another command writes
        if isinstance(found, dict) and "model_name_or_path" in found and ready:
            yield path.relative_to(ROOT), found


def named(config: dict[str, Any], kind: str) -> str | None:
    """The algorithm of a role in an example."""
    spec = config.get(kind)
    return spec.get("name") if isinstance(spec, dict) else spec


def example(kind: str, name: str) -> list[str]:
    """The arguments of a training command that runs an algorithm: an example that names it, else the role's own.

    Raises LookupError for one that no example names although it cannot do without further keys.
    """
    for path, config in examples():
        if named(config, kind) == name:
            return [str(path)]
    cls = load_class(kind, name)
    required = [key for key, p in parameters(kind, name).items() if p.default is dataclasses.MISSING]
    if required or "NeedsReference" in {base.__name__ for base in cls.__mro__}:
        raise LookupError(f"{kind} {name}: no file of examples/ names it, and it needs more than its name")
    return [START_FROM[kind], f"{kind}={name}"]


def page(kind: str, name: str) -> str:
    """The page of one algorithm."""
    cls = load_class(kind, name)
    module = importlib.import_module(cls.__module__)
    described = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[0]
    meanings = arguments(cls)
    rows = []
    for key, parameter in parameters(kind, name).items():
        default = "required" if parameter.default is dataclasses.MISSING else f"`{parameter.default!r}`"
        kinds = parameter.type_text.replace("|", "\\|")
        rows.append(
            f"| `{key}` | `{kinds}` | {default} | {prose(meanings.get(parameter.attribute, meanings.get(key, '')))} |"
        )
    table = (
        ["| parameter | type | default | meaning |", "|---|---|---|---|", *rows] if rows else ["It has no parameters."]
    )
    source = str(Path(inspect.getfile(cls)).resolve().relative_to(ROOT))
    command = " ".join(example(kind, name))
    parts = [
        f"# {kind}: `{name}`",
        prose(inspect.cleandoc(module.__doc__ or "")),
        prose(described),
        "## Parameters\n\n" + "\n".join(table),
        "## What it looks at\n\n" + "\n".join(f"- {line}" for line in signals(kind, cls)),
        "## Run it\n\n```bash\npython -m dataflex_mega.train " + command + "\n```",
        "## Cost, checks, differences\n\n" + section(kind, name),
        f"Source: `{source}`",
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path) -> list[Path]:
    """Write all pages and their index. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written, index = [], ["# Every algorithm on a page", ""]
    for kind in CONTRACTS:
        names = available(kind)
        listed = [f"{kind}_{name}" for name in names]
        index += [f"## {TITLES[kind]}", "", "```{toctree}", ":maxdepth: 1", "", *listed, "```", ""]
        for name in names:
            path = folder / f"{kind}_{name}.md"
            path.write_text(page(kind, name), encoding="utf-8")
            written.append(path)
    (folder / "index.md").write_text("\n".join(index), encoding="utf-8")
    for old in set(folder.glob("*.md")) - {*written, folder / "index.md"}:
        old.unlink()
    return written


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=TARGET)
    args = parser.parse_args(argv)
    print(f"{len(write(args.folder))} pages in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
