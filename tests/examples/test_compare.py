"""`dataflex-cli compare`, `dataflex-cli regmix` and tools/eval_perplexity.py on the command line, at tiny sizes."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

SUITE = corpus.ROOT / "examples" / "compare" / "suite.yaml"
TINY = {
    "max_steps": 4, "cutoff_len": 32, "per_device_train_batch_size": 4, "warmup_steps": 1, "logging_steps": 2,
    "save_steps": 2, "max_samples": 8,
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data under the names of the demo's, so that the example runs as it is without a network."""
    root = corpus.write(tmp_path_factory.mktemp("compare"))
    info = json.loads((root / "data" / "dataset_info.json").read_text())
    for name, real in {"c4": "prose", "wiki": "code", "alpaca_text": "tables", "python": "code"}.items():
        info[f"demo_{name}"] = info[f"demo_{name}_validation"] = info[real]
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


def places(folder):
    return {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder / "data")}


def cli(*arguments):
    command = [sys.executable, "-m", "dataflex_mega", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=corpus.ROOT)


def here(*arguments):
    """The same for a command that trains nothing, in a process that has imported everything -> (status, output, errors)."""
    return runs.train_many(1, [list(map(str, arguments))], compare_here, plain=True)[0]


def compare_here(arguments):
    from dataflex_mega.cli import main

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = main(["compare", *arguments])
        except SystemExit as stop:
            status = stop.code
    return status, output.getvalue(), errors.getvalue()


def two_methods(folder, name, **changes):
    """A suite of one run and one of two phases, written to a file."""
    base = runs.base(folder, dataset="code,tables", eval_dataset="code,tables", seed=None, output_dir=None, **TINY)
    phases = [
        {"phase": "first", "mixer": "static", "max_steps": 2},
        {"phase": "second", "mixer": "static", "model_name_or_path": "${first.output_dir}"},
    ]
    suite = {
        "base": base, "methods": {"plain": {"mixer": "static"}, "twice": phases}, "seeds": [1],
        "output_dir": str(folder / name),
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(suite | changes, sort_keys=False))
    return path


def identity(path):
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


