"""Checkpoints that other programs read: the model or adapter inside, and `dataflex-cli export` of each layout."""

import contextlib
import io
import json
import shlex
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.support import corpus, runs

SFT = {"stage": "sft", "dataset": "sft", "template": "default", "cutoff_len": 64, "max_samples": 16}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
SAVED = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 3,
    "weighter": "loss",
    "per_device_train_batch_size": 4,
}
SHARDED = {"fsdp": "full_shard auto_wrap"}
# Each ends with its last checkpoint, whose step is that of the run's own export.
LAYOUTS = {
    "ddp": {},
    "ddp freeze bf16": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "bf16": True},
    "fsdp2 bf16": {**SHARDED, "bf16": True},
    "fsdp2 freeze bf16": {**SHARDED, "bf16": True, "finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "fsdp2 lora": {**SFT, **LORA, **SHARDED},
}  # fmt: skip
MEGATRON = {
    "TP2": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True},
    "PP2 bf16": {"pipeline_model_parallel_size": 2, "gradient_accumulation_steps": 2, "bf16": True},
}  # fmt: skip


def export_here(arguments):
    """`dataflex-cli export` in this process -> (exit status, standard error)."""
    from dataflex_mega import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["export", *map(str, arguments)])
    return status, said.getvalue()


def train_or_export(job):
    return runs.train_here(job) if isinstance(job, dict) else export_here(job)


def as_printed(line):
    """A line that a run has printed, typed; `exit` to what asks -> (exit status, standard output)."""
    from dataflex_mega import cli

    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch("sys.stdin", io.StringIO("Explain assert.\nexit\n")):
        status = cli.main(shlex.split(line.partition(": ")[2])[1:])
    return status, said.getvalue()


def config_of(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / name.replace(" ", "-")), **{**SAVED, **keys})


def done(results):
    for status, said in results:
        assert status == 0, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def adapter(folder):
    """A LoRA run on one process -> (its output_dir, the last checkpoint of it merged)."""
    config = config_of(folder, "lora", **SFT, **LORA)
    out = Path(config["output_dir"])
    merged = folder / "merged"
    done(runs.train_many(1, [config, [out / "checkpoint-3", merged, "merge=true"]], train_or_export, plain=True))
    return out, merged


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(24).unsqueeze(0)).logits


def test_an_adapter_in_a_checkpoint_is_the_exported_one_and_merged_computes_the_same(folder, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, merged = adapter
    checkpoint = out / "checkpoint-3"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (checkpoint / name).read_bytes() == (out / name).read_bytes(), name
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 3
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {"adapter_model.safetensors", "trainer_state.json", "engine/index.json"} <= set(listed)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, checkpoint))
    assert (adapted - plain).abs().max() > 1e-4, "training changed the adapter"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), adapted, atol=1e-6, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(merged).chat_template


