"""tools/setup_env.py: what it installs and when it does so again, and the targets of the Makefile."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def setup(tool: Any) -> ModuleType:
    return tool("setup_env")


def test_an_unknown_extra_is_refused_before_anything_is_installed(
    setup: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.main(["--target", str(tmp_path / "venv"), "--extras", "dev,devv"]) == 2
    assert (
        "--extras devv: pyproject.toml has dev, docs, llamafactory, megatron, metrics, offline"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "venv").exists()


def test_a_finished_environment_is_left_alone_until_something_changes(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[list[str]] = []

    def fake_build(target: Path, project: dict[str, Any], extras: list[str]) -> None:
        target.mkdir(exist_ok=True)
        built.append(extras)

    monkeypatch.setattr(setup, "build", fake_build)
    target = ["--target", str(tmp_path / "venv"), "--extras"]
    assert [setup.main([*target, "dev"]) for _ in range(2)] == [0, 0]
    assert built == [["dev"]]
    setup.main([*target, "docs"])  # adds to what is there
    setup.main([*target, "dev"])
    assert built == [["dev"], ["dev", "docs"]]
    monkeypatch.setattr(setup, "TORCH", "torch==2.9.0")
    setup.main([*target, "dev"])
    assert built == [["dev"], ["dev", "docs"], ["dev"]]


def test_tool_settings_do_not_rebuild_but_dependencies_do(setup: ModuleType) -> None:
    project = setup.read_project()
    assert set(project) == {"project", "build-system"}
    changed = {**project, "project": {**project["project"], "dependencies": ["torch"]}}
    assert setup.content_key(project) != setup.content_key(changed)


def test_one_line_a_step_and_pips_output_only_on_failure(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = [sys.executable, "-c", "print('chatter')"]
    failing = [sys.executable, "-c", "import sys; print('why it failed', file=sys.stderr); sys.exit(3)"]
    todo = [("first", lambda: setup.run(noisy) and None), ("second", lambda: "a remark")]
    monkeypatch.setattr(setup, "steps", lambda *_: todo)
    setup.build(tmp_path, {}, [])
    out = capsys.readouterr().out
    assert re.fullmatch(
        r"\[1/2\] first \.\.\. \d+\.\d s\n\[2/2\] second \.\.\. \d+\.\d s \(a remark\)\nenv.*ready after .*\n", out
    )

    todo.append(("third", lambda: setup.run(failing)))
    assert setup.main(["--target", str(tmp_path / "venv"), "--extras", "dev"]) == 1
    captured = capsys.readouterr()
    assert captured.out.endswith("[3/3] third ... failed\n") and "why it failed" in captured.err
    assert not (tmp_path / "venv" / ".dataflex_stamp").exists()


def test_the_placeholder_is_installed_from_a_wheel_and_only_where_needed(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def fake_run(command: list[str]) -> str:
        assert command[-1].endswith("-py3-none-any.whl") and Path(command[-1]).is_file()
        calls.append(command)
        return ""

    monkeypatch.setattr(setup, "run", fake_run)
    monkeypatch.setattr(setup, "imports", lambda python, module: False)
    assert setup.install_placeholder(Path("python")) == "placeholder" and len(calls) == 1
    assert not Path(calls[0][-1]).exists()
    monkeypatch.setattr(setup, "imports", lambda python, module: True)
    assert setup.install_placeholder(Path("python")) == "importable" and len(calls) == 1


def test_llamafactory_comes_without_its_dependencies_and_torch_first(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(setup, "run", lambda command: calls.append(command) or "")
    monkeypatch.setattr(setup, "imports", lambda python, module: True)
    for _, work in setup.steps(tmp_path / "venv", setup.read_project(), ["dev"]):
        work()
    installs = [[word for word in call if word not in setup.PIP_INSTALL] for call in calls if "pip" in call]
    assert installs[0][1:] == [setup.TORCH]
    assert ["--no-deps", "llamafactory==0.9.5"] in [call[1:] for call in installs]
    everything = next(call for call in installs if "peft>=0.18,<=0.18.1" in call)
    assert everything[1] == setup.TORCH and any(word.startswith("pytest") for word in everything)
    assert not any(word.startswith(("torchvision", "torchaudio", "llamafactory")) for word in everything)


def test_it_starts_with_a_python_that_has_nothing_installed(root: Path) -> None:
    command = [sys.executable, "-S", "-I", str(root / "tools" / "setup_env.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--extras" in done.stdout, done.stderr


def test_make_lists_every_target(root: Path) -> None:
    listed = subprocess.run(["make", "-s"], cwd=root, capture_output=True, text=True, check=True).stdout
    makefile = (root / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert re.findall(r"^  make (\S+)", listed, re.MULTILINE) == phony.group(1).split()


@pytest.mark.parametrize(("checks", "tests", "expected"), [(0, 0, 0), (2, 0, 2), (0, 2, 2), (2, 3, 3)])
def test_ci_runs_all_three_and_passes_a_failure_on(
    root: Path, tmp_path: Path, checks: int, tests: int, expected: int
) -> None:
    fake = tmp_path / "make"
    fake.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/log\ncase "$*" in *checks) exit {checks};; *) exit {tests};; esac\n'
    )
    fake.chmod(0o755)
    done = subprocess.run([root / ".ci" / "run"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path)
    assert done.returncode == expected
    assert [line.split()[-1] for line in (tmp_path / "log").read_text().splitlines()] == ["checks", "test", "test-all"]
