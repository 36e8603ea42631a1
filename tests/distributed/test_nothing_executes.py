"""Nothing that a run reads from disk executes, and no token is in a file or a message: whole runs on both engines."""

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import corpus, runs

KEYS = {"mixer": "odm", "warmup_step": 1, "update_step": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
TOKENS = {name: f"{name}-0123456789" for name in ("FIRST", "SECOND", "THIRD")}


class Touch:
    """Pickles as a call that makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("nothing-executes"))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def pickled(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def tensors_of(checkpoint):
    """Where a checkpoint has the files of torch.distributed.checkpoint."""
    return next(iter(checkpoint.rglob("*.distcp"))).parent


def index_of_torch(checkpoint, marker):
    """The pickled index alone, as older versions wrote it."""
    tensors = tensors_of(checkpoint)
    (tensors / "index.json").unlink()
    (tensors / ".metadata").write_bytes(pickle.dumps(Touch(marker)))


def value_in_the_index(checkpoint, marker):
    """A value, or where there is none a tensor, that is a pickle with a call."""
    tensors = tensors_of(checkpoint)
    index, content = json.loads((tensors / "index.json").read_text()), pickled(Touch(marker))
    (tensors / "more").write_bytes(content)
    place = {"file": "more", "offset": 0, "length": len(content)}
    if index["values"]:
        index["values"] = dict.fromkeys(index["values"], place)
    else:
        next(iter(index["tensors"].values()))["chunks"][0].update(place)
    (tensors / "index.json").write_text(json.dumps(index))


def common_values(checkpoint, marker):
    (tensors_of(checkpoint) / "common.pt").write_bytes(pickled({"optimizer": Touch(marker)}))


def file_outside(checkpoint, marker):
    tensors = tensors_of(checkpoint)
    (tensors / "index.json").write_text((tensors / "index.json").read_text().replace("__0_0.distcp", "../../x.distcp"))


def index_of_torch_besides(checkpoint, marker):
    """It is not read at all."""
    (tensors_of(checkpoint) / ".metadata").write_bytes(pickle.dumps(Touch(marker)))


REFUSED = (index_of_torch, value_in_the_index, file_outside)


def write_manifest(checkpoint):
    """Sums of all files anew, as anyone can who can write there."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest["files"] = {
        str(path.relative_to(checkpoint)): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("engine", ["fsdp", "megatron"])
def test_a_crafted_checkpoint_runs_nothing(folder, engine):
    if engine == "megatron":
        pytest.importorskip("megatron.core")
    whole = runs.base(folder, **KEYS, engine=engine, output_dir=str(folder / engine))
    crafts = [*REFUSED, *([common_values] if engine == "megatron" else []), index_of_torch_besides]
    marker = folder / f"executed-{engine}"
    assert runs.train_many(1, [whole])[0][0] == 0
    configs = []
    for craft in crafts:
        output = folder / f"{engine}-{craft.__name__}"
        shutil.copytree(whole["output_dir"], output)
        shutil.rmtree(output / "checkpoint-4")
        craft(output / "checkpoint-2", marker)
        write_manifest(output / "checkpoint-2")
        configs.append({**whole, "output_dir": str(output)})
    for craft, (status, stderr) in zip(crafts, runs.train_many(1, configs), strict=True):
        assert not marker.exists(), craft.__name__
        assert "Traceback" not in stderr, craft.__name__
        if craft is index_of_torch_besides:
            assert status == 0, stderr
        else:
            errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert status == 2 and len(errors) == 1 and "checkpoint-2" in errors[0], (craft.__name__, stderr)
            assert "mkdir" in errors[0] or craft is file_outside


def test_crafted_weights_of_a_model_run_nothing(folder):
    """transformers reads pytorch_model.bin with weights_only=True, and code of a model folder when it is trusted only."""
    marker = folder / "executed-model"
    bins, automatic = folder / "bins", folder / "automatic"
    for target in (bins, automatic):
        shutil.copytree(folder / "model", target)
    (bins / "model.safetensors").unlink()
    (bins / "pytorch_model.bin").write_bytes(pickled({"model.norm.weight": Touch(marker)}))
    config = json.loads((automatic / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (automatic / "config.json").write_text(json.dumps(config))
    (automatic / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    configs = [
        runs.base(folder, **KEYS, model_name_or_path=str(path), output_dir=str(folder / f"run-{path.name}"))
        for path in (bins, automatic)
    ]
    for status, stderr in runs.train_many(1, configs):
        assert status != 0 and not marker.exists(), stderr


# -- secrets -----------------------------------------------------------------------------------------------------------


def train_with_environment(config):
    """`train_here` with the variables under `environment`."""
    config = dict(config)
    variables = config.pop("environment", {})
    os.environ.update(variables)
    try:
        return runs.train_here(config)
    finally:
        for name in variables:
            del os.environ[name]


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("megatron", marks=pytest.mark.exhaustive)])
def test_a_token_is_in_no_file_and_no_message(folder, engine):
    if engine == "megatron":
        pytest.importorskip("megatron.core")
    output = folder / f"secrets-{engine}"
    common = {**KEYS, "engine": engine, "output_dir": str(output), "tensorboard": True}

    def run(token, **keys):
        return runs.base(folder, **{**common, **keys}, environment={"HF_TOKEN": TOKENS[token]})

    secrets = {"hf_hub_token": "${oc.env:HF_TOKEN}", "hub_token": "${oc.env:HF_TOKEN}"}
    stated = {"hf_hub_token": TOKENS["SECOND"], "ms_hub_token": TOKENS["SECOND"]}
    configs = [
        run("FIRST", **secrets),
        run("SECOND", **stated, max_steps=6),  # another token: the run goes on
        run("THIRD", **secrets, max_steps=8, seed=4),  # another run: refused, seed alone is named
        run("THIRD", **secrets, max_steps=8, model_name_or_path=f"https://me:{TOKENS['THIRD']}@host/{TOKENS['THIRD']}"),
        run("THIRD", max_steps=8, learning_rate=TOKENS["THIRD"]),
    ]
    results = runs.train_many(1, configs, train_with_environment)
    assert [status for status, _ in results] == [0, 0, 2, 2, 2], results
    assert "continuing from" in results[1][1] and "seed" in results[2][1]
    refusal = next(line for line in results[2][1].splitlines() if line.startswith("error:"))
    assert "hub_token" not in refusal
    for status, stderr in results:
        assert not any(token in stderr for token in TOKENS.values()), (status, stderr)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert any(path.name == "state.json" for path in files)
    found = [str(path) for path in files for token in TOKENS.values() if token.encode() in path.read_bytes()]
    assert not found


def test_a_checkpoint_of_a_former_version_with_a_token_is_resumed(folder):
    """It has the token and keys that are not compared any more; neither refuses the resume or is printed."""
    config = runs.base(folder, **KEYS, output_dir=str(folder / "former"))
    assert runs.train_many(1, [config])[0][0] == 0
    for checkpoint in Path(config["output_dir"]).glob("checkpoint-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        state["identity"].update(hf_hub_token=TOKENS["FIRST"], profiler_repeat=3, reference_cache="elsewhere")
        (checkpoint / "state.json").write_text(json.dumps(state))
        write_manifest(checkpoint)
    longer = {**config, "max_steps": 6}
    refused = {**config, "max_steps": 8, "learning_rate": 0.5}
    (status, stderr), (status_refused, stderr_refused) = runs.train_many(1, [longer, refused])
    assert status == 0 and "continuing from" in stderr, stderr
    assert status_refused == 2 and "learning_rate" in stderr_refused
    assert not any(TOKENS["FIRST"] in text for text in (stderr, stderr_refused))
