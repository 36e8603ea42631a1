"""Scores that order the samples of a run: from a file or from the columns of the datasets."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dataflex_mega.config.reorder_arguments import ReorderArguments
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.llamafactory.scores import raw_scores
from dataflex_mega.run.ordering import _precomputed


def test_a_file_for_other_data_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(7))

    class Pool(list):
        names, sizes = ("web", "code"), (4, 4)

    reorder = ReorderArguments(kind="static", score_params={"score_path": str(tmp_path / "a.npy")})
    with pytest.raises(DataError, match=r"a.npy has 7 scores for 8 samples \(web 4, code 4\)"):
        _precomputed(None, reorder, Pool(range(8)))


@pytest.mark.parametrize(
    ("stage", "packing", "val_size", "message"),
    [("pt", True, 0.0, "blocks of several rows; set packing: false"), ("sft", False, 0.1, "val_size takes rows out")],
)
def test_rows_that_are_not_samples_have_no_scores(stage, packing, val_size, message):
    data = SimpleNamespace(packing=packing, val_size=val_size)
    with pytest.raises(ConfigError, match=message):
        raw_scores(SimpleNamespace(finetuning=SimpleNamespace(stage=stage), data=data), "web", "score", 4)


def test_scores_of_rows(tmp_path):
    rows = [{"text": "a", "score": 1}, {"text": "b", "score": 0.5}]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"web": {"file_name": "web.jsonl"}}))
    data = SimpleNamespace(packing=False, val_size=0.0, dataset_dir=str(tmp_path), max_samples=None)
    model = SimpleNamespace(cache_dir=str(tmp_path / "cache"), hf_hub_token=None)
    args = SimpleNamespace(finetuning=SimpleNamespace(stage="sft"), data=data, model=model)
    assert raw_scores(args, "web", "score", 2).tolist() == [1.0, 0.5]
    with pytest.raises(DataError, match="no such column .did you mean 'score'"):
        raw_scores(args, "web", "scores", 2)
    with pytest.raises(DataError, match="dataset 'web' row 0: expected a finite number, found 'a'"):
        raw_scores(args, "web", "text", 2)
    with pytest.raises(DataError, match="has 2 rows, of which 1 became samples"):
        raw_scores(args, "web", "score", 1)
    data.max_samples = 1
    assert raw_scores(args, "web", "score", 1).tolist() == [1.0]
