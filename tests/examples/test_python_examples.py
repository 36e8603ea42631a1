"""Every script in examples/python runs as it is, on small data under the demo's names; LESS on two processes too."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from unittest import mock

import pytest

from tests.support import corpus, runs

SCRIPTS = sorted((corpus.ROOT / "examples" / "python").glob("*.py"))
DOMAINS = {"demo_c4": "prose", "demo_wiki": "prose", "demo_python": "code", "demo_python_validation": "code"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = corpus.write(tmp_path_factory.mktemp("python_examples"))
    data = root / "data"
    info = json.loads((data / "dataset_info.json").read_text())
    for name, real in DOMAINS.items():
        shutil.copy(data / f"{real}.jsonl", data / f"{name}.jsonl")
        info[name] = {**info[real], "file_name": f"{name}.jsonl"}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return root


def run_script(config):
    """What a script prints when it is typed with these arguments."""
    printed = io.StringIO()
    argv = mock.patch.object(sys, "argv", [config["script"], *config["arguments"]])
    with argv, contextlib.redirect_stdout(printed):
        runpy.run_path(config["script"], run_name="__main__")
    return printed.getvalue()


def test_there_are_four_scripts_and_the_readme_names_them():
    readme = (corpus.ROOT / "examples" / "python" / "README.md").read_text()
    assert len(SCRIPTS) == 4 and all(f"`{script.name}`" in readme for script in SCRIPTS)


def arguments(folder, script):
    few_steps = ["6"] if script.stem in ("own_mixer", "hf_trainer") else []
    return [] if script.stem == "plain_loop" else [str(folder / "data"), str(folder / "model"), *few_steps]


def test_each_script_runs(folder):
    configs = [{"script": str(script), "arguments": arguments(folder, script)} for script in SCRIPTS]
    for script, printed in zip(SCRIPTS, runs.train_many(1, configs, run=run_script, plain=True), strict=True):
        expected = (
            "the best rows:" if script.stem == "less_scores" else "from easy" if script.stem == "plain_loop" else ""
        )
        assert (expected or "proportions: {'demo_c4':") in printed, f"{script.name}: {printed}"


def test_less_scores_are_the_same_on_two_processes(folder):
    script = next(script for script in SCRIPTS if script.stem == "less_scores")
    config = {"script": str(script), "arguments": arguments(folder, script)}
    printed = [runs.train_many(world, [config], run=run_script, plain=world == 1)[0] for world in (1, 2)]
    assert printed[0] == printed[1] and "80 scores" in printed[0]
