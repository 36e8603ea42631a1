"""Faults in the middle of training: what is reported and what survives."""

import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support import corpus, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("faults"))


def poison(folder, name):
    """A copy of the model in which one token that only some samples have embeds to NaN -> (its path, the token)."""
    from transformers import AutoTokenizer

    target = folder / name
    shutil.copytree(folder / "model", target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    token_sets = [set(tokenizer.encode(text)) for texts in corpus.domains().values() for text in texts]
    frequency = {token: sum(token in ids for ids in token_sets) / len(token_sets) for token in range(len(tokenizer))}
    token = min(frequency, key=lambda candidate: (abs(frequency[candidate] - 0.6), candidate))
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target, token


@pytest.mark.parametrize("world", [1, 2])
def test_a_nan_loss_names_step_domain_and_samples_and_keeps_the_checkpoint(folder, world):
    model, _ = poison(folder, f"poisoned-{world}")
    keys = {"max_steps": 60, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    config = runs.base(
        folder, model_name_or_path=str(model), output_dir=str(folder / f"nan-{world}"),
        mixer={"name": "static"}, update_step=1, update_times=-1, per_device_train_batch_size=2, **keys,
    )  # fmt: skip
    status, stderr = runs.train_many(world, [config])[0]
    assert status == 1, stderr
    line = next(line for line in stderr.splitlines() if line.startswith("error: step"))
    log = runs.rows(config)
    step = len(log) + 1
    assert f"step {step}: the loss is not finite; samples " in line and " row " in line
    assert any(name in line for name in ("code", "prose", "tables"))
    checkpoints = sorted(Path(config["output_dir"]).glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ([f"checkpoint-{step - 1}"] if step > 1 else [])
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in log), "no NaN reached the log"


def test_a_nan_loss_can_be_skipped_when_asked_for(folder):
    model, token = poison(folder, "poisoned-skip")
    config = runs.base(
        folder, model_name_or_path=str(model), output_dir=str(folder / "nan-skip"), mixer={"name": "static"},
        update_step=1, update_times=-1, per_device_train_batch_size=2, max_steps=60, on_non_finite="continue",
    )  # fmt: skip
    status, stderr = runs.train_many(1, [config])[0]
    assert status == 0, stderr
    log = runs.rows(config)
    bad = [row for row in log if not torch.isfinite(torch.tensor(row["grad_norm"]))]
    assert len(log) == 60 and 0 < len(bad) < 60
    trained = load_file(Path(config["output_dir"]) / "model.safetensors")
    trained["model.embed_tokens.weight"][token] = 0
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())


def test_an_interrupt_ends_in_one_line_and_the_same_command_goes_on(folder):
    """Ctrl-C at the terminal of one process: SIGINT, after the first checkpoint."""
    keys = {
        "mixer": "odm",
        "update_step": 1,
        "update_times": -1,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 120,
    }
    config = runs.base(folder, output_dir=str(folder / "interrupted"), logging_steps=1, **keys)
    path = folder / "interrupted.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-u", "-m", "dataflex_mega.train", str(path)]
    lines = []
    pipes = {"stderr": subprocess.STDOUT, "stdout": subprocess.PIPE, "text": True}
    # As at a terminal, where tests that a shell started in the background inherit that SIGINT is ignored.
    with subprocess.Popen(
        command, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL), **pipes
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "step 3/120" in line:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, "".join(lines)
    assert lines[-1].startswith("interrupted; ") and "Traceback" not in "".join(lines)
    assert len(runs.rows(config)) < 120
    status, stderr = runs.train_here(config)
    assert status == 0, stderr
    assert [row["step"] for row in runs.rows(config)] == list(range(1, 121))
