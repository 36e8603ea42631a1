"""Make four domains of text and a tiny model in a folder, and train them with a mixer that moves their proportions.

    dataflex-cli demo                       # into the folder demo
    dataflex-cli demo FOLDER max_steps=40   # into another, with keys of the configuration changed
    dataflex-cli demo --no-train            # only the data, the model and the configuration

Needs no GPU and about a minute. FOLDER/demo.yaml is the configuration, to be changed and given to `dataflex-cli train`. The
text comes from LLaMA-Factory's source distribution, which pip downloads once, and from Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dataflex_mega.exit_status import OneLineParser
from dataflex_mega.files import atomic_write

SUMMARY = "demo [FOLDER] [key=value ...]  make small data and a tiny model, and train them with a mixer"
HELP_ORDER = 104
HEADER = """\
# A small Llama from scratch on four real domains, with proportions from ODM. Train it with: dataflex-cli train FILE
"""
WRITTEN_FOR = ".demo"  # the folder that demo.yaml names


def main(argv: Sequence[str]) -> int:
    """Make what is missing and train -> the exit status of the training. Raises UserError."""
    options = parser().parse_args(list(argv))
    folder, overrides = split_arguments(options.arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
    config = prepare(folder, options.source)
    if options.no_train:
        print(f"train it with: dataflex-cli train {config}")
        return 0
    from dataflex_mega.commands import train

    status = train.main([str(config), *overrides])
    if status == 0:
        pictures = sorted(str(path) for path in (folder / "output").glob("*.png"))
        print("\n".join(["", f"The run is in {folder / 'output'}. Look at:", *(f"  {path}" for path in pictures)]))
        print(f"Perplexity of the model by domain: dataflex-cli perplexity --config {config}")
    return status


def parser() -> argparse.ArgumentParser:
    """The options of `dataflex-cli demo`."""
    result = OneLineParser(
        prog="dataflex-cli demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("arguments", nargs="*", metavar="FOLDER | key=value", help="where (demo); keys to change")
    result.add_argument("--source", type=Path, help="a downloaded llamafactory source distribution, instead of pip")
    result.add_argument("--no-train", action="store_true", help="make the files only")
    return result


def split_arguments(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """(the folder, the keys to change). Raises ConfigError for a second folder."""
    from dataflex_mega.errors import ConfigError

    folders = [argument for argument in arguments if "=" not in argument]
    if len(folders) > 1:
        raise ConfigError(f"demo: expected one folder, found {', '.join(folders)}; keys are changed by key=value")
    return Path(folders[0] if folders else "demo"), [argument for argument in arguments if "=" in argument]


def prepare(folder: Path, source: Path | None = None) -> Path:
    """Write data, model and configuration where they are not there already -> the configuration. Raises UserError."""
    from dataflex_mega.demo import data, model

    record = data.run(folder / "data", source, data.Options(), folder / "cache")
    print(
        f"data {'is already in' if record is None else 'written to'} {folder / 'data'}; SOURCES.md names the licences"
    )
    count = model.run(folder / "data", folder / "model", model.ModelOptions())
    print(f"tiny model {'is already in' if count is None else 'written to'} {folder / 'model'}", flush=True)
    config = folder / "demo.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    if not config.exists():  # it may have been changed since
        atomic_write(config, configuration(folder))
    return config


def configuration(folder: Path) -> str:
    """The text of demo.yaml with the paths of `folder`."""
    import dataflex_mega.demo

    text = Path(dataflex_mega.demo.__file__).with_name("demo.yaml").read_text(encoding="utf-8")
    named = re.sub(
        rf"^(\w+): {re.escape(WRITTEN_FOR)}/(\S+)$",
        lambda match: f"{match.group(1)}: {json.dumps(str(folder / match.group(2)), ensure_ascii=False)}",
        text,
        flags=re.MULTILINE,
    )
    _, _, rest = named.partition("\n\n")  # the comment in front says how a checkout trains it
    return f"{HEADER}\n{rest}"
