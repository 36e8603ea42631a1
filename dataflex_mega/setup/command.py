"""Install what training needs beside the torch that is here, which stays as it is. A second run finds nothing to do.

    dataflex-cli setup
    dataflex-cli setup --extras serve,quant
    dataflex-cli setup --dry-run

LLaMA-Factory comes without its dependencies, because they would replace torch; those that training imports are installed
with this package. The running interpreter's pip does it, or uv where there is no pip.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dataflex_mega.exit_status import OneLineParser
from dataflex_mega.files import atomic_write
from dataflex_mega.setup.packages import EXTRAS, last_error
from dataflex_mega.setup.placeholder import write_wheel
from dataflex_mega.setup.plan import SetupPlan, make_plan
from dataflex_mega.setup.versions import SetupError, requirement_name

PACKAGE = "dataflex_mega"
CONSTRAINTS = "torch_stays.txt"


@dataclass(frozen=True)
class Installer:
    """A program that installs into the running interpreter."""

    name: str
    install: tuple[str, ...]
    uninstall: tuple[str, ...]


def find_installer(python: str = sys.executable) -> Installer:
    """pip where the interpreter has it, else uv. Raises SetupError without either."""
    if importlib.util.find_spec("pip") is not None:
        pip = (python, "-m", "pip")
        quiet = ("--quiet", "--progress-bar", "off", "--no-input", "--disable-pip-version-check")
        return Installer("pip", (*pip, "install", *quiet), (*pip, "uninstall", "--quiet", "--yes"))
    uv = shutil.which("uv")
    if uv is not None:
        target = ("--quiet", "--python", python)
        return Installer("uv", (uv, "pip", "install", *target), (uv, "pip", "uninstall", *target))
    raise SetupError(f"neither pip nor uv is here; {python} -m ensurepip installs pip")


def installed_packages() -> dict[str, str]:
    """Normalised name -> version of every package that this interpreter finds; the first on its path counts."""
    importlib.invalidate_caches()
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(requirement_name(name), distribution.version)
    return found


def imports(module: str) -> str | None:
    """None when a new process can import `module`, else the last line of its error."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    return None if done.returncode == 0 else lines[-1]


def run_installer(installer: Installer, command: Sequence[str]) -> None:
    """Run pip or uv. Raises SetupError with the line by which it says why it failed."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SetupError(f"{installer.name}: {last_error(done.stdout + done.stderr)}")


def script(plan: SetupPlan, installer: Installer) -> list[str]:
    """The lines of a shell script that does the same."""
    lines = []
    constrained = ["--constraint", CONSTRAINTS]
    if plan.steps:
        lines.append(f"printf '%s\\n' {shlex.join(plan.constraints)} > {CONSTRAINTS}")
    for step in plan.steps:
        lines.append(shlex.join([*installer.install, *constrained, *step.arguments]))
    if plan.placeholder:
        wheel = f'"$({shlex.join([sys.executable, "-m", f"{PACKAGE}.setup.placeholder", "."])})"'
        lines.append(f"{shlex.join([*installer.install, '--no-deps'])} {wheel}")
    return lines


def carry_out(plan: SetupPlan, installer: Installer) -> None:
    """Do what the plan says, one line a step. Raises SetupError."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / CONSTRAINTS
        atomic_write(constraints, "".join(f"{line}\n" for line in plan.constraints))

        def install(*arguments: str) -> Callable[[], None]:
            return lambda: run_installer(installer, [*installer.install, *arguments])

        works = [(s.label, install("--constraint", str(constraints), *s.arguments)) for s in plan.steps]
        if plan.placeholder:
            works.append(("a placeholder for torchaudio", install("--no-deps", str(write_wheel(Path(folder))))))
        for number, (label, work) in enumerate(works, start=1):
            print(f"[{number}/{len(works)}] {label} ...", end=" ", flush=True)
            started = time.monotonic()
            try:
                work()
            except SetupError:
                print("failed", flush=True)
                raise
            print(f"{time.monotonic() - started:.1f} s", flush=True)


def check_result(plan: SetupPlan, extras: Sequence[str], installer: Installer) -> None:
    """Raises SetupError when torch is another one now, or when a torchvision came that does not fit it."""
    found = installed_packages()
    if found.get("torch") != plan.torch:
        raise SetupError(
            f"torch was {plan.torch} and is now {found.get('torch', 'gone')}; pip install torch=={plan.torch} restores it"
        )
    if "vision" in extras:
        error = imports("torchvision")
        if error is not None:
            run_installer(installer, [*installer.uninstall, "torchvision"])
            raise SetupError(
                f"vision: torchvision {found.get('torchvision')} does not fit torch {plan.torch} ({error}) and was removed "
                "again; install the build from the index that torch came from"
            )


def parser() -> argparse.ArgumentParser:
    """The options of `dataflex-cli setup`."""
    known = "\n".join(f"  {name:<13} {text}" for name, text in EXTRAS.items())
    result = OneLineParser(
        prog="dataflex-cli setup",
        description=__doc__,
        epilog=f"extras:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--extras", default="", metavar="A,B", help="what else to install; see below")
    result.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    return result


def run(arguments: Sequence[str]) -> int:
    """Install what the command line asks for -> 0. Raises SetupError."""
    options = parser().parse_args(arguments)
    extras = [name.strip() for name in options.extras.split(",") if name.strip()]
    try:
        requires = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise SetupError(f"{PACKAGE} is not installed itself; in its folder: pip install .") from error
    installer = find_installer()
    plan = make_plan(requires, installed_packages(), extras, torchaudio_works=imports("torchaudio") is None)
    if options.dry_run:
        print("\n".join(script(plan, installer) or ["# nothing to do"]))
        return 0
    for note in plan.notes:
        print(f"note: {note}")
    carry_out(plan, installer)
    check_result(plan, extras, installer)
    print(
        f"everything {'was' if plan.is_empty else 'is'} installed{' already' * plan.is_empty}; torch {plan.torch} stays"
    )
    return 0
