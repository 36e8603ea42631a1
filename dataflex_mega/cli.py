"""`dataflex-cli`: finds a command in `commands/` by its name; what only `llamafactory-cli` does is delegated to it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import dataflex_mega.commands as commands
from dataflex_mega.errors import UserError, did_you_mean
from dataflex_mega.exit_status import exit_status
from dataflex_mega.files import atomic_write

BEFORE = "usage: dataflex-cli COMMAND [ARGUMENTS]\n"
AFTER = """\
  help                           this text; `train --help` says more about configurations

  export KEYS | chat | api | webchat | webui | eval   run by llamafactory-cli

examples:
  dataflex-cli train run.yaml                                  a LLaMA-Factory YAML trains as it always did
  dataflex-cli train run.yaml mixer=odm update_step=50         the same data, its proportions moved while training
  dataflex-cli train run.yaml selector.name=loss selector.focus=high update_step=100
  NPROC_PER_NODE=4 dataflex-cli train run.yaml                 four processes (several GPUs start one each by themselves)
  dataflex-cli export saves/run/checkpoint-100 merged merge=true
  dataflex-cli export model_name_or_path=base adapter_name_or_path=out template=qwen export_dir=merged

Several processes are started through torchrun, by these variables: NPROC_PER_NODE, FORCE_TORCHRUN, NNODES, NODE_RANK,
MASTER_ADDR, MASTER_PORT, and for elastic runs RDZV_ID, MIN_NNODES, MAX_NNODES, MAX_RESTARTS."""

DELEGATED = ("export", "chat", "api", "webui", "webchat", "eval")
API, WEB = {"fastapi": "fastapi", "uvicorn": "uvicorn", "sse_starlette": "sse-starlette"}, {"gradio": "gradio"}
NEEDED = {"api": API, "webui": WEB, "webchat": WEB}  # command -> modules that it imports -> their packages
LLAMAFACTORY_CLI = "llamafactory-cli"
HELP_WORDS = ("help", "--help", "-h")
LAST = 1000  # the place in the help of a command that names none


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 after one line on standard error for a user's mistake; 130 when interrupted; else that of what
    was run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command, arguments = (argv[0], argv[1:]) if argv else ("help", [])
    return exit_status(lambda: run(command, arguments))  # what is interrupted says itself what there is to say


def run(command: str, arguments: list[str]) -> int:
    """One command. Raises UserError for one that does not exist."""
    if command in DELEGATED and not (command in command_names() and _load(command).takes(arguments)):
        return delegate(command, arguments)
    if command in HELP_WORDS:
        print(help_text())
        return 0
    command = command.removeprefix("--") if command == "--version" else command
    if command not in command_names():
        known = list(dict.fromkeys([*(name for name, _ in load_commands()), "help", *DELEGATED]))
        hint = did_you_mean(command, known) or f"; there is {', '.join(known)}"
        raise UserError(f"unknown command {command!r}{hint}")
    return _load(command).main(arguments)


def command_names() -> list[str]:
    """The commands that the package has, sorted; none is imported."""
    names = (module.name for module in pkgutil.iter_modules(commands.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def load_commands() -> list[tuple[str, ModuleType]]:
    """(name, module) of every command, in the order of the help."""
    loaded = [(name, _load(name)) for name in command_names()]
    return sorted(loaded, key=lambda entry: getattr(entry[1], "HELP_ORDER", LAST))


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{name}")


def help_text() -> str:
    """The text of `dataflex-cli help`: one line per command."""
    lines = [f"  {module.SUMMARY}" for _, module in load_commands() if module.SUMMARY]
    return "\n".join([BEFORE, *lines, AFTER])


def delegate(command: str, arguments: list[str]) -> int:
    """Run a command of llamafactory-cli in this process, as that program would."""
    from dataflex_mega.llamafactory.compat import ensure_importable

    missing = [package for module, package in NEEDED.get(command, {}).items() if find_spec(module) is None]
    if missing:
        extra = "serve" if command == "api" else "webui"
        raise UserError(f"{command}: needs {', '.join(missing)}; dataflex-cli setup --extras {extra}")
    ensure_importable()
    entry_points = metadata.entry_points(group="console_scripts", name=LLAMAFACTORY_CLI)
    if not entry_points:
        raise UserError(f"{command}: {LLAMAFACTORY_CLI} is not installed")
    run_llamafactory = next(iter(entry_points)).load()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[:] = [LLAMAFACTORY_CLI, command, *as_llamafactory_reads(command, arguments, Path(folder))]
        try:
            return run_llamafactory() or 0
        except NotImplementedError as error:
            raise UserError(f"{command}: {LLAMAFACTORY_CLI} no longer does this: {error}") from error


def as_llamafactory_reads(command: str, arguments: list[str], folder: Path) -> list[str]:
    """Arguments as LLaMA-Factory's parser takes them without printing its whole help: a YAML, and `key=value` after it.

    What is no YAML (`key=value` alone, `--key value`, a JSON file) is written into one in `folder`. Raises UserError for a
    file that is not there or broken, and for an argument that is none of these.
    """
    import yaml

    from dataflex_mega.config.load import load, resolve, with_overrides

    if not arguments and command == "webui":  # it asks for everything
        return []
    if not arguments:
        raise UserError(
            f"{command}: expected a .yaml or .json file, or key=value, such as model_name_or_path=saves/run"
        )
    is_file = "=" not in arguments[0] and not arguments[0].startswith("-")
    keys = load(arguments[0], arguments[1:]) if is_file else resolve(with_overrides({}, as_pairs(arguments)), command)
    if is_file and not arguments[0].endswith(".json"):
        return arguments
    file = folder / f"{command}.yaml"
    atomic_write(file, yaml.safe_dump(keys))
    return [str(file)]


def as_pairs(arguments: list[str]) -> list[str]:
    """`--key value ...` and `--key` as `key=value`; what is `key=value` stays."""
    pairs: list[str] = []
    for argument in arguments:
        name = argument.removeprefix("--")
        if argument.startswith("--"):
            pairs.append(
                name.replace("-", "_", name.count("-") if "=" not in name else 0) + ("" if "=" in name else "=")
            )
        elif "=" in argument and (not pairs or not pairs[-1].endswith("=")):
            pairs.append(argument)
        elif pairs and pairs[-1].endswith("="):
            pairs[-1] += argument
        else:
            raise UserError(f"expected key=value, found {argument!r}")
    return [pair + "true" if pair.endswith("=") else pair for pair in pairs]
