"""Build the wheel, install it into an empty environment beside a CPU torch, and use it as a user without a checkout would.

    python tools/wheel_test.py [--folder FOLDER] [--torch torch==2.13.0] [--uv] [--extras serve] [--steps 40]

Steps: venv and torch; the wheel; the one line that names `dataflex-cli setup`, from the commands that need it; setup, twice;
torch unchanged, and the MB that were added; the demo in an empty folder; perplexity, export, and chat with a typed question;
with the extra serve one request to `api`. Needs a package index and 2 GB in FOLDER; takes minutes. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_MB = 2500  # beside torch
NOT_SET_UP = "llamafactory is not installed: run dataflex-cli setup"
PORT = 8765
WAIT_S = 600  # for the server to answer; on an idle machine it takes 20


class StepFailed(Exception):
    """A step did not do what it should; the message says which."""


@dataclass
class Environment:
    """A virtual environment and an empty folder to work in."""

    folder: Path
    uv: bool
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def create(self) -> None:
        """Make both, without anything of the calling environment."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "work").mkdir(parents=True)
        if self.uv:
            run([uv_program(), "venv", "--quiet", str(self.folder / "venv")])
        else:
            run([sys.executable, "-m", "venv", str(self.folder / "venv")])
        self.variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(self.python.parent), os.environ["PATH"]])
        self.variables |= {**offline, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PATH": path}

    def install(self, *arguments: str) -> None:
        """`pip install`, or uv's, of a user who has nothing else."""
        if self.uv:
            run([uv_program(), "pip", "install", "--quiet", "--python", str(self.python), *arguments])
        else:
            run([str(self.python), "-m", "pip", "install", "--quiet", "--progress-bar", "off", *arguments])

    def cli(self, *arguments: str, typed: str = "", status: int = 0) -> str:
        """`dataflex-cli` in the empty folder -> what it printed. Raises StepFailed for another exit status."""
        command = [str(self.python.parent / "dataflex-cli"), *arguments]
        return run(command, self.folder / "work", self.variables, typed, status)

    def version(self, name: str) -> str:
        """The installed version of a package."""
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        return run([str(self.python), "-c", code]).strip()

    def megabytes(self) -> float:
        """The size of what is installed."""
        files = (path for path in (self.folder / "venv").rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files) / 2**20


def uv_program() -> str:
    """The path of uv. Raises StepFailed without one."""
    found = shutil.which("uv")
    if found is None:
        raise StepFailed("--uv: no uv on the path; pip install uv")
    return found


def run(
    command: Sequence[str],
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
    typed: str = "",
    status: int = 0,
) -> str:
    """Run a command -> what it printed on both streams. Raises StepFailed for another exit status."""
    done = subprocess.run(
        command, cwd=cwd, env=variables, input=typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != status:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise StepFailed(f"{' '.join(command)}\nended with status {done.returncode}, not {status}:\n{tail}")
    return done.stdout


def expect(what: str, holds: bool, found: str = "") -> None:
    """Raises StepFailed when something does not hold."""
    if not holds:
        raise StepFailed(f"{what}: {found}")


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, so that none of its files stay in the checkout -> its path."""
    copy = folder / "source"
    names = ("dataflex_mega", "pyproject.toml", "README.md", "LICENSE")
    copy.mkdir(parents=True)
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)])
    return next(folder.glob("dataflex_mega-*.whl"))


def check_one_line_without_setup(env: Environment) -> None:
    """Every command that needs LLaMA-Factory says in one line what is to be done."""
    work = env.folder / "work"
    (work / "run.yaml").write_text("model_name_or_path: m\nstage: pt\ndataset: d\noutput_dir: o\nmixer: odm\n")
    lists = (["train", "run.yaml"], ["reference", "run.yaml"], ["demo"], ["perplexity", "--config", "run.yaml"])
    for arguments in (*lists, ["export", "run.yaml"], ["chat", "run.yaml"]):
        heard = env.cli(*arguments, status=2).strip().splitlines()
        expect(" ".join(arguments), heard == [f"error: {NOT_SET_UP}"], str(heard))
    env.cli("env", status=1)
    for arguments in (["help"], ["version"], ["components", "mixer"]):
        env.cli(*arguments)
    (work / "run.yaml").unlink()


def check_demo(env: Environment, steps: int) -> None:
    """Train in the empty folder, then measure, export and talk to the result."""
    printed = env.cli("demo", "demo", f"max_steps={steps}", "save_steps=20", "eval_steps=20", "logging_steps=10")
    expect("demo", f"step {steps}/{steps}" in printed and "done:" in printed, printed[-2000:])
    print("   ", next(line for line in printed.splitlines() if f"step {steps}/{steps}" in line).strip())
    heard = env.cli("perplexity", "--config", "demo/demo.yaml")
    print("   ", next(line for line in heard.splitlines() if line.startswith("overall")))
    keys = ["model_name_or_path: demo/output", "template: qwen", "trust_remote_code: false"]
    work = env.folder / "work"
    (work / "export.yaml").write_text("\n".join([*keys, "export_dir: exported", "export_size: 1", ""]))
    env.cli("export", "export.yaml")
    expect("export", (work / "exported" / "model.safetensors").is_file(), "no model.safetensors")
    (work / "chat.yaml").write_text("\n".join([*keys, "infer_backend: huggingface", "max_new_tokens: 8", ""]))
    heard = env.cli("chat", "chat.yaml", typed="Hello\nexit\n")
    expect("chat", "Assistant:" in heard, heard[-2000:])


def check_api(env: Environment) -> None:
    """Start the server, ask for one completion, stop it."""
    command = [str(env.python.parent / "dataflex-cli"), "api", "chat.yaml"]
    variables = {**env.variables, "API_PORT": str(PORT), "API_HOST": "127.0.0.1"}
    log = env.folder / "api.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=env.folder / "work", env=variables, stdout=stream, stderr=stream)
    try:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            expect("api", server.poll() is None, log.read_text()[-2000:])
            time.sleep(1)
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
            except OSError:
                continue
            expect("api", answer["choices"][0]["message"]["role"] == "assistant", str(answer))
            return
        raise StepFailed(f"api: no answer within {WAIT_S} s:\n{log.read_text()[-2000:]}")
    finally:
        server.terminate()
        server.wait()


class Steps:
    """Prints what is done and how long it took."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """A line with the seconds since the last one."""
        now = time.monotonic()
        print(f"{now - self.started:6.1f} s  {text}", flush=True)
        self.started = now


def test_wheel(env: Environment, torch: str, extras: list[str], steps: int) -> None:
    """All steps, one line each. Raises StepFailed."""
    told = Steps()
    wheel = build_wheel(env.folder.with_name(env.folder.name + "-wheel"))
    told.say(f"built {wheel.name}, {wheel.stat().st_size / 2**10:.0f} KiB")
    env.create()
    env.install(torch)
    before, torch_mb = env.version("torch"), env.megabytes()
    told.say(f"empty environment with torch {before}: {torch_mb:.0f} MB")
    env.install(str(wheel))
    told.say(f"the wheel and what it asks for: {env.megabytes() - torch_mb:.0f} MB more")
    check_one_line_without_setup(env)
    told.say("without setup: one line from each command that needs it")
    print(env.cli("setup", "--dry-run"), end="")
    env.cli("setup")
    told.say("dataflex-cli setup")
    again = env.cli("setup")
    expect("setup again", again.startswith("everything was installed already"), again)
    added = env.megabytes() - torch_mb
    expect("torch", env.version("torch") == before, f"{before} became {env.version('torch')}")
    expect("size", added <= MOST_MB, f"{added:.0f} MB beside torch, {MOST_MB} allowed")
    told.say(f"torch {before} unchanged; {added:.0f} MB beside it, {MOST_MB} allowed")
    env.cli("env")
    check_demo(env, steps)
    told.say("demo, perplexity, export, chat")
    if extras:
        env.cli("setup", "--extras", ",".join(extras))
        expect("torch", env.version("torch") == before, f"{before} became {env.version('torch')}")
        told.say(f"extras {', '.join(extras)}: torch unchanged, {env.megabytes() - torch_mb - added:.0f} MB more")
    if "serve" in extras:
        check_api(env)
        told.say("api answered one request")


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 1 when a step failed, after what it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; kept (a temporary one, removed)")
    parser.add_argument("--torch", default=os.environ.get("DATAFLEX_TORCH", "torch==2.13.0"), help="what to install")
    parser.add_argument("--uv", action="store_true", help="an environment of uv, without pip")
    parser.add_argument("--extras", default="serve", help="extras to add at the end (serve)")
    parser.add_argument("--steps", type=int, default=40, help="steps of the demo (40)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch) / "test").absolute()
        shutil.rmtree(folder.with_name(folder.name + "-wheel"), ignore_errors=True)
        extras = [name for name in args.extras.split(",") if name]
        try:
            test_wheel(Environment(folder, args.uv), args.torch, extras, args.steps)
        except StepFailed as error:
            print(f"wheel_test: {error}", file=sys.stderr)
            return 1
    print("the wheel works")
    return 0


if __name__ == "__main__":
    sys.exit(main())
