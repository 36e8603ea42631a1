"""LLaMA-Factory's keys that say which rows are read and in which order, in whole runs on both engines."""

import json

import pytest

from tests.support import corpus, runs

SIZES = {"few": 10, "many": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = corpus.write(tmp_path_factory.mktemp("keys"))
    info, rows = json.loads((root / "data" / "dataset_info.json").read_text()), corpus.instructions(40)
    for name, part in {"few": rows[:10], "many": rows[10:]}.items():
        (root / "data" / f"{name}.json").write_text(json.dumps(part))
        info[name] = {"file_name": f"{name}.json"}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


def config(folder, name, **keys):
    base = {
        "stage": "sft", "template": "default", "dataset": "few,many", "weighter": {"name": "loss"}, "max_steps": None,
        "num_train_epochs": 1.0, "per_device_train_batch_size": 4, "cutoff_len": 64, "logging_steps": 1,
    }  # fmt: skip
    return runs.base(folder, output_dir=str(folder / "out" / name), **{**base, **keys})


def passed(results):
    for status, stderr in results:
        assert status == 0, stderr[-3000:]


def counts(run):
    """[steps] samples of `few` in each step, and of `many`."""
    return [tuple(int(row["drawn"][name]) for name in SIZES) for row in runs.rows(run)]


def test_proportions_and_lengths(folder):
    keys = {"interleave_probs": "0.5,0.5"}
    cases = {
        "under": ({"mix_strategy": "interleave_under", **keys}, [(2, 2)] * 5),
        "over": ({"mix_strategy": "interleave_over", **keys}, [(2, 2)] * 15),
        "once": ({"mix_strategy": "interleave_once", **keys}, [(2, 2)] * 5 + [(0, 4)] * 5),
        "order": ({"disable_shuffling": True}, [(4, 0), (4, 0), (2, 2)] + [(0, 4)] * 7),
    }
    runs_of = {name: config(folder, name, **given) for name, (given, _) in cases.items()}
    results = runs.train_many(1, list(runs_of.values()))
    passed(results)
    for name, (_, expected) in cases.items():
        assert counts(runs_of[name]) == expected, name
