"""Scores from files: what is read, and what is refused with the place named."""

import json

import numpy as np
import pytest

from dataflex_mega.config.reorder_arguments import ScoreParams
from dataflex_mega.data.score_files import read_cached_selection, read_scores
from dataflex_mega.errors import ConfigError, DataError


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


def cached(params, size):
    return read_cached_selection(str(params.cache_path), params.metric_key, params.fill_value, size)


def test_scores_of_a_selection_fill_the_pool(tmp_path):
    path = tmp_path / "step_10.json"
    path.write_text(json.dumps({"indices": [3, 0], "metric": {"loss": [1.5, 2.5]}}))
    params = ScoreParams(cache_path=str(path), fill_value=-1.0)
    assert cached(params, 5).tolist() == [2.5, -1, -1, 1.5, -1]
    with pytest.raises(DataError, match="sample 3 of a pool of 3; it belongs to other data"):
        cached(params, 3)
    with pytest.raises(DataError, match="expected indices and metric.lose; it has loss"):
        cached(ScoreParams(cache_path=str(path), metric_key="lose"), 5)
    path.write_text(json.dumps({"indices": [3], "metric": {"loss": [1.5, 2.5]}}))
    with pytest.raises(DataError, match="found 1 and 2"):
        cached(params, 5)
    with pytest.raises(ConfigError, match="cache_path: nowhere.json not found"):
        cached(ScoreParams(cache_path="nowhere.json"), 5)
