"""Write docs/configuration.md from the code: every key of ours, Megatron's, and the parameters of every algorithm.

`--check` writes nothing and exits with 1 when the file on disk is not what would be written.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dataflex_mega.config import checks, components, legacy, megatron, megatron_checks, orders, ours, pipelines
from dataflex_mega.config.values import kinds
from dataflex_mega.registry import CONTRACTS, Parameter, available, load_class, parameters

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
DATAFLEX_KEYS = (
    "train_type", "components_cfg_file", "component_name", "warmup_step", "update_step", "update_times", "static_mix",
    "train_step", "freeze_gate", "early_stopping_min_delta", "mixture_sample_rule", "init_mixture_proportions",
    "mixer_eval_dataset",
)  # fmt: skip

INTRODUCTION = """# Configuration

This page is generated from the code by `python tools/config_reference.py`; change the code, not the page.

A run is one YAML or JSON file plus `key=value` overrides on the command line:

```bash
dataflex-cli train run.yaml mixer=odm mixer.alpha=0.8 update_step=50 learning_rate=1e-4
```

A file may hold the keys of LLaMA-Factory (which are not listed here: its own documentation holds for them), those of
DataFlex and ours. A key that none of them has is an error that names the nearest one, and so is a value of the wrong
type, a value out of range, or a key that would have no effect. `${key}` and `${oc.env:NAME}` are replaced.

Overrides are read as YAML: `a=1e-3` is a number, `a=[0.5,0.5]` a list, `a=` nothing. Dots go into mappings, and
`mixer.alpha=0.8` works on a plain `mixer: odm` too."""

ROLES = """## Roles

`selector`, `mixer`, `reorder` and `weighter` are independent; any combination may be on. Each is a name, a mapping, or a
mapping with `params` as in DataFlex's components files:

```yaml
mixer: odm
selector: {name: loss, focus: high}
weighter: {name: my_package.my_module:MyWeighter, params: {strength: 2.0}}
```

