"""Plug-ins that raise, variables of a launcher that are wrong, and disks that refuse: one line each."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import yaml

from dataflex_mega.config.environment import check_environment
from dataflex_mega.errors import UserError
from tests.support import corpus, runs
from tests.support.bad_inputs import MIX, WEIGHT, check_line, check_run, llamafactory, no_model  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("surroundings"))


HEAD = """
from dataclasses import dataclass
import torch
from dataflex_mega.algorithms.base import Mixer, Selector, Weighter
from dataflex_mega.plugins import register_mixer
from transformers import TrainerCallback
"""
METHOD = "@dataclass\nclass Mine(Mixer):\n    def proportions(self, c, r): ...\n"
NAME = "plug_{}"
CLASS = {"mixer": "plug_{}:Mine"}
# name -> (source of the module, keys in which {} is its number, words)
PLUG_INS = {
    "raises at import": ("raise RuntimeError('no licence')", {"plugins": [NAME]}, ["plugins", "no licence"]),
    "asserts at import": ("assert False", {"plugins": [NAME]}, ["plugins", "AssertionError"]),
    "a key error at import": ("{}['a']", {"plugins": [NAME]}, ["plugins", "KeyError"]),
    "leaves at import": ("import sys; sys.exit(0)", {"plugins": [NAME]}, ["plugins", "sys.exit(0)"]),
    "no Python": ("def (:", {"plugins": [NAME]}, ["plugins", "SyntaxError", "line 1"]),
    "no Python of a class": ("def (:", CLASS, ["mixer", "SyntaxError"]),
    "imports what is missing": ("import surely_missing_xyz", {"plugins": [NAME]}, ["plugins", "surely_missing_xyz"]),
    "imports DataFlex": ("import dataflex.core", {"plugins": [NAME]}, ["plugins", "coming-from.md"]),
    "raises in recursion": ("def f(): f()\nf()", {"plugins": [NAME]}, ["plugins", "RecursionError"]),
    "a path": ("", {"plugins": ["../plug_{}"]}, ["plugins", "../plug_", "module"]),
    "a file": ("", {"plugins": ["plug_{}.py"]}, ["plugins", "without .py"]),
    "nothing": ("", {"plugins": [""]}, ["plugins"]),
    "no such module": ("", {"plugins": ["plug_x{}"]}, ["plugins", "plug_x"]),
    "no such class": ("class Mina: pass", CLASS, ["mixer", "'Mine'", "Mina"]),
    "no class": ("Mine = 3", CLASS, ["mixer", "Mine"]),
    "another class": ("class Mine: pass", CLASS, ["mixer", "Mixer"]),
    "no dataclass": ("class Mine(Mixer):\n    def proportions(self, c, r): ...", CLASS, ["mixer", "@dataclass"]),
    "abstract": ("@dataclass\nclass Mine(Mixer): pass", CLASS, ["mixer", "proportions"]),
    "made of nothing": (
        METHOD + "    def __post_init__(self): raise OSError('gone')",
        CLASS, ["mixer", "gone"],
    ),
    "made with a bug": (
        METHOD + "    def __post_init__(self): None.x",
        CLASS, ["mixer", "AttributeError"],
    ),
    "an unknown annotation": (
        METHOD + "    a: 'Nowhere' = 1", CLASS, ["mixer", "Nowhere"],
    ),
    "a callback at import": ("raise RuntimeError('cb')", {"callbacks": ["plug_{}:Mine"]}, ["callbacks", "cb"]),
    "a callback that leaves": ("import sys; sys.exit(3)", {"callbacks": ["plug_{}:Mine"]}, ["callbacks", "sys.exit(3)"]),
    "a callback without Python": ("def (:", {"callbacks": ["plug_{}:Mine"]}, ["callbacks", "SyntaxError"]),
    "a callback of no class": ("Mine = 3", {"callbacks": ["plug_{}:Mine"]}, ["callbacks", "TrainerCallback"]),
    "a callback with arguments": (
        "class Mine(TrainerCallback):\n    def __init__(self, x): ...", {"callbacks": ["plug_{}:Mine"]}, ["callbacks", "x"],
    ),
    "a callback without a class": ("", {"callbacks": ["plug_{}"]}, ["callbacks", "module:Class"]),
    "a name that is taken": (
        "@register_mixer('odm')\n@dataclass\nclass Mine(Mixer):\n    def proportions(self, c, r): ...",
        {"plugins": [NAME]}, ["odm"],
    ),
    "a name nobody registers": ("", {"plugins": [NAME], "mixer": "curriculum"}, ["mixer", "curriculum"]),
}  # fmt: skip


def filled(value, number):
    """The keys of a case with the number of its module."""
    if isinstance(value, dict):
        return {key: filled(inner, number) for key, inner in value.items()}
    return [filled(inner, number) for inner in value] if isinstance(value, list) else value.replace("{}", str(number))


@pytest.mark.parametrize("name", PLUG_INS)
@pytest.mark.usefixtures("no_model")
def test_code_of_the_configuration_is_named_when_it_raises(folder, name, tmp_path, monkeypatch):
    from dataflex_mega import plugins

    source, keys, words = PLUG_INS[name]
    number = list(PLUG_INS).index(name)
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"plug_{number}.py").write_text(source if "def (" in source else HEAD + source)
    if "SyntaxError" in words and "line 1" in words:
        (tmp_path / f"plug_{number}.py").write_text(source)
    check_run(folder, f"plug-in {name}", {**MIX, **filled(keys, number)}, words)


def test_code_that_raises_while_training_is_named_with_its_file_and_the_trace_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = HEAD + "@dataclass\nclass Late(Mixer):\n    def proportions(self, c, r): return 1 / 0"
    (tmp_path / "plug_late.py").write_text(source)
    line = check_run(folder, "late", {**MIX, "mixer": "plug_late:Late", "max_steps": 2}, [], expected=1)
    log = folder / "out" / "late" / "error.log"
    assert "ZeroDivisionError" in line and str(log) in line and "plug_late.py" in log.read_text()


# -- variables ---------------------------------------------------------------------------------------------------------

GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ENVIRONMENTS = {
    "size in words": ({"WORLD_SIZE": "x"}, "WORLD_SIZE: .*'x'"),
    "size of nothing": ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
    "size zero": ({"WORLD_SIZE": "0"}, "WORLD_SIZE: .*>= 1"),
    "size alone": ({"WORLD_SIZE": "4"}, "WORLD_SIZE: 4 without RANK"),
    "rank alone": ({"RANK": "0"}, "WORLD_SIZE: missing beside RANK=0"),
    "rank without an address": ({**GROUP, "MASTER_ADDR": ""}, "MASTER_ADDR: missing"),
    "rank without a port": ({k: v for k, v in GROUP.items() if k != "MASTER_PORT"}, "MASTER_PORT: missing"),
    "rank in words": ({**GROUP, "RANK": "first"}, "RANK: .*'first'"),
    "negative rank": ({**GROUP, "RANK": "-1"}, "RANK: .*'-1'"),
    "rank above the size": ({**GROUP, "RANK": "2"}, "RANK: must be below WORLD_SIZE"),
    "local rank in words": ({**GROUP, "LOCAL_RANK": "a"}, "LOCAL_RANK"),
    "local rank above the size": ({**GROUP, "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK: must be below"),
    "port in words": ({**GROUP, "MASTER_PORT": "http"}, "MASTER_PORT"),
    "port too large": ({**GROUP, "MASTER_PORT": "70000"}, "MASTER_PORT: must be <= 65535"),
    "digits of another script": ({**GROUP, "RANK": "\u0661"}, "RANK"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_wrong_variable_is_named(name):
    environment, words = ENVIRONMENTS[name]
    with pytest.raises(UserError, match=words):
        check_environment(environment)
    check_environment({**GROUP, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
    check_environment({})


@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", "x"), ("RANK", "0"), ("RANK", "x")])
def test_a_run_with_a_wrong_variable_ends_in_one_line(folder, variable, value, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    check_run(folder, f"variable {variable}", WEIGHT, [variable])


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["/proc/dataflex", "ROOT/data/code.jsonl", "/dev/null/out"])
def test_a_place_that_cannot_be_written_is_named(folder, where):
    check_run(folder, "place", {**MIX, "output_dir": where}, ["output_dir", where.replace("ROOT", str(folder))])


def test_files_that_may_not_grow_end_in_one_line(folder):
    """As on a full disk: what does not fit is a checkpoint, then the model."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        for keys in ({"save_strategy": "steps", "save_steps": 1}, {}):
            check_run(folder, f"small {len(keys)}", {**MIX, "max_steps": 2, **keys}, ["output_dir", "trace in"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_named_with_the_file(folder, small_disk):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "output_dir": str(small_disk / "out")}
    config = runs.base(folder, **{**MIX, **keys})
    (small_disk / "out").mkdir()
    line = check_line(*runs.train_here(config), ["output_dir", str(small_disk)])
    assert "space" in line or "written whole" in line


def test_a_picture_that_cannot_be_drawn_is_a_note(folder, monkeypatch):
    from dataflex_mega import plots

    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "_plot_proportions", broken)
    config = runs.base(folder, output_dir=str(folder / "out" / "picture"), plot_loss=True, **{**MIX, "max_steps": 2})
    status, stderr = runs.train_here({**config, "logging_steps": 1})
    assert status == 0 and "note: plots: not drawn: RuntimeError: no fonts" in stderr and "done: " in stderr


def test_the_torchrun_of_the_commands_adds_no_trace(folder):
    """Two real processes: one line, and the status of the processes."""
    config = runs.base(folder, output_dir=str(folder / "out" / "launched"), **{**MIX, "mixer": "odn"})
    (folder / "launched.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "dataflex_mega.distributed.torchrun", "--nproc_per_node=2", "--master_port=29871"]
    done = subprocess.run(
        [*launcher, "-m", "dataflex_mega.train", str(folder / "launched.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        line for line in done.stderr.splitlines() if line.startswith("error: mixer: no mixer is called 'odn'")
    ]
