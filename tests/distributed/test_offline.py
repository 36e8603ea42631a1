"""From a training configuration to embeddings, neighbours and TSDS probabilities and back into training, on 1 and 2
processes; probabilities and draws also on 4."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support import corpus, runs

pytest.importorskip("faiss")


def do(job):
    """An offline command, or a training run -> (exit status, standard error)."""
    if isinstance(job, dict):
        return runs.train_here(job)
    from dataflex_mega.commands import _offline

    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        status = _offline.run_here(job)
    return status, stderr.getvalue()


def example(folder, name, world, **keys):
    """A YAML of examples/offline/ on the tests' data, at their sizes."""
    config = yaml.safe_load((corpus.ROOT / "examples" / "offline" / f"{name}.yaml").read_text())
    return {
        **config, "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder / "data"),
        "dataset": "code,prose,tables", "eval_dataset": "tables", "max_samples": 6, "cutoff_len": 32, "max_steps": 3,
        "warmup_step": 1, "update_step": 1, "per_device_train_batch_size": 8 // world, "seed": 3, "tensorboard": False,
        "output_dir": str(folder / str(world) / name), **keys,
    }  # fmt: skip


def jobs_of(folder, world):
    """Embed both sides, search, transport, train with both selectors, and once with files of other data."""
    out = folder / str(world)
    config = example(folder, "near", world, selector={"name": "near", "indices_path": str(out / "top.npy")})
    drawing = example(folder, "tsds", world, selector={"name": "tsds", "probs_path": str(out / "probs.npy")})
    (folder / f"run-{world}.yaml").write_text(yaml.safe_dump(config))
    embed = [
        "embed",
        str(folder / f"run-{world}.yaml"),
        "--model",
        str(folder / "model"),
        "--encoder",
        "model",
        "--block",
        "8",
    ]
    pair = ["--candidates", str(out / "train"), "--queries", str(out / "eval")]
    return [
        [*embed, "--output", str(out / "train")],
        [*embed, "--part", "eval", "--output", str(out / "eval")],
        ["near", *pair, "--k", "20", "--output", str(out / "top.npy")],
        ["tsds", *pair, "--k", "20", "--kde-k", "5", "--output", str(out / "probs.npy")],
        config,
        drawing,
        {**config, "output_dir": str(out / "other"), "dataset": "prose,code,tables"},
        [*embed, "--encoder", "encoder", "--output", str(out / "train")],
    ]


def drawing_of(folder, world):
    """Transport and a training that draws by it, from the embeddings of one process."""
    probabilities = str(folder / str(world) / "probs.npy")
    pair = ["--candidates", str(folder / "1" / "train"), "--queries", str(folder / "1" / "eval")]
    return [
        ["tsds", *pair, "--k", "20", "--kde-k", "5", "--output", probabilities],
        example(folder, "tsds", world, selector={"name": "tsds", "probs_path": probabilities}),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = corpus.write(tmp_path_factory.mktemp("offline"))
    return folder, {world: runs.train_many(world, jobs_of(folder, world), do) for world in (1, 2)}


@pytest.fixture(scope="module")
def on_four(finished):
    folder, _ = finished
    return folder, runs.train_many(4, drawing_of(folder, 4), do)


def test_every_job_ends_as_it_should(finished):
    for world, results in finished[1].items():
        assert [status for status, _ in results] == [0] * 6 + [2, 2], (world, results)
        other, folder = results[6][1], results[7][1]
        assert "selector.near.indices_path" in other and "was computed from other data: their order" in other
        assert "belongs to something else (encoder: model there, encoder here)" in folder


def test_two_processes_make_the_same_files(finished):
    folder, _ = finished
    for name in ("train/embeddings.npy", "eval/embeddings.npy", "top.npy", "probs.npy"):
        one, two = (np.load(folder / str(world) / name) for world in (1, 2))
        assert one.shape == two.shape and np.array_equal(one, two), name
    assert np.load(folder / "1" / "probs.npy").sum() == pytest.approx(1)


def test_training_draws_what_the_files_say(finished):
    folder, _ = finished
    selected = {}
    for world in (1, 2):
        for name in ("near", "tsds"):
            steps = sorted((folder / str(world) / name / "selections").glob("step_*.json"))
            selected[world, name] = [json.loads(path.read_text())["indices"] for path in steps]
    assert selected[1, "near"] == selected[2, "near"] and selected[1, "tsds"] == selected[2, "tsds"]
    assert len(selected[1, "near"]) == 2 and selected[1, "tsds"][0] != selected[1, "tsds"][1], "drawn anew"
    top = np.load(folder / "1" / "top.npy")
    assert set(selected[1, "near"][0]) <= set(top[:, :8].ravel().tolist())
    probabilities = np.load(folder / "1" / "probs.npy")
    assert all((probabilities[np.array(ids)] > 0).all() for ids in selected[1, "tsds"])


def test_four_processes_draw_what_one_draws(on_four):
    folder, results = on_four
    assert [status for status, _ in results] == [0, 0], results
    assert np.array_equal(np.load(folder / "4" / "probs.npy"), np.load(folder / "1" / "probs.npy"))
    one, four = (sorted((folder / str(world) / "tsds" / "selections").glob("step_*.json")) for world in (1, 4))
    assert len(one) == len(four) == 2
    for ours, theirs in zip(one, four, strict=True):
        assert json.loads(ours.read_text())["indices"] == json.loads(theirs.read_text())["indices"]


def test_candidates_like_the_target_are_nearest(finished):
    """The queries are the domain `tables`; most of their neighbours are of that domain."""
    folder, _ = finished
    note = json.loads((folder / "1" / "top.npy.json").read_text())["identity"]
    assert list(note["candidates"]["data"]["pool"]) == ["code", "prose", "tables"]
    top = np.load(folder / "1" / "top.npy")
    samples = note["candidates"]["samples"]
    assert (top[:, :5] > samples * 0.6).mean() > 0.5
    assert Path(folder / "1" / "train" / "manifest.json").is_file()