An unknown parameter is an error. `train_type: dynamic_select | dynamic_mix | dynamic_reorder | dynamic_weight` with
`component_name` picks an entry of a components file for one role instead; a mapping without `name` under the role's key
then changes its parameters."""


ORDERS = """Beside the parameters of its pattern a `reorder` has these. DataFlex's layout, `pattern` with
`pattern_params`, is read too. [Algorithms](algorithms.md#orders) says what they do."""


PIPELINES = """`train_type: dynamic_lego` with `component_name`, a preset of the components file, or with the key `pipeline`.
[Algorithms](algorithms.md#pipelines) says what it does. A preset has:"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Any) -> str:
    """A default as YAML would have it."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def type_text(annotation: str) -> str:
    """`Literal['a', 'b'] | None` -> `a | b | none`."""
    words = {"none": "none", "choice": "", "list": "list", "dict": "mapping", "any": "any"}
    parts = []
    for kind in kinds(annotation):
        parts += [str(choice) for choice in kind.choices] if kind.choices else [words.get(kind.name, kind.name)]
    return f"`{' | '.join(parts)}`"


def field_rows(cls: Any, names: Iterable[str]) -> list[list[str]]:
    """A row a key: name, type, default, meaning."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    made = []
    for name in names:
        f = known[name]
        default = f.default_factory() if callable(f.default_factory) else f.default
        made.append([f"`{name}`", type_text(str(f.type)), shown(default), f.metadata["help"]])
    return made


def fields_of(cls: Any) -> list[list[str]]:
    """A row for every field of a dataclass."""
    return field_rows(cls, [f.name for f in dataclasses.fields(cls)])


def algorithm(role: str, name: str) -> str:
    """One algorithm: its first docstring line and its parameters."""
    first = (load_class(role, name).__doc__ or "").strip().splitlines()[0]
    known: dict[str, Parameter] = parameters(role, name)
    lines = [f"#### {role}: `{name}`", "", first]
    if known:
        meaning = argument_help(load_class(role, name).__doc__ or "")
        rows = [
            [f"`{p.name}`", f"`{p.type_text}`", shown(p.default), meaning.get(p.attribute, "")] for p in known.values()
        ]
        lines += ["", table(("parameter", "type", "default", "meaning"), rows)]
    return "\n".join(lines)


def argument_help(docstring: str) -> dict[str, str]:
    """The `Args:` of a docstring: name -> text in one line."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in docstring.splitlines():
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if stripped == "Args:":
            inside = True
        elif inside and stripped and depth == 8:
            name, _, text = stripped.partition(":")
            found[name] = text.strip()
        elif inside and stripped and depth > 8:
            found[name] += " " + stripped
        elif inside and stripped:
            break
    return found


def packaged_components() -> str:
    """What `component_name` may be."""
    rows = []
    for role in CONTRACTS:
        for name in components.entries(None, role):
            spec = components.pick(None, role, name)
            given = ", ".join(f"{key}: {value}" for key, value in spec.items() if key != "name")
            rows.append([role, f"`{name}`", f"`{spec['name']}`", f"`{given}`" if given else ""])
    return table(("role", "`component_name`", "algorithm", "parameters"), rows)


def document() -> str:
    """The whole page."""
    our_names = [f.name for f in dataclasses.fields(ours.RunArguments)]
    own = [name for name in our_names if name not in DATAFLEX_KEYS]
    head = ("key", "type", "default", "meaning")
    renamed = [[f"`{old}`", f"`{new}`"] for old, new in sorted(legacy.RENAMED.items())]
    renamed += [[f"`{old}`", f"`fsdp_config.{new}`"] for old, new in sorted(legacy.INTO_FSDP_CONFIG.items())]
    renamed += [["`group_by_length`", "`train_sampling_strategy`"]]
    renamed += [[f"`{old}`", f"dropped: {why}"] for old, (_, why) in sorted(legacy.DROPPED.items())]
    refused = [[f"`{key}`", instead] for key, instead in sorted(checks.REFUSED.items())]
    without = {**megatron.REFUSED, **megatron_checks.REFUSED}
    without_megatron = [[f"`{key}`", instead] for key, instead in sorted(without.items())]
    allowed = [[f"`{key}`", ", ".join(f"`{v}`" for v in values), why] for key, (values, why) in checks.ALLOWED.items()]
    names = [f.name for f in dataclasses.fields(megatron.MegatronArguments)]
    score_params = [[f"`{source}`", ", ".join(f"`{k}`" for k in keys)] for source, keys in orders.SCORE_PARAMS.items()]
    parts = [
        INTRODUCTION,
        "## DataFlex's keys",
        table(head, field_rows(ours.RunArguments, DATAFLEX_KEYS)),
        "## Our keys",
        table(head, field_rows(ours.RunArguments, own)),
        ROLES,
        "### Algorithms",
        *(algorithm(role, name) for role in CONTRACTS for name in available(role)),
        "### Orders",
        ORDERS,
        table(head, fields_of(orders.OrderArguments)),
        "`score_params` has, by `score_source`:",
        table(("score_source", "score_params"), score_params),
        table(head, fields_of(orders.ScoreParams)),
        "### Pipelines",
        PIPELINES,
        table(head, fields_of(pipelines.PipelineArguments)),
        "A stage has:",
        table(head, fields_of(pipelines.StageArguments)),
        "### The packaged components file",
        packaged_components(),
        "## What dynamic training does not do",
        "These keys of LLaMA-Factory are refused by name in a dynamic run, before anything is built. Static runs take all.",
        table(("key", "instead"), refused),
        table(("key", "dynamic training takes", "why"), allowed),
        "## Old keys",
        "Keys that the installed transformers has dropped are translated, with a note.",
        table(("old", "new"), renamed),
        "## Megatron's keys",
        "Known by their names in LLaMA-Factory. `engine: megatron`, `USE_MCA=1`, or any of them with another value than the "
        "default asks for the [Megatron engine](megatron.md).",
        table(head, field_rows(megatron.MegatronArguments, names)),
        "What the Megatron engine does not do is refused by name:",
        table(("key", "instead"), without_megatron),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """0: written, or up to date; 1: `--check` found another text on disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--output", type=Path, default=TARGET, help="where the page is (docs/configuration.md)")
    args = parser.parse_args(argv)
    text = document()
    present = args.output.read_text(encoding="utf-8") if args.output.is_file() else None
    if args.check:
        if present != text:
            print(f"{args.output} is not what the code says; run python tools/config_reference.py", file=sys.stderr)
        return int(present != text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