@pytest.mark.slow
def test_the_example_compares_all_its_methods(folder):
    overrides = [f"base.{key}={value}" for key, value in {**places(folder), **TINY}.items()]
    methods = list(yaml.safe_load(SUITE.read_text())["methods"])
    out = folder / "example"
    done = cli("compare", SUITE, *overrides, "seeds=[1]", f"output_dir={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == methods and len(methods) >= 5 and results["missing"] == {}
    assert [run["final"]["steps"] for run in results["runs"]] == [4] * len(methods)
    tokens = 4 * 4 * (32 - 1)  # of a row's positions all but the last have a target
    assert {run["final"]["tokens"] for run in results["runs"]} in ({tokens}, {4 * 4 * 32})
    for name in ("report.md", "results.csv", "proportions.png", "domain_loss.png", "perplexity.png"):
        assert (out / name).stat().st_size > 200


@pytest.mark.slow
def test_killed_and_given_again_it_leaves_finished_runs_alone_and_ends_as_if_it_had_not_been(folder):
    whole, interrupted = two_methods(folder, "whole"), two_methods(folder, "cut")
    assert cli("compare", whole).returncode == 0
    first = folder / "cut" / "plain" / "seed-1"
    started = folder / "cut" / "twice" / "seed-1" / "first.log"
    with subprocess.Popen(
        [sys.executable, "-m", "dataflex_mega", "compare", str(interrupted)], env=ENVIRONMENT, start_new_session=True,
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        until = time.monotonic() + 120
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    before = identity(first / "model.safetensors")
    assert cli("compare", interrupted).returncode == 0
    assert identity(first / "model.safetensors") == before
    for name in ("plain/seed-1", "twice/seed-1/second"):
        ours, theirs = (json.loads((folder / f / name / "perplexity.json").read_text()) for f in ("cut", "whole"))
        assert ours == theirs
    status, _, errors = here(interrupted, "base.learning_rate=0.5")
    assert status == 2 and "error: plain/seed-1: learning_rate was 0.01, is 0.5" in errors
    summary = json.loads((folder / "cut" / "results.json").read_text())["methods"]["twice"]
    assert summary["tokens"] == 2 * summary["extra_tokens"] > 0


@pytest.mark.slow
def test_printed_lines_started_elsewhere_are_collected(folder):
    path = two_methods(folder, "printed", launch="print", processes=2)
    status, output, _ = here(path)
    assert status == 0 and not list((folder / "printed").glob("*/seed-1/model.safetensors"))
    lines = output.splitlines()
    assert len(lines) == 3 and all("--nproc_per_node=2 -m dataflex_mega.train" in line for line in lines)
    status, _, errors = here(path, "--collect")
    assert status == 2 and "no finished run to report; plain/seed-1: not finished" in errors
    done = subprocess.run(lines[0], shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    status, _, errors = here(path, "--collect")
    assert status == 1 and "no result: twice/seed-1/first: not finished" in errors
    assert "plain" in (folder / "printed" / "report.md").read_text()


@pytest.mark.slow
def test_perplexity_of_a_run_is_that_of_its_own_last_evaluation_and_of_the_tool(folder):
    config = runs.base(
        folder, mixer="static", eval_dataset="prose,tables", eval_on_each_dataset=True, eval_strategy="steps",
        eval_steps=4, output_dir=str(folder / "evaluated"), **{**TINY, "max_samples": None},
    )  # fmt: skip
    ((status, stderr),) = runs.train_many(1, [config], plain=True)
    assert status == 0, stderr
    history = json.loads((folder / "evaluated" / "trainer_state.json").read_text())["log_history"]
    logged = {key: value for row in history for key, value in row.items() if key.startswith("eval_")}
    (folder / "evaluated.yaml").write_text(yaml.safe_dump(config))
    tool, out = corpus.ROOT / "tools" / "eval_perplexity.py", folder / "perplexity.json"
    typed = ["--model", folder / "evaluated", "--dataset-dir", folder / "data", "--dataset", "prose,tables"]
    results = []
    for options in (["--config", folder / "evaluated.yaml"], [*typed, "--cutoff-len", "32", "--batch-size", "3"]):
        command = [sys.executable, tool, *options, "--output", out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    for name in ("prose", "tables"):
        assert results[0]["domains"][name]["loss"] == pytest.approx(logged[f"eval_{name}_loss"], rel=1e-6)
        assert results[1]["domains"][name]["loss"] == pytest.approx(results[0]["domains"][name]["loss"], rel=1e-6)
        assert results[0]["domains"][name]["perplexity"] == math.exp(results[0]["domains"][name]["loss"])
    wrong = subprocess.run([sys.executable, tool, "--dataset", "prose"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: --model is missing")


@pytest.mark.slow
def test_regmix_proposes_proportions_that_a_run_can_start_from(folder):
    base = runs.base(
        folder, eval_dataset="code,prose,tables", seed=None, output_dir=None, mixer="odm", **{**TINY, "max_samples": 40}
    )
    path, out = folder / "study.yaml", folder / "study"
    path.write_text(yaml.safe_dump({"base": base, "output_dir": str(out), "runs": 5, "target": "tables"}))
    done = cli("regmix", path)
    assert done.returncode == 0, done.stderr[-3000:]
    study = json.loads((out / "proportions.json").read_text())
    assert study["domain_names"] == ["code", "prose", "tables"]
    assert sum(study["average_weights"]) == pytest.approx(1) and sum(study["natural"]) == pytest.approx(1)
    assert study["natural"][2] < study["natural"][0]  # there are fewer tables than source files
    assert "init_mixture_proportions: [" in done.stderr and (out / "regmix.png").stat().st_size > 5000
    next_run = runs.base(
        folder, mixer="static", init_mixture_proportions_file=str(out / "proportions.json"), max_steps=1,
        output_dir=str(folder / "next"),
    )  # fmt: skip
    ((status, stderr),) = runs.train_many(1, [next_run], plain=True)
    assert status == 0, stderr
    assert list(runs.rows(next_run)[0]["proportions"].values()) == pytest.approx(study["average_weights"])
