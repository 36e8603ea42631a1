"""Whole runs on .bin/.idx files: equal losses on 1 and 2 processes, and LLaMA-Factory's own rows."""

import json
import shutil
from pathlib import Path

import pytest

from dataflex_mega.corpus import command
from tests.support import corpus, runs, trees

pytest.importorskip("megatron.core")
MIX = {"mixer": {"name": "odm", "reward_scale": 5.0}, "warmup_step": 1, "update_step": 2, "update_times": -1}
EVAL = {"eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three domains as datasets and as a corpus, and two of them as an evaluation corpus."""
    root = corpus.write(tmp_path_factory.mktemp("corpus-runs"))
    common = ["--dataset-dir", str(root / "data"), "--tokenizer", str(root / "model")]
    for name, domains in (("train", "code,prose,tables"), ("held", "prose,tables")):
        assert command.main(["--dataset", domains, *common, "--output", str(root / name)]) == 0
    return root


def config(folder, name, **keys):
    """A run on the corpus."""
    corpus_keys = {"dataset": None, "dataset_dir": None, "corpus_dir": str(folder / "train"), **MIX}
    return runs.base(folder, output_dir=str(folder / name), **{**corpus_keys, **keys})


@pytest.fixture(scope="module")
def finished(folder):
    evaluation = {"eval_corpus_dir": str(folder / "held"), **EVAL}
    natural = {"mixer": "static", "mixture_sample_rule": "stratified", "warmup_step": None, "update_times": None}
    alone = {
        "one": config(folder, "one", **evaluation),
        "natural": config(folder, "natural", **natural, update_step=None, max_steps=40),
        "datasets": runs.base(folder, output_dir=str(folder / "datasets"), **MIX),
        "other order": config(folder, "other", dataset="tables,code", eval_dataset="prose", **evaluation),
    }
    both = {"two": config(folder, "two", per_device_train_batch_size=4, **evaluation)}
    for world, configs in ((1, alone), (2, both)):
        for name, (status, stderr) in zip(configs, runs.train_many(world, list(configs.values())), strict=True):
            assert status == 0, f"{name}: {stderr}"
    return {**alone, **both}


def losses(config):
    return [row["loss"] for row in runs.rows(config) if "loss" in row]


def evaluations(config):
    """The losses of each evaluation; each set has its row, as with Hugging Face's Trainer."""
    history = json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    by_step: dict[int, dict[str, float]] = {}
    for row in history:
        of_sets = {key: value for key, value in row.items() if key.startswith("eval_") and key.endswith("_loss")}
        if of_sets:
            by_step.setdefault(row["step"], {}).update(of_sets)
    return list(by_step.values())


def test_one_and_two_processes_have_the_same_losses_mixtures_and_draws(finished):
    one, two = (runs.rows(finished[name]) for name in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a["drawn"] == b["drawn"] and a["tokens"] == b["tokens"]
        assert a["proportions"] == pytest.approx(b["proportions"], rel=1e-5)
    assert losses(finished["one"]) == pytest.approx(losses(finished["two"]), rel=1e-5)
    assert len(losses(finished["one"])) == 6


def test_the_rows_are_those_of_llamafactorys_packed_pre_training(finished):
    """Each domain has fewer documents than the batch in which LLaMA-Factory joins texts, so its rows are the same."""
    assert losses(finished["one"]) == pytest.approx(losses(finished["datasets"]), rel=1e-6)


def test_each_domain_of_the_evaluation_corpus_has_its_loss(finished):
    one, two, picked = (evaluations(finished[name]) for name in ("one", "two", "other order"))
    assert [set(row) for row in one] == [{"eval_prose_loss", "eval_tables_loss"}] * 2
    assert [set(row) for row in picked] == [{"eval_prose_loss"}] * 2
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert list(runs.rows(finished["other order"])[0]["proportions"]) == ["tables", "code"]


def test_natural_proportions_are_those_of_the_tokens(finished, folder):
    manifest = json.loads((folder / "train" / "manifest.json").read_text())
    last = runs.rows(finished["natural"])[-1]["proportions"]
    for domain in manifest["domains"]:
        assert last[domain["name"]] == pytest.approx(domain["proportion"], abs=2e-3)


def test_a_corpus_of_another_tokenizer_and_a_window_too_long_are_refused(folder, tmp_path):
    other = corpus.write(tmp_path / "other", vocab=300)
    cases = {
        "was tokenized with another tokenizer": config(folder, "bad", model_name_or_path=str(other / "model")),
        "a row of cutoff_len has 10000000": config(folder, "bad", cutoff_len=10_000_000),
    }
    finished = runs.train_many(1, list(cases.values()), plain=True)
    for words, (status, stderr) in zip(cases, finished, strict=True):
        assert status == 2 and words in stderr


def test_a_file_that_changed_since_it_was_prepared_ends_the_run(folder):
    damaged = folder / "damaged"
    shutil.copytree(folder / "train", damaged)
    trees.flip(damaged / "prose.bin")
    keys = {"corpus_dir": str(damaged), "save_strategy": "steps", "save_steps": 6}
    configs = [config(folder, f"verify-{verify}", **keys, verify=verify) for verify in ("background", "full", "sizes")]
    found = runs.train_many(1, configs, plain=True)
    for one, (status, stderr) in zip(configs[:2], found, strict=False):
        assert status == 2 and "prose.bin has the SHA-256" in stderr and stderr.count("error:") == 1, one
        assert not (Path(one["output_dir"]) / "model.safetensors").exists()
    assert not (Path(configs[1]["output_dir"]) / "metrics.jsonl").exists(), "before the first step"
    assert found[2][0] == 0
    other = config(folder, "verify-sizes", save_strategy="steps", max_steps=8)
    content = json.loads((damaged / "manifest.json").read_text())
    content["domains"][1]["bin_sha256"] = "0" * 64
    (damaged / "manifest.json").write_text(json.dumps(content))
    ((status, stderr),) = runs.train_many(1, [{**other, **keys}], plain=True)
    assert status == 2 and "data of prose" in stderr
