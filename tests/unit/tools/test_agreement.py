"""The figures of tools/bench/agreement.py, by hand, and the study itself on almost nothing."""

import json
import sys

import pytest
import torch

from dataflex_mega.distributed.parallel_info import shutdown_distributed
from tests.support import corpus


@pytest.fixture(scope="module")
def agreement():
    return corpus.tool("bench/agreement")


def test_spearman_is_that_of_ranks_with_ties_in_the_middle(agreement):
    values = torch.tensor([0.1, 5.0, 2.0, 9.0]).double()
    assert agreement.spearman(values, values.exp()) == pytest.approx(1.0)
    assert agreement.spearman(values, -values) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 1 - 6 * 0.5 / 60 is not it with ties; Pearson of the ranks is
    tied = torch.tensor([0.0, 1.0, 1.0, 2.0]).double()
    assert agreement.spearman(tied, torch.arange(4).double()) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)


def test_tops_may_differ_by_ties_only(agreement):
    reference = torch.tensor([1.0, 0.5, 0.5, 0.1, 0.0]).double()
    other = torch.tensor([1.0, 0.4, 0.5, 0.1, 0.0]).double()
    assert agreement.same_top(other, reference, 0.4) and agreement.same_top(reference, other, 0.2)
    assert not agreement.same_top(torch.tensor([1.0, 0.1, 0.2, 0.9, 0.0]).double(), reference, 0.4)
    assert agreement.overlap(torch.tensor([1.0, 0.1, 0.2, 0.9, 0.0]).double(), reference, 0.4) == 0.5


def test_the_study_finds_streamed_scores_equal_to_the_definition(agreement, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows, info = [{"text": text[:300]} for text in corpus.domains(20)["prose"]], {}
    for name in (*agreement.DOMAINS, *agreement.SUBTASKS):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        info[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    arguments = "--candidates 32 --targets 2 --length 12 --steps 4 --hidden 16 --layers 1 --dense 64 --two-sided 4"
    monkeypatch.setattr(sys, "argv", ["agreement", "--data", str(data), *arguments.split()])
    try:
        assert agreement.main() == 0
    finally:
        shutdown_distributed(orderly=True)
    assert "streamed: agrees" in capsys.readouterr().out
