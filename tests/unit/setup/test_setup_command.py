"""`dataflex-cli setup`: what it runs, prints and refuses; nothing is installed."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex_mega import cli
from dataflex_mega.setup import command, placeholder
from dataflex_mega.setup.versions import read_requirement

REQUIRES = ["torch>=2.8", "peft<=0.18.1,>=0.18", 'fastapi>=0.110; extra == "serve"', 'torchvision; extra == "vision"']
BARE = {"torch": "2.13.0+cpu", "peft": "0.18.1"}


class Machine:
    """Stands for pip and for what is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed = dict(BARE)
        self.broken = {"torchaudio"}
        self.calls: list[list[str]] = []
        self.constraints: list[list[str]] = []
        self.failure = ""
        monkeypatch.setattr(command.metadata, "requires", lambda _: REQUIRES)
        monkeypatch.setattr(command, "installed_packages", lambda: dict(self.installed))
        monkeypatch.setattr(command, "imports", lambda m: f"ImportError: no {m}" if m in self.broken else None)
        monkeypatch.setattr(command.subprocess, "run", self.run)

    def run(self, call: list[str], **_: Any) -> Any:
        self.calls.append(call)
        if self.failure:
            return SimpleNamespace(returncode=1, stdout="Looking in indexes\n", stderr=self.failure)
        if "--constraint" in call:
            self.constraints.append(Path(call[call.index("--constraint") + 1]).read_text().splitlines())
        if "uninstall" in call:
            del self.installed[call[-1]]
            return SimpleNamespace(returncode=0, stdout="", stderr="")
        for word in call[call.index("install") + 1 :]:
            if word.endswith(".whl"):
                assert zipfile.is_zipfile(word)
                self.installed["torchaudio"] = "2.4.0+placeholder"
                self.broken.discard("torchaudio")
            elif word[0].isalpha() and "/" not in word and word != "off":
                requirement = read_requirement(word)
                version = requirement.bounds.removeprefix("==") if "==" in word else "9.9"
                self.installed.setdefault(requirement.name, version)
        return SimpleNamespace(returncode=0, stdout="", stderr="")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_it_installs_what_is_missing_and_a_second_time_nothing(machine: Machine, capsys: Any) -> None:
    assert cli.main(["setup", "--extras", "serve"]) == 0
    assert capsys.readouterr().out.endswith("everything is installed; torch 2.13.0+cpu stays\n")
    assert machine.constraints == [["torch==2.13.0+cpu"]] * 2
    assert [call[:3] for call in machine.calls] == [[sys.executable, "-m", "pip"]] * 3
    assert "--no-deps" in machine.calls[0] and machine.calls[1][-2:] == ["fastapi>=0.110", "peft<=0.18.1,>=0.18"]
    assert machine.installed["torchaudio"] == "2.4.0+placeholder"
    assert cli.main(["setup", "--extras", "serve"]) == 0
    assert len(machine.calls) == 3
    assert capsys.readouterr().out == "everything was installed already; torch 2.13.0+cpu stays\n"


def test_a_dry_run_prints_a_script_and_runs_nothing(
    machine: Machine, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["setup", "--extras", "serve", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert machine.calls == [] and machine.installed == BARE
    lines = printed.splitlines()
    assert lines[0] == "printf '%s\\n' torch==2.13.0+cpu > torch_stays.txt"
    assert lines[1].endswith("--constraint torch_stays.txt --no-deps llamafactory==0.9.5")
    assert lines[2].endswith("--constraint torch_stays.txt 'fastapi>=0.110' 'peft<=0.18.1,>=0.18'")
    assert "dataflex_mega.setup.placeholder" in lines[3] and len(lines) == 4
    monkeypatch.undo()
    script = printed.replace(f"{sys.executable} -m pip", "echo pip")
    done = subprocess.check_output(["sh", "-e", "-c", script], cwd=tmp_path, text=True)
    assert done.splitlines()[-1].endswith("torchaudio-2.4.0+placeholder-py3-none-any.whl")
    assert (tmp_path / "torch_stays.txt").read_text() == "torch==2.13.0+cpu\n"


def test_a_failure_of_pip_is_one_line(machine: Machine, capsys: Any) -> None:
    machine.failure = "WARNING: retrying\nERROR: Could not find it\nERROR: No matching distribution found for x\n"
    assert cli.main(["setup"]) == 2
    heard = capsys.readouterr()
    assert heard.out.endswith("... failed\n")
    assert heard.err == "error: pip: ERROR: No matching distribution found for x\n"


def test_a_torch_that_changed_all_the_same_is_said(machine: Machine, capsys: Any, monkeypatch: Any) -> None:
    run = machine.run
    monkeypatch.setattr(
        command.subprocess, "run", lambda call, **k: (machine.installed.update(torch="2.14.1+cu130"), run(call))[1]
    )
    assert cli.main(["setup"]) == 2
    assert "torch was 2.13.0+cpu and is now 2.14.1+cu130; pip install torch==2.13.0+cpu" in capsys.readouterr().err


def test_a_torchvision_that_does_not_fit_is_removed_again(machine: Machine, capsys: Any) -> None:
    machine.broken.add("torchvision")
    assert cli.main(["setup", "--extras", "vision"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: vision: torchvision 9.9 does not fit torch 2.13.0+cpu (ImportError: no torchvision)"
    )
    assert error.count("\n") == 1 and "torchvision" not in machine.installed


def test_uv_installs_where_there_is_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command.shutil, "which", lambda name: "/bin/uv")
    found = command.find_installer("/venv/bin/python")
    assert found.install == ("/bin/uv", "pip", "install", "--quiet", "--python", "/venv/bin/python")
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    with pytest.raises(command.SetupError, match="neither pip nor uv is here; .* -m ensurepip"):
        command.find_installer()


def test_help_explains_every_extra(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["setup", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in command.EXTRAS)


# -- the torchaudio that stands in -------------------------------------------------------------------------------------


def test_the_placeholder_can_be_imported_and_says_what_it_is_on_use(tmp_path: Path) -> None:
    wheel = placeholder.write_wheel(tmp_path)
    code = "import torchaudio; print(torchaudio.__version__); torchaudio.load('x.wav')"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True)
    assert done.stdout.strip().endswith("+placeholder")
    assert done.stderr.splitlines()[-1].startswith("ImportError: torchaudio.load: only a placeholder is installed")


def test_its_wheel_is_one_that_pip_accepts(tmp_path: Path) -> None:
    wheel = placeholder.write_wheel(tmp_path)
    first = wheel.read_bytes()
    assert placeholder.write_wheel(tmp_path).read_bytes() == first
    target = ["--no-deps", "--no-index", "--quiet", "--target", str(tmp_path / "installed")]
    subprocess.run([sys.executable, "-m", "pip", "install", *target, str(wheel)], check=True)
    assert (tmp_path / "installed" / "torchaudio" / "__init__.py").is_file()
