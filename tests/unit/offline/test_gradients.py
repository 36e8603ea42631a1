"""TSDS and neighbours on gradient stores: the same as on their rows, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dataflex_mega.offline import transport
from dataflex_mega.offline.embeddings import open_embeddings
from dataflex_mega.store import build
from dataflex_mega.store.layout import StoreLayout
from tests.unit.offline.test_command import run

pytest.importorskip("faiss")
IDENTITY = {
    "model": "abc", "data": {"pool": "0123"}, "cutoff_len": 32, "gradient": "adam",
    "projection": {"kind": "two_sided", "size": 16, "seed": 0},
}  # fmt: skip


def write_store(folder, rows, **changed):
    """A store of these rows in two shards, blocks of 8."""
    layout = StoreLayout(len(rows), rows.shape[1], 2, 8)
    identity = {**IDENTITY, **changed}
    for shard in range(2):
        writer = build.ShardWriter(folder, build.create_or_resume(folder, identity, layout), shard)
        for block in writer.missing_blocks:
            writer.write(rows[layout.ids_of_block(block).start : layout.ids_of_block(block).stop])
        writer.close()
    build.finalize(folder, identity, layout)
    return folder


@pytest.fixture
def stores(tmp_path):
    """Candidates of three directions, of very different lengths, one of them without a gradient; a task of one direction."""
    made = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 12, generator=made)
    rows = centres[torch.arange(60) % 3] + 0.5 * torch.randn(60, 12, generator=made)
    rows = rows * torch.logspace(-3, 3, 60).unsqueeze(1)
    rows[10] = 0
    task = centres[1] + 0.5 * torch.randn(4, 12, generator=made)
    write_store(tmp_path / "train", rows)
    write_store(tmp_path / "task", task, gradient="sgd", model="def", data={"task": "4567"})
    return tmp_path, rows, task


def units(rows):
    """What is on disk, each row with length 1, in float64; a row of zeros far from all."""
    values = rows.bfloat16().double().numpy()
    length = np.linalg.norm(values, axis=1, keepdims=True)
    values = values / np.where(length > 0, length, 1)
    values[length[:, 0] == 0] = 100 / 12**0.5
    return values


def test_probabilities_are_those_of_the_transport_between_unit_gradients(stores):
    folder, rows, task = stores
    names = ["--candidates", folder / "train", "--queries", folder / "task"]
    options = ["--k", 25, "--kde-k", 30, "--sigma", 0.8, "--alpha", 0.4, "--c", 2.0]
    assert run("tsds", *names, *options, "--output", folder / "p.npy") == 0
    candidates, queries = units(rows), units(task)
    distances = np.linalg.norm(queries[:, None] - candidates[None], axis=2)
    ids = distances.argsort(axis=1, kind="stable")[:, :25]
    seen = np.unique(ids)
    gaps = np.linalg.norm(candidates[seen][:, None] - candidates[seen][None], axis=2)
    rho = np.ones(60)
    rho[seen] = np.maximum(0, 1 - np.sort(gaps, axis=1)[:, :30] ** 2 / 0.8**2).sum(axis=1)
    wanted = transport.tsds_plan(np.take_along_axis(distances, ids, 1), ids, rho, 0.4, 2.0).probabilities
    found = np.load(folder / "p.npy")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)
    assert found[1::3].sum() > 0.7 and found[10] == 0, "those of the task's direction, whatever their length"
    note = json.loads((folder / "p.npy.json").read_text())["identity"]["candidates"]
    assert note["data"]["pool"] == {"pool": "0123"}, "what a run compares with its own data"


def test_ivf_and_near_read_stores_too(stores):
    folder, rows, task = stores
    names = ["--candidates", folder / "train", "--queries", folder / "task", "--k", 7]
    assert run("near", *names, "--output", folder / "a.npy") == 0
    assert run("near", *names, "--index", "ivf", "--nprobe", 99, "--output", folder / "b.npy") == 0
    gaps = np.linalg.norm(units(task)[:, None] - units(rows)[None], axis=2)
    wanted = gaps.argsort(axis=1, kind="stable")[:, :7]
    assert np.load(folder / "a.npy").tolist() == np.load(folder / "b.npy").tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"projection": {"kind": "two_sided", "size": 16, "seed": 1}}, "--queries: encoder gradients, kind two_sided"),
        ({"gradient": "adam", "model": "def"}, "--queries: model of adam gradients def, the candidates' is abc"),
    ],
)
def test_stores_that_cannot_be_compared_are_one_line(stores, capsys, changed, said):
    folder, _, task = stores
    write_store(folder / "other", task, **changed)
    assert (
        run("near", "--candidates", folder / "train", "--queries", folder / "other", "--output", folder / "x.npy") == 2
    )
    heard = capsys.readouterr().err
    assert heard.startswith(f"error: {said}") and heard.count("\n") == 1


def test_a_store_and_embeddings_are_not_compared_and_damage_is_named(stores, capsys):
    folder, _, _ = stores
    rows, _ = open_embeddings(folder / "train")
    assert rows.shape == (60, 12) and rows[np.array([10, 59])].shape == (2, 12) and np.linalg.norm(rows[10:11]) == 10
    shard = folder / "train" / "shard-00000-of-00002.bin"
    shard.write_bytes(b"\x07" + shard.read_bytes()[1:])
    assert (
        run("near", "--candidates", folder / "train", "--queries", folder / "task", "--output", folder / "x.npy") == 2
    )
    assert f"{shard} is damaged in the rows of samples 0..7" in capsys.readouterr().err
