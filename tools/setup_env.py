"""Build the virtual environment that `make demo`, `make test` and CI use. Standard library only.

These are the steps of a user who installs the wheel and calls `dataflex-cli setup`, from a checkout: torch first, then what
this package and its extras ask for, then LLaMA-Factory without its dependencies (dataflex_mega/setup/packages.py says why),
and last a torchaudio placeholder where no working torchaudio exists (LLaMA-Factory imports the name at module level). They
serve a machine with GPUs too: there the torch wheel is a CUDA build, and a working torchvision/torchaudio may be added.

DATAFLEX_TORCH names another torch, for example "torch==2.9.1" or the path of a wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataflex_mega.setup.packages import LLAMAFACTORY  # noqa: E402
from dataflex_mega.setup.placeholder import write_wheel  # noqa: E402
from dataflex_mega.setup.versions import SetupError, requirement_name  # noqa: E402

SHARED = [
    ROOT / "dataflex_mega" / "setup" / name for name in ("packages.py", "placeholder.py", "torchaudio_placeholder.py")
]
TORCH = os.environ.get("DATAFLEX_TORCH", "torch==2.13.0")
PIP_INSTALL = ("-m", "pip", "install", "--quiet", "--progress-bar", "off", "--disable-pip-version-check")


def read_project() -> dict[str, Any]:
    """The tables of pyproject.toml that decide what is installed."""
    import tomllib  # here, so that an older Python gets as far as the message that it is too old

    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {"project": tables["project"], "build-system": tables["build-system"]}


def extras_of(project: dict[str, Any], names: list[str]) -> list[str]:
    """The requirements of these extras. Raises SetupError for one that pyproject.toml does not have."""
    known = project["project"].get("optional-dependencies", {})
    for name in names:
        if name not in known:
            raise SetupError(f"--extras {name}: pyproject.toml has {', '.join(sorted(known))}")
    return [requirement for name in names for requirement in known[name]]


def run(command: list[str]) -> str:
    """Run a command -> its standard output. When it fails, a SetupError carries its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(
            f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}".rstrip()
        )
    return done.stdout


def imports(python: Path, module: str) -> bool:
    """Whether `python` can import `module`; in its own process, since a broken binary wheel may raise anything."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def install_placeholder(python: Path) -> str:
    """Install the torchaudio placeholder where nothing of that name can be imported. Returns a remark on what was done."""
    if imports(python, "torchaudio"):
        return "importable"
    with tempfile.TemporaryDirectory() as folder:
        run([str(python), *PIP_INSTALL, "--no-deps", str(write_wheel(Path(folder)))])
    return "placeholder"


def steps(target: Path, project: dict[str, Any], extras: list[str]) -> list[tuple[str, Callable[[], str | None]]]:
    """(label, function) of every step, in order; the function may return a remark."""
    python = target / "bin" / "python"
    dependencies = project["project"]["dependencies"]
    own_requirements = [r for r in dependencies if requirement_name(r) != "torch"]

    def make_venv() -> str | None:
        if python.exists():
            return "already there"
        run([sys.executable, "-m", "venv", "--clear", str(target)])
        return None

    def pip(*args: str) -> None:
        run([str(python), *PIP_INSTALL, *args])

    def install_dependencies() -> str:
        requirements = [*own_requirements, *extras_of(project, extras), *project["build-system"]["requires"]]
        pip(TORCH, *requirements)
        return f"{len(requirements)} requirements"

    return [
        (f"virtual environment in {target}", make_venv),
        (TORCH, lambda: pip(TORCH)),
        (f"{LLAMAFACTORY} without its dependencies", lambda: pip("--no-deps", LLAMAFACTORY)),
        ("everything else that training needs" + "".join(f" + {e}" for e in extras), install_dependencies),
        ("torchaudio", lambda: install_placeholder(python)),
        (f"{project['project']['name']}, editable", lambda: pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))),
    ]


def build(target: Path, project: dict[str, Any], extras: list[str]) -> None:
    """Create `target` and install the project into it in editable mode. Raises SetupError with pip's output."""
    started = time.monotonic()
    setup_steps = steps(target, project, extras)
    for number, (label, work) in enumerate(setup_steps, start=1):
        print(f"[{number}/{len(setup_steps)}] {label} ...", end=" ", flush=True)
        step_start = time.monotonic()
        try:
            remark = work()
        except SetupError:
            print("failed", flush=True)
            raise
        print(f"{time.monotonic() - step_start:.1f} s{f' ({remark})' if remark else ''}", flush=True)
    print(f"environment ready after {time.monotonic() - started:.0f} s: {target}", flush=True)


def content_key(project: dict[str, Any]) -> str:
    """A hash of everything that decides what is installed, except the choice of extras."""
    digest = hashlib.sha256(json.dumps([TORCH, str(ROOT), project], sort_keys=True).encode())
    for file in [Path(__file__), *SHARED]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def installed_extras(stamp: Path, key: str) -> list[str] | None:
    """The extras of the finished environment with this key; None without such an environment."""
    try:
        record = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    current = isinstance(record, dict) and record.get("key") == key
    return [str(extra) for extra in record["extras"]] if current else None


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 ready, 1 a step failed, 2 unsupported Python or option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / ".venv", help="folder of the environment (.venv)")
    parser.add_argument("--extras", default="dev", help="comma-separated extras of pyproject.toml (dev)")
    args = parser.parse_args(argv)
    if sys.version_info < (3, 11):  # noqa: UP036  # this script runs before anything checked requires-python
        print(f"setup_env: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    project, extras = read_project(), [e for e in args.extras.split(",") if e]
    try:
        extras_of(project, extras)
    except SetupError as error:
        print(f"setup_env: {error}", file=sys.stderr)
        return 2
    stamp, key = args.target / ".dataflex_stamp", content_key(project)
    present = installed_extras(stamp, key)
    if present is not None and set(extras) <= set(present):
        return 0
    extras = sorted(
        set(extras).union(present or [])
    )  # `make docs` adds its extras to those of `make test` and removes none
    stamp.unlink(missing_ok=True)
    try:
        build(args.target.absolute(), project, extras)
    except SetupError as error:
        print(f"setup_env: {error}", file=sys.stderr)
        return 1
    stamp.write_text(json.dumps({"key": key, "extras": extras}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
