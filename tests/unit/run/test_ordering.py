"""Scores from files: what is read, and what is refused with the place named."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dataflex_mega.config.reorder_arguments import ScoreParams
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.llamafactory.scores import raw_scores
from dataflex_mega.run.ordering import _cached, _precomputed, read_scores


def test_every_layout_of_a_score_file(tmp_path):
    values = [0.5, 2.0, -1.0]
    np.save(tmp_path / "a.npy", np.array([values]))
    (tmp_path / "list.json").write_text(json.dumps(values))
    (tmp_path / "key.json").write_text(json.dumps({"score": values}))
    (tmp_path / "metric.json").write_text(json.dumps({"indices": [0, 1, 2], "metric": {"score": values}}))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"score": v, "text": "x"}) for v in values) + "\n\n")
    for name in ("a.npy", "list.json", "key.json", "metric.json", "rows.jsonl"):
        assert read_scores(str(tmp_path / name), "score").tolist() == values, name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1, NaN, 2]", r"expected finite numbers, found nan at place 1"),
        ("a.json", '["1"]', "expected finite numbers, found '1' at place 0"),
        ("a.json", "{}", "no 'score'"),
        ("a.json", "[1", "not JSON"),
        ("a.jsonl", '{"score": 1}\n{"scor": 2}\n', "a.jsonl, line 2: no 'score'"),
        ("a.jsonl", '{"score": 1}\n{"score": true}\n', "found True at place 1"),
    ],
)
def test_a_broken_score_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_scores(str(tmp_path / name), "score")


def test_scores_of_a_selection_fill_the_pool(tmp_path):
    path = tmp_path / "step_10.json"
    path.write_text(json.dumps({"indices": [3, 0], "metric": {"loss": [1.5, 2.5]}}))
    params = ScoreParams(cache_path=str(path), fill_value=-1.0)
    assert _cached(params, 5).tolist() == [2.5, -1, -1, 1.5, -1]
    with pytest.raises(DataError, match="sample 3 of a pool of 3; it belongs to other data"):
        _cached(params, 3)
    with pytest.raises(DataError, match="expected indices and metric.lose; it has loss"):
        _cached(ScoreParams(cache_path=str(path), metric_key="lose"), 5)
    path.write_text(json.dumps({"indices": [3], "metric": {"loss": [1.5, 2.5]}}))
    with pytest.raises(DataError, match="found 1 and 2"):
        _cached(params, 5)
    with pytest.raises(ConfigError, match="cache_path: nowhere.json not found"):
        _cached(ScoreParams(cache_path="nowhere.json"), 5)


def test_a_file_for_other_data_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(7))

    class Pool(list):
        names, sizes = ("web", "code"), (4, 4)

    run = SimpleNamespace(pool=Pool(range(8)))
    with pytest.raises(DataError, match=r"a.npy has 7 scores for 8 samples \(web 4, code 4\)"):
        _precomputed(run, ScoreParams(score_path=str(tmp_path / "a.npy")))


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
