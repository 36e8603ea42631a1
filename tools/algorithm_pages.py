"""One documentation page for every algorithm, from its docstrings, its parameters and docs/algorithms.md.

    python tools/algorithm_pages.py [FOLDER]

`make docs` runs this; FOLDER (docs/generated) is not committed, so a page cannot contradict the code.
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

from dataflex_mega.algorithms.requests import ReferenceLossSignal, requests_of
from dataflex_mega.registry import CONTRACTS, get_parameters, list_builtin_names, load_class

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "generated"
TITLES = {"selector": "Selectors", "mixer": "Mixers", "reorder": "Orders", "weighter": "Weighters"}
START_FROM = {
    "selector": "examples/select.yaml", "mixer": "examples/demo.yaml", "reorder": "examples/demo.yaml",
    "weighter": "examples/weight.yaml",
}  # fmt: skip
INPUT_OF_ROLE = {
    "mixer": "the loss sums and token counts of every domain, reduced once per step",
    "reorder": "a score of every sample that it orders, see `score_source`",
    "weighter": "the loss, token count and domain of every sample of the step",
}


def to_markdown(text: str) -> str:
    """A plain docstring as Markdown: indented blocks become code, and Markdown's special characters are escaped."""
    out = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        if all(line.startswith("    ") for line in block.splitlines()):
            out.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            parts = re.split(r"(`[^`]*`)", block)
            out.append("".join(p if p.startswith("`") else re.sub(r"([*_<\[\]|])", r"\\\1", p) for p in parts))
    return "\n\n".join(out)


def parse_arguments_section(cls: type) -> dict[str, str]:
    """Parameter -> its description under `Args:`, those of the classes that it is made from included."""
    if cls is object:
        return {}
    inherited = {name: text for base in reversed(cls.__bases__) for name, text in parse_arguments_section(base).items()}
    _, _, section_text = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
    section_text = re.split(r"\n(?=\w+:\n)", section_text)[0]  # without Raises: and other sections
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section_text, re.MULTILINE)
    return inherited | {name: " ".join(text.split()) for name, text in entries}


def describe_inputs(kind: str, cls: type) -> list[str]:
    """The inputs that a run computes for an algorithm with default parameters: those of its role, and its requests."""
    requests = [summary(type(request)) for request in cls().requests()]
    if kind == "selector" and not requests:
        return ["nothing of the candidates"]
    return [*([INPUT_OF_ROLE[kind]] if kind in INPUT_OF_ROLE else []), *dict.fromkeys(requests)]


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring in one line of Markdown."""
    return to_markdown(" ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split()))


def notes_of(kind: str, name: str) -> str:
    """The notes of docs/algorithms.md on an algorithm: its cost, its checks, its differences from other implementations."""
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (\w+): `(\w+)`$", text, flags=re.MULTILINE)
    body_text = {(k, n): body for k, n, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}[kind, name]
    body_text = re.split(r"^## ", body_text, flags=re.MULTILINE)[0]
    shared = re.split(r"^#", text.split(f"\n## {TITLES[kind]}\n")[1], flags=re.MULTILINE)[0]  # notes on the whole role
    notes = re.findall(r"^\*\*.*?(?=\n\n|\Z)", f"{body_text}\n\n{shared}", re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\((?!https?:|#)([^)]*)\)", r"](../\1)", "\n\n".join(notes))


def runnable_examples() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every YAML of examples/ that needs no file of an earlier run, by path, with its keys."""
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        ready = "init_mixture_proportions_file" not in (config or {})  # otherwise it reads a file of another command
        if isinstance(config, dict) and "model_name_or_path" in config and ready:
            yield path.relative_to(ROOT), config


def algorithm_of(config: dict[str, Any], kind: str) -> str | None:
    """The algorithm of a role in an example."""
    spec = config.get(kind)
    return spec.get("name") if isinstance(spec, dict) else spec


def example_arguments(kind: str, name: str) -> list[str]:
    """The arguments of a training command that runs an algorithm: an example that names it, else the role's default.

    Raises LookupError for one that no example names although it needs further keys.
    """
    for path, config in runnable_examples():
        if algorithm_of(config, kind) == name:
            return [str(path)]
    cls = load_class(kind, name)
    required = [key for key, p in get_parameters(kind, name).items() if p.default is dataclasses.MISSING]
    if required or requests_of(cls(), ReferenceLossSignal):
        raise LookupError(f"{kind} {name}: no file of examples/ names it, and it needs more than its name")
    return [START_FROM[kind], f"{kind}={name}"]


def render_page(kind: str, name: str) -> str:
    """The page of one algorithm as Markdown."""
    cls = load_class(kind, name)
    module = importlib.import_module(cls.__module__)
    description = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[0]
    meanings = parse_arguments_section(cls)
    rows = []
    for key, parameter in get_parameters(kind, name).items():
        default = "required" if parameter.default is dataclasses.MISSING else f"`{parameter.default!r}`"
        type_text = parameter.type_text.replace("|", "\\|")
        meaning = to_markdown(meanings.get(parameter.attribute, meanings.get(key, "")))
        rows.append(f"| `{key}` | `{type_text}` | {default} | {meaning} |")
    table = (
        ["| parameter | type | default | meaning |", "|---|---|---|---|", *rows] if rows else ["It has no parameters."]
    )
    source = str(Path(inspect.getfile(cls)).resolve().relative_to(ROOT))
    command = " ".join(example_arguments(kind, name))
    parts = [
        f"# {kind}: `{name}`",
        to_markdown(inspect.cleandoc(module.__doc__ or "")),
        to_markdown(description),
        "## Parameters\n\n" + "\n".join(table),
        "## Inputs\n\n" + "\n".join(f"- {line}" for line in describe_inputs(kind, cls)),
        "## Run it\n\n```bash\npython -m dataflex_mega.train " + command + "\n```",
        "## Cost, checks, differences\n\n" + notes_of(kind, name),
        f"Source: `{source}`",
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path) -> list[Path]:
    """Write all pages and their index. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written, index = [], ["# Every algorithm on a page", ""]
    for kind in CONTRACTS:
        names = list_builtin_names(kind)
        page_names = [f"{kind}_{name}" for name in names]
        index += [f"## {TITLES[kind]}", "", "```{toctree}", ":maxdepth: 1", "", *page_names, "```", ""]
        for name in names:
            path = folder / f"{kind}_{name}.md"
            path.write_text(render_page(kind, name), encoding="utf-8")
            written.append(path)
    (folder / "index.md").write_text("\n".join(index), encoding="utf-8")
    for stale in set(folder.glob("*.md")) - {*written, folder / "index.md"}:
        stale.unlink()
    return written


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=TARGET)
    args = parser.parse_args(argv)
    print(f"{len(write(args.folder))} pages in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
