"""Write docs/configuration.md from the code: every key of this package and the parameters of every algorithm.

`--check` writes nothing and exits with 1 when the file on disk is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dataflex_mega.config import (
    component_parameters,
    components,
    dataflex_parse,
    deepspeed_schema,
    fates,
    fates_megatron,
    fates_newer,
    legacy,
    megatron,
    pipelines,
    reorder_arguments,
)
from dataflex_mega.config.fate import Fate
from dataflex_mega.registry import CONTRACTS, Parameter, get_parameters, list_builtin_names, load_class
from dataflex_mega.schema.coercion import type_text
from dataflex_mega.schema.constraints import constraints_of, field_hints

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
DATAFLEX_KEYS = (
    "train_type", "components_cfg_file", "component_name", "warmup_step", "update_step", "update_times", "static_mix",
    "train_step", "freeze_gate", "early_stopping_min_delta", "mixture_sample_rule", "init_mixture_proportions",
    "mixer_eval_dataset",
)  # fmt: skip

HEAD = ("key", "type", "range", "default", "meaning")

INTRODUCTION = """# Configuration

This page is generated from the code by `python tools/config_reference.py`; change the code, not the page.

A run is one YAML or JSON file plus `key=value` overrides on the command line:

```bash
dataflex-cli train run.yaml mixer=odm mixer.alpha=0.8 update_step=50 learning_rate=1e-4
```

A file may hold the keys of LLaMA-Factory (not listed here: see its own documentation), of DataFlex, and of this
package. An unknown key is an error that names the nearest one. A value of the wrong type, a value out of range, and a key
without effect are errors too. `${key}` and `${oc.env:NAME}` are replaced.

Overrides are read as YAML: `a=1e-3` is a number, `a=[0.5,0.5]` a list, `a=` null. A dot selects a key inside a mapping,
and `mixer.alpha=0.8` also works with a plain `mixer: odm`."""

ROLES = """## Roles

`selector`, `mixer`, `reorder` and `weighter` are independent; any combination may be active. Each is a name, a mapping, or a
mapping with `params` as in DataFlex's components files:

```yaml
mixer: odm
selector: {name: loss, focus: high}
weighter: {name: my_package.my_module:MyWeighter, params: {strength: 2.0}}
```

