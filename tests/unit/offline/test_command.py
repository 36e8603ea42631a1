"""The command line: what is refused in one line, and near and tsds from files to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dataflex_mega import cli
from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.selectors.near import Near
from dataflex_mega.algorithms.selectors.tsds import Tsds
from dataflex_mega.commands import _launcher, _offline
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.offline import command
from dataflex_mega.offline.sample_sources import FileSource, row_text
from tests.unit.algorithms.examples import generator, update_context
from tests.unit.offline.test_neighbours import brute, vectors

pytest.importorskip("faiss")


def no_run(path, part, overrides):
    raise AssertionError("no configuration is opened here")


def run(*arguments):
    return command.main([str(a) for a in arguments], no_run)


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "c.npy", vectors(60, 0))
    np.save(tmp_path / "q.npy", vectors(4, 1))
    return tmp_path


def pair(files):
    return ["--candidates", files / "c.npy", "--queries", files / "q.npy"]


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_teaches_the_next_step(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"], no_run)
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"dataflex-cli {name} " in said
    assert ("selector:" in said) == (name != "embed")
    assert f"\n  {name}" in cli.help_text() or f"| {name}" in cli.help_text()


def test_near_writes_what_the_selector_reads(files, capsys):
    assert run("near", *pair(files), "--k", 10, "--output", files / "top.npy") == 0
    found = np.load(files / "top.npy")
    assert found.dtype == np.int64 and found.tolist() == brute(vectors(60, 0), vectors(4, 1), 10)[1].tolist()
    selector = Near(str(files / "top.npy"))
    selector.setup(DomainInfo(("a",), (60,), (1.0,)))
    scores = torch.where(selector._ranks >= 0, -selector._ranks.float(), -torch.inf)
    assert set(selector.select(scores, 4, update_context(), generator()).tolist()) >= set(found[:, 0].tolist())
    note = json.loads((files / "top.npy.json").read_text())["identity"]
    assert note["settings"]["k"] == 10 and note["candidates"]["samples"] == 60
    assert "10 neighbours of 4 queries" in capsys.readouterr().err


def test_tsds_writes_what_the_selector_reads(files):
    assert run("tsds", *pair(files), "--k", 20, "--sigma", 0.9, "--alpha", 0.5, "--output", files / "p.npy") == 0
    probabilities = np.load(files / "p.npy")
    assert (
        probabilities.shape == (60,) and probabilities.dtype == np.float64 and probabilities.sum() == pytest.approx(1)
    )
    near = brute(vectors(60, 0), vectors(4, 1), 20)[1]
    assert set(np.flatnonzero(probabilities)) <= set(near.ravel().tolist()) and (probabilities > 0).sum() > 4
    selector = Tsds(str(files / "p.npy"))
    selector.setup(DomainInfo(("a",), (60,), (1.0,)))
    drawn = selector.select(selector._log_chances, 4, update_context(), generator())
    assert (probabilities[drawn.numpy()] > 0).all()


def test_crowded_candidates_share_their_probability(files, monkeypatch):
    copied = np.concatenate([vectors(60, 0), np.repeat(vectors(60, 0)[:1], 9, axis=0)])
    np.save(files / "c.npy", copied)
    np.save(files / "q.npy", vectors(60, 0)[:1])
    for sigma in (0, 0.5):
        options = ["--k", 30, "--sigma", sigma, "--alpha", 0.3, "--c", 1.0, "--output", files / f"{sigma}.npy"]
        assert run("tsds", *pair(files), *options) == 0
    plain, shared = np.load(files / "0.npy"), np.load(files / "0.5.npy")
    group = [0, *range(60, 69)]
    assert shared[group].sum() < plain[group].sum() and shared[group] == pytest.approx(shared[0])
    monkeypatch.setattr(command, "DENSITY_ROWS", 7)
    assert run("tsds", *pair(files), *options, "--output", files / "again.npy") == 0
    assert np.array_equal(np.load(files / "again.npy"), shared)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", 0], "--k: must be >= 1, found 0"),
        (["--alpha", 0], "--alpha: must be > 0 and <= 1, found 0.0"),
        (["--c", -1], "--c: must be > 0, found -1.0"),
        (["--sigma", -0.5], "--sigma: must be >= 0, found -0.5"),
        (["--kde-k", 0], "--kde-k: must be >= 1, found 0"),
    ],
)
def test_options_out_of_range_are_one_line(files, capsys, arguments, said):
    assert run("tsds", *pair(files), *arguments) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_sources_that_are_none_are_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("{not json\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    for source, extra, said in (
        ("no.jsonl", [], "not found"),
        ("a.txt", [], r"expected a training configuration (.yaml) or rows (.json, .jsonl)"),
        ("b.jsonl", [], "b.jsonl, line 1: not JSON"),
        ("rows.jsonl", ["--part", "eval"], "has no parts"),
        ("rows.jsonl", ["cutoff_len=3"], "keys can be changed of a configuration"),
    ):
        assert run("embed", tmp_path / source, *extra, "--model", "m", "--output", tmp_path / "o") == 2
        heard = capsys.readouterr().err
        assert said in heard and heard.count("\n") == 1, heard


def test_rows_are_text_or_alpacas_fields(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = FileSource(tmp_path / "a.json")
    assert len(source) == 2 and [item.text for item in source.fetch(np.array([1, 0]))] == ["Hi\nHo", "Add.\n1 2\n3"]
    assert row_text({"text": "t", "instruction": "i"}) == "t" and row_text({"prompt": "p"}) is None
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"b.jsonl row 0: expected text, or instruction and output; it has prompt"):
        FileSource(tmp_path / "b.jsonl").fetch(np.array([0]))
    (tmp_path / "c.jsonl").write_text('{"text": "other"}\n')
    assert FileSource(tmp_path / "c.jsonl").identity != source.identity


def test_embeddings_of_different_models_are_not_compared(files, monkeypatch, capsys):
    def open_embeddings(path):
        return np.load(path), {"model": path.stem, "samples": 1}

    monkeypatch.setattr(command, "open_embeddings", open_embeddings)
    assert run("near", *pair(files)) == 2
    assert "--queries: model q, the candidates' is c; embed both alike" in capsys.readouterr().err


def test_the_command_is_launched_like_training(monkeypatch):
    heard = {}
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(_launcher, "run_child", lambda command, *_: heard.update(command=command) or 0)
    assert cli.main(["near", "--candidates", "a", "--queries", "b"]) == 0
    assert heard["command"][-6:] == [_offline.MODULE, "near", "--candidates", "a", "--queries", "b"]
    assert "--nproc_per_node=2" in heard["command"]


def test_a_wrong_option_object_is_refused():
    options = command.parser().parse_args(["embed", "rows.jsonl", "--model", "m", "--output", "o", "--block", "0"])
    with pytest.raises(ConfigError, match="--block: must be >= 1, found 0"):
        command.check(options)
