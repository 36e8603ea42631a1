"""Build the virtual environment that `make demo`, `make test` and CI use. Standard library only.

Why this is not one `pip install -e .`: LLaMA-Factory depends on torchvision and torchaudio. The wheels that PyPI serves
for Linux are CUDA builds, which cannot be imported beside a CPU build of torch, and a torchvision that is present but
broken makes every `transformers` model class unimportable. Text training needs neither. So torch comes first, then
LLaMA-Factory without its dependencies, then those of its dependencies that training uses, and last a torchaudio
placeholder where no working torchaudio exists (LLaMA-Factory imports the name at module level). The same steps serve a
machine with GPUs: there the torch wheel is a CUDA build, and a working torchvision/torchaudio may be added by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = os.environ.get("DATAFLEX_TORCH", "torch==2.13.0")
# Not imported on the training path (the first two cannot be, beside a CPU torch): chat servers, web UI, other hubs.
NOT_NEEDED = {
    "torchvision", "torchaudio", "torch", "gradio", "modelscope", "fastapi", "uvicorn", "sse-starlette", "fire", "tyro",
    "tiktoken", "torchdata", "hf-transfer", "einops", "av", "librosa",
}  # fmt: skip


def requirement_name(requirement: str) -> str:
    """`PyYAML>=6 ; python_version < "4"` -> `pyyaml`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def llamafactory_requirements(python: Path) -> list[str]:
    """What the installed llamafactory asks for, less what text training never imports and less its extras."""
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('llamafactory') or []))"
    lines = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "extra ==" not in line and requirement_name(line) not in NOT_NEEDED]


def imports(python: Path, module: str) -> bool:
    """Whether `module` can be imported there (a broken binary wheel raises OSError or RuntimeError, not ImportError)."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def build(target: Path, extras: list[str]) -> None:
    """Create `target` and install the project into it in editable mode. Raises CalledProcessError if pip fails."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if not (target / "bin" / "python").exists():
        venv.create(target, with_pip=True, symlinks=True)
    python = target / "bin" / "python"

    def pip(*args: str) -> None:
        print("+ pip install", *args, flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--progress-bar", "off", *args], check=True)

    pip(TORCH)
    llamafactory = next(r for r in project["dependencies"] if requirement_name(r) == "llamafactory")
    pip("--no-deps", llamafactory)
    wanted = [r for r in project["dependencies"] if requirement_name(r) not in {"torch", "llamafactory"}]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    pip(TORCH, *wanted, *llamafactory_requirements(python), "setuptools>=77")
    if not imports(python, "torchaudio"):
        pip("--no-deps", "--no-build-isolation", str(ROOT / "tools" / "torchaudio_placeholder"))
    pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))


def stamp_of(extras: list[str]) -> str:
    """Changes when anything that decides the environment's content does."""
    digest = hashlib.sha256(" ".join([TORCH, str(ROOT), *extras]).encode())
    for name in ("pyproject.toml", "tools/setup_env.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / ".venv", help="where the environment goes")
    parser.add_argument("--extras", default="dev", help="comma-separated extras of pyproject.toml (default: dev)")
    args = parser.parse_args()
    if sys.version_info < (3, 11):
        sys.exit(f"setup_env: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    extras = [e for e in args.extras.split(",") if e]
    stamp_file, stamp = args.target / ".dataflex_stamp", stamp_of(extras)
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        return
    build(args.target, extras)
    stamp_file.write_text(stamp)
    print(f"environment ready: {args.target}", flush=True)


if __name__ == "__main__":
    main()