An unknown parameter is an error. `train_type: dynamic_select | dynamic_mix | dynamic_reorder | dynamic_weight` with
`component_name` picks an entry of a components file for one role instead; a mapping without `name` under the role's key
then changes its parameters."""


ORDERS = """Besides the parameters of its pattern, a `reorder` has the following keys. DataFlex's layout, `pattern` with
`pattern_params`, is accepted too. [Algorithms](algorithms.md#orders) explains them."""


FATES = """## What becomes of LLaMA-Factory's keys

In a static run LLaMA-Factory acts on its keys. In a dynamic run each of them acts as it does there, or is noted (it has no
effect, and a line on standard error says what stands for it), or is refused by name before anything is built. A key is noted
or refused only where its value says something: its default passes. The classes are LLaMA-Factory's; `TrainingArguments` has
the keys of transformers' too."""


PIPELINES = """`train_type: dynamic_lego` with `component_name`, a preset of the components file, or with the key `pipeline`.
[Algorithms](algorithms.md#pipelines) explains pipelines. The keys of a preset:"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_default(value: Any) -> str:
    """A default in YAML notation."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def field_rows(cls: Any, names: Iterable[str]) -> list[list[str]]:
    """One row per key: name, type, range, default, meaning."""
    known, hints = {f.name: f for f in dataclasses.fields(cls)}, field_hints(cls)
    rows = []
    for name in names:
        f = known[name]
        default = f.default_factory() if callable(f.default_factory) else f.default
        allowed = ", ".join(str(constraint) for constraint in constraints_of(hints[name]))
        rows.append([f"`{name}`", f"`{type_text(hints[name])}`", allowed, format_default(default), f.metadata["help"]])
    return rows


def all_field_rows(cls: Any) -> list[list[str]]:
    """One row for every field of a dataclass that is a key."""
    return field_rows(cls, [f.name for f in dataclasses.fields(cls) if f.init])


def algorithm_section(role: str, name: str) -> str:
    """One algorithm: its first docstring line and its parameters."""
    first = (load_class(role, name).__doc__ or "").strip().splitlines()[0]
    known: dict[str, Parameter] = get_parameters(role, name)
    lines = [f"#### {role}: `{name}`", "", first]
    if known:
        documented = (CONTRACTS[role], load_class(role, name))
        meaning = {key: text for cls in documented for key, text in argument_help(cls.__doc__ or "").items()}
        rows = [
            [f"`{p.name}`", f"`{p.type_text}`", p.range_text, format_default(p.default), meaning.get(p.attribute, "")]
            for p in known.values()
        ]
        lines += ["", table(("parameter", *HEAD[1:]), rows)]
    return "\n".join(lines)


def argument_help(docstring: str) -> dict[str, str]:
    """The `Args:` of a docstring: name -> text in one line."""
    texts: dict[str, str] = {}
    inside, name = False, ""
    for line in docstring.splitlines():
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if stripped == "Args:":
            inside = True
        elif inside and stripped and depth == 8:
            name, _, text = stripped.partition(":")
            texts[name] = text.strip()
        elif inside and stripped and depth > 8:
            texts[name] += " " + stripped
        elif inside and stripped:
            break
    return texts


def packaged_components() -> str:
    """The table of the values of `component_name`."""
    rows = []
    for role in CONTRACTS:
        for name in components.entries(None, role):
            spec = components.read_component(None, role, name).spec
            values = ", ".join(f"{key}: {value}" for key, value in spec.items() if key != "name")
            rows.append([role, f"`{name}`", f"`{spec['name']}`", f"`{values}`" if values else ""])
    return table(("role", "`component_name`", "algorithm", "parameters"), rows)


def new_words(words: Mapping[str, str]) -> str:
    """`; `exact` is now `step`` for each word that a renamed key took."""
    return "".join(f"; `{old}` is now `{new}`" for old, new in words.items())


def parameters_without_effect() -> str:
    """The parameters of DataFlex's components that no algorithm here reads."""
    rows = []
    for (role, name), reasons in component_parameters.UNUSED_PARAMETERS.items():
        rows += [[f"{role} `{name}`", f"`{parameter}`", reason] for parameter, reason in reasons.items()]
    return table(("algorithm", "parameter", "reason"), rows)


def fate_rows(fated: Mapping[str, Fate]) -> list[list[str]]:
    """One row per key: its name and what becomes of it."""
    rows = []
    for key, fate in sorted(fated.items()):
        text = f"{fate.verb}: {fate.why}" if fate.verb != "acts" else "acts"
        if fate.takes:
            text = f"takes {', '.join(f'`{value}`' for value in fate.names_taken)}: {fate.why}"
        elif fate.switch is not None:
            text = f"acts with `{fate.switch}`".replace(" or ", "` or `")
        rows.append([f"`{key}`", text])
    return rows


def fate_sections() -> list[str]:
    """What becomes of LLaMA-Factory's keys, a table for each of its classes."""
    parts = [FATES]
    for owner, fated in {**fates.TABLES, "Keys of later versions of LLaMA-Factory": fates_newer.NEWER_FATES}.items():
        parts += [f"### {owner}", table(("key", "in a dynamic run"), fate_rows(fated))]
    return parts


def deepspeed_section() -> list[str]:
    """What becomes of the keys of a DeepSpeed configuration."""
    refused = {f"zero_optimization.{key}": instead for key, instead in deepspeed_schema.ZERO_REFUSED.items()}
    sizes = {f"{key}` above 1, `": instead for key, instead in deepspeed_schema.REFUSED_SIZES.items()}
    rows = [
        [f"`{key}`".replace(", ``", ""), why] for key, why in {**deepspeed_schema.REFUSED, **refused, **sizes}.items()
    ]
    zero = [f"`{key}`" for key in sorted(deepspeed_schema.ZERO_TUNING)]
    top = [f"`{key}`" for key in sorted(deepspeed_schema.TUNING)]
    return [
        "## Keys of a DeepSpeed configuration",
        "With a role, a `deepspeed` file or mapping is translated; "
        "[what becomes of it](coming-from.md#deepspeed-and-accelerate). These of its keys are refused when they are on:",
        table(("key", "instead"), sorted(rows)),
        f"These have no counterpart, and a note counts them: {', '.join(top)}; in `zero_optimization`: {', '.join(zero)}.",
    ]


def document() -> str:
    """The whole page."""
    our_names = [f.name for f in dataclasses.fields(dataflex_parse.RunArguments)]
    own = [name for name in our_names if name not in DATAFLEX_KEYS]
    renamed = [[f"`{old}`", f"`{new}`"] for old, new in sorted(legacy.RENAMED.items())]
    renamed += [[f"`{old}`", f"`fsdp_config.{new}`"] for old, new in sorted(legacy.INTO_FSDP_CONFIG.items())]
    renamed += [[f"`{old}`", f"`{new}`{new_words(words)}"] for old, (new, words) in legacy.OUR_RENAMED.items()]
    renamed += [["`group_by_length`", "`train_sampling_strategy`"]]
    renamed += [[f"`{old}`", f"dropped: {why}"] for old, (_, why) in sorted(legacy.DROPPED.items())]
    without_megatron = [[f"`{key}`", instead] for key, instead in sorted(megatron.REFUSED.items())]
    names = [f.name for f in dataclasses.fields(megatron.MegatronArguments)]
    score_params = [
        [f"`{source}`", ", ".join(f"`{k}`" for k in keys)] for source, keys in reorder_arguments.SCORE_PARAMS.items()
    ]
    parts = [
        INTRODUCTION,
        "## DataFlex's keys",
        table(HEAD, field_rows(dataflex_parse.RunArguments, DATAFLEX_KEYS)),
        "## Keys of this package",
        table(HEAD, field_rows(dataflex_parse.RunArguments, own)),
        ROLES,
        "### Algorithms",
        *(algorithm_section(role, name) for role in CONTRACTS for name in list_builtin_names(role)),
        "### Orders",
        ORDERS,
        table(HEAD, all_field_rows(reorder_arguments.ReorderArguments)),
        "The keys of `score_params` for each `score_source`:",
        table(("score_source", "score_params"), score_params),
        table(HEAD, all_field_rows(reorder_arguments.ScoreParams)),
        "### Pipelines",
        PIPELINES,
        table(HEAD, all_field_rows(pipelines.PipelineArguments)),
        "The keys of a stage:",
        table(HEAD, all_field_rows(pipelines.StageArguments)),
        "### The packaged components file",
        packaged_components(),
        "A components file written for DataFlex is read as it is. A note names those of its parameters that have no effect "
        "here:",
        parameters_without_effect(),
        *fate_sections(),
        *deepspeed_section(),
        "## Old keys",
        "Keys that the installed transformers no longer has, and older names of our keys, are translated, with a note.",
        table(("old", "new"), renamed),
        "## Megatron's keys",
        "They have the names of LLaMA-Factory. `engine: megatron`, `USE_MCA=1`, or any of them with another value than the "
        "default asks for the [Megatron engine](megatron.md).",
        table(HEAD, field_rows(megatron.MegatronArguments, names)),
        "Keys of Megatron that are refused by name:",
        table(("key", "instead"), without_megatron),
        "Keys of LLaMA-Factory that this engine treats otherwise than `engine: fsdp`:",
        table(("key", "with engine: megatron"), fate_rows(fates_megatron.MEGATRON_FATES)),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """0: written, or up to date; 1: `--check` found a file that is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare with the file on disk")
    parser.add_argument("--output", type=Path, default=TARGET, help="where the page is (docs/configuration.md)")
    args = parser.parse_args(argv)
    text = document()
    present = args.output.read_text(encoding="utf-8") if args.output.is_file() else None
    if args.check:
        if present != text:
            print(f"{args.output} is out of date; run python tools/config_reference.py", file=sys.stderr)
        return int(present != text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
