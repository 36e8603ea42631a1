"""What `dataflex-cli setup` would do, from the packages that are installed."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from dataflex_mega.setup.packages import (
    EXTRAS,
    LLAMAFACTORY,
    LLAMAFACTORY_VERSIONS,
    last_error,
    llamafactory_requirements,
)
from dataflex_mega.setup.plan import SetupPlan, make_plan
from dataflex_mega.setup.versions import (
    Requirement,
    SetupError,
    read_requirement,
    requirement_name,
    version_fits,
)

ROOT = Path(__file__).resolve().parents[3]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRES = [
    "torch>=2.8", "transformers<=5.6.0,>=4.55", "peft<=0.18.1,>=0.18", "PyYAML",
    'llamafactory<0.10,>=0.9.5; extra == "llamafactory"', 'fastapi>=0.110; extra == "serve"',
    'uvicorn>=0.29; extra == "serve"', "gradio<=5.50.0,>=4.38; extra == 'webui'", 'torchvision; extra == "vision"',
    'pytest>=8; extra == "dev"',
]  # fmt: skip
BASE = {"torch": "2.13.0+cpu", "transformers": "5.6.0", "peft": "0.18.1", "pyyaml": "6.0.4"}


def plan(installed: dict[str, str], *extras: str, torchaudio_works: bool = True) -> SetupPlan:
    return make_plan(REQUIRES, installed, extras, torchaudio_works)


def arguments(made: SetupPlan) -> list[tuple[str, ...]]:
    return [step.arguments for step in made.steps]


def test_after_the_wheel_llamafactory_is_missing_and_comes_without_its_dependencies() -> None:
    made = plan(BASE, torchaudio_works=False)
    assert arguments(made) == [("--no-deps", "llamafactory==0.9.5")]
    assert made.placeholder and not made.is_empty


def test_a_second_run_finds_nothing_to_do() -> None:
    made = plan({**BASE, "llamafactory": "0.9.5", "torchaudio": "2.4.0+placeholder"})
    assert made.is_empty and made.steps == ()
    assert not any(line.startswith("torchaudio") for line in made.constraints)
    extras = {**BASE, "llamafactory": "0.9.5", "fastapi": "0.165.0", "uvicorn": "0.54.0"}
    assert plan(extras, "serve").is_empty


def test_torch_and_what_was_built_for_it_are_constrained_to_what_is_there() -> None:
    made = plan({**BASE, "torchvision": "0.28.0+cpu", "torchaudio": "2.11.0+cpu"}, "serve")
    assert made.torch == "2.13.0+cpu"
    assert made.constraints == ("torch==2.13.0+cpu", "torchvision==0.28.0+cpu", "torchaudio==2.11.0+cpu")
    assert not any(word.startswith("torch") for step in made.steps for word in step.arguments)


def test_what_is_missing_or_out_of_range_is_installed_again() -> None:
    damaged = {**BASE, "transformers": "5.8.0", "llamafactory": "0.9.4"}
    del damaged["pyyaml"]
    assert arguments(plan(damaged)) == [("transformers<=5.6.0,>=4.55", "pyyaml"), ("--no-deps", LLAMAFACTORY)]


def test_extras_are_one_step_of_what_they_lack() -> None:
    ready = {**BASE, "llamafactory": "0.9.5", "uvicorn": "0.54.0", "gradio": "6.0.0"}
    made = plan(ready, "webui", "serve")
    limited = ("transformers<=5.6.0,>=4.55", "peft<=0.18.1,>=0.18")  # else pip lets an extra's packages replace them
    assert arguments(made) == [("fastapi>=0.110", "gradio<=5.50.0,>=4.38", *limited)]
    assert made.steps[0].label == "extras serve, webui"


def test_the_extra_llamafactory_never_brings_what_would_replace_torch() -> None:
    made = plan(BASE, "llamafactory")
    assert arguments(made) == [("--no-deps", LLAMAFACTORY)]
    assert "pip install 'dataflex_mega[llamafactory]'" in made.notes[0]


@pytest.mark.parametrize(
    ("installed", "extras", "message"),
    [
        ({**BASE, "torch": "2.7.1"}, (), "torch 2.7.1 is installed, >=2.8 is needed; setup never changes torch"),
        ({"transformers": "5.6.0"}, (), "torch is not installed; install the build for this machine first"),
        (BASE, ("serv",), r"--extras: no extra 'serv' \(did you mean 'serve'\?\)"),
        (BASE, ("dev",), "--extras: no extra 'dev'; there is llamafactory, serve, vision, webui"),
    ],
)
def test_what_it_cannot_do_is_one_line(installed: dict[str, str], extras: tuple[str, ...], message: str) -> None:
    with pytest.raises(SetupError, match=f"^{message}"):
        plan(installed, *extras)


# -- the metadata of the wheel -----------------------------------------------------------------------------------------


def test_the_wheel_asks_for_nothing_that_would_replace_torch() -> None:
    names = {requirement_name(line) for line in PROJECT["dependencies"]}
    assert not names & {"torchvision", "torchaudio", "llamafactory", "gradio", "modelscope", "triton"}
    torch = next(line for line in PROJECT["dependencies"] if requirement_name(line) == "torch")
    assert torch == "torch>=2.8"  # no upper bound, no exact version
    for line in metadata.requires("dataflex_mega") or []:
        requirement = read_requirement(line)
        assert requirement.extra or requirement.name in names | {
            "llamafactory"
        }  # an environment made before may have it


def test_every_extra_is_explained_and_exists() -> None:
    assert {*EXTRAS, "dev", "docs"} == set(PROJECT["optional-dependencies"])
    assert {"llamafactory", "serve", "webui", "megatron", "quant", "vision", "trackers"} <= set(EXTRAS)


def test_what_training_with_llamafactory_needs_is_in_the_wheels_dependencies_in_its_ranges() -> None:
    own = {r.name: r.bounds for r in map(read_requirement, PROJECT["dependencies"])}
    for line in llamafactory_requirements(metadata.requires("llamafactory") or []):
        needed = read_requirement(line)
        assert needed.name in own, f"llamafactory asks for {needed.text}: a dependency, or in NOT_NEEDED"
        for limit in re.findall(r"<=?([\d.]+)", needed.bounds):
            assert limit in own[needed.name], f"llamafactory asks for {needed.text}, we for {own[needed.name]}"


def test_the_pinned_llamafactory_is_one_that_is_accepted() -> None:
    pinned = read_requirement(LLAMAFACTORY)
    extra = read_requirement(PROJECT["optional-dependencies"]["llamafactory"][0])
    assert pinned.bounds.startswith("==") and version_fits(pinned.bounds[2:], LLAMAFACTORY_VERSIONS)
    assert extra.bounds == LLAMAFACTORY_VERSIONS


# -- lines of metadata and of pip --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("PyYAML>=6 ; python_version < '4'", Requirement("pyyaml", ">=6", "")),
        ("sse_starlette", Requirement("sse-starlette", "", "")),
        ("megatron.core[dev]==1", Requirement("megatron-core", "==1", "")),
        ("torch (>=2.4, <3)", Requirement("torch", ">=2.4,<3", "")),
        ('gradio>=4.38,<=5.50.0; extra == "webui"', Requirement("gradio", ">=4.38,<=5.50.0", "webui")),
    ],
)
def test_a_requirement_line(line: str, expected: Requirement) -> None:
    assert read_requirement(line) == expected


def test_what_is_no_requirement_is_refused() -> None:
    with pytest.raises(SetupError, match="not a requirement"):
        read_requirement(">=1")


def test_of_llamafactory_only_what_training_needs_is_installed() -> None:
    requires = ["torch>=2.4", "torchvision", "torchaudio>=2", "gradio<6", "peft<=0.18", "ray; extra == 'ray'", "Pillow"]
    assert llamafactory_requirements(requires) == ["peft<=0.18", "Pillow"]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("ERROR: Could not find x\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
        ("error: externally-managed\n\nThis environment\nhint: see PEP 668\n", "error: externally-managed"),
        ("  × No solution found\n  ╰─▶ Because x was not found\n", "╰─▶ Because x was not found"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_the_line_by_which_an_installer_says_why_it_failed(output: str, line: str) -> None:
    assert last_error(output) == line