def test_a_new_run_begins_with_an_adapter_or_a_model_of_a_checkpoint_and_resume_names_the_remedy(folder, adapter):
    out, _ = adapter
    other = folder / "theirs"
    shutil.copytree(
        out / "checkpoint-3", other, ignore=shutil.ignore_patterns("manifest.json", "engine", "rng*", "state*")
    )
    (other / "optimizer.pt").write_bytes(b"")
    only = config_of(folder, "only", save_only_model=True)
    two = f"{only['output_dir']}/checkpoint-2"
    jobs = [
        config_of(folder, "on", **SFT, **LORA, adapter_name_or_path=str(out / "checkpoint-2")),
        config_of(folder, "of-theirs", **SFT, **LORA, resume_from_checkpoint=str(other)),
        only,
        only,
        config_of(folder, "of-model", resume_from_checkpoint=two),
        config_of(folder, "from-model", model_name_or_path=two, max_steps=1),
    ]
    on, theirs, first, again, of_model, from_model = runs.train_many(1, jobs, plain=True)
    done([on, first, from_model])
    assert "save_only_model: no run can continue" in first[1]
    assert theirs[0] == again[0] == of_model[0] == 2
    assert theirs[1].count("error: ") == 1 and f"adapter_name_or_path: {other}" in theirs[1]
    assert "checkpoint-3 holds the model alone" in again[1] and "overwrite_output_dir" in again[1]
    assert f"model_name_or_path: {two}" in of_model[1]
    names = {path.name for path in Path(two).iterdir()}
    assert "engine" not in names and not [name for name in names if name.startswith("rng")]
    index = json.loads((Path(two) / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(load_file(Path(two) / "model.safetensors")), "vLLM reads the files that the index names"
    assert runs.rows(jobs[0])[0]["loss"] < runs.rows(config_of(folder, "lora"))[0]["loss"] - 1e-3


def exported(folder, world, layouts):
    """Train each layout and export its last checkpoint -> (name, output_dir, what was exported)."""
    configs = {name: config_of(folder, name, **keys) for name, keys in layouts.items()}
    done(runs.train_many(world, list(configs.values())))
    outs = [Path(config["output_dir"]) for config in configs.values()]
    targets = [folder / f"of-{out.name}" for out in outs]
    for (
        out
    ) in outs:  # an adapter is in the checkpoint; without it, as an older version left it, it comes from the state
        forget_model(out / "checkpoint-3")
    pairs = zip(outs, targets, strict=True)
    done(runs.train_many(1, [[out / "checkpoint-3", target] for out, target in pairs], export_here, plain=True))
    return list(zip(configs, outs, targets, strict=True))


def forget_model(checkpoint):
    """Take the Hugging Face files out of a checkpoint and its manifest."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    own = {name for name in manifest["files"] if name.startswith(("engine/", "rng-", "state."))}
    for name in set(manifest["files"]) - own:
        (checkpoint / name).unlink()
    manifest["files"] = {name: value for name, value in manifest["files"].items() if name in own}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def check_equal(name, out, target):
    weights = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    files = sorted(path.name for path in out.glob("*.safetensors"))
    mine, theirs = {}, {}
    for file in files:
        mine |= load_file(out / file)
    for path in target.glob("*.safetensors"):
        theirs |= load_file(path)
    assert mine and mine.keys() == theirs.keys(), name
    for key, tensor in mine.items():
        assert theirs[key].dtype == tensor.dtype and torch.equal(theirs[key], tensor), (name, key)
    config = "adapter_config.json" if "lora" in name else "config.json"
    assert json.loads((target / config).read_text()) == json.loads((out / config).read_text()), name
    assert (target / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert weights in files or len(files) > 1


@pytest.mark.exhaustive
def test_an_export_of_the_state_is_the_runs_own_export_bit_by_bit(folder):
    for name, out, target in exported(folder, 2, LAYOUTS):
        check_equal(name, out, target)


@pytest.mark.exhaustive
def test_an_export_of_megatrons_state_is_the_runs_own_export_bit_by_bit(folder):
    pytest.importorskip("megatron.core")
    for name, out, target in exported(folder, 2, MEGATRON):
        check_equal(name, out, target)


@pytest.mark.exhaustive
def test_a_checkpoint_is_a_reference_model(folder, adapter):
    """The losses are those of the exported folder; of an adapter those of the merged model."""
    out, merged = adapter
    full = config_of(folder, "reference", learning_rate=1.0e-2)
    checkpoint = Path(full["output_dir"]) / "checkpoint-2"
    plain = folder / "reference-exported"
    done(runs.train_many(1, [full, [checkpoint, plain]], train_or_export, plain=True))
    sources = {"state": checkpoint, "folder": plain, "adapter": out / "checkpoint-3", "merged": merged}
    jobs = [
        config_of(folder, f"rho1-{name}", weighter={"name": "rho1", "keep": 0.5}, reference_model=str(source), **SFT)
        for name, source in sources.items()
    ]
    done(runs.train_many(1, jobs, plain=True))
    state, exported, of_adapter, of_merged = [
        [row["loss"] for row in runs.rows(job)] + [row["objective"] for row in runs.rows(job)] for job in jobs
    ]
    assert state == exported and state != of_adapter
    assert of_adapter == pytest.approx(of_merged, rel=1e-5)
    assert not list(Path(jobs[0]["output_dir"]).glob(".reference-model*"))


@pytest.mark.exhaustive
def test_the_lines_after_a_run_work_as_printed(folder):
    jobs = [config_of(folder, "said", **SFT, **LORA), config_of(folder, "said whole", **SFT)]
    results = runs.train_many(1, jobs, plain=True)
    done(results)
    printed = [line for _, said in results for line in said.splitlines() if ": dataflex-cli " in line]
    assert [line.partition(":")[0] for line in printed] == ["chat", "api", "export", "chat", "api"]
    tried = [line for line in printed if not line.startswith("api")]
    for (status, said), line in zip(runs.train_many(1, tried, as_printed, plain=True), tried, strict=True):
        assert status == 0, line
        assert "Assistant: " in said or line.startswith("export")
    assert (folder / "said-merged" / "config.json").is_file()
