"""Rows are read with any installation of torchvision, or none."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from dataflex_mega.llamafactory.data import DatasetRows


def test_rows_are_read_beside_a_torchvision_without_its_video_reader(monkeypatch):
    io = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(io=io))
    monkeypatch.setitem(sys.modules, "torchvision.io", io)
    monkeypatch.setattr(datasets.config, "TORCHVISION_AVAILABLE", True)
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2], [], [3], [4, 5, 6]], "labels": [[-100, 2], [], [3], [4, 5, -100]]}
    )
    with pytest.raises(ImportError):
        table.with_format("numpy")[[0, 1]]
    whole = datasets.concatenate_datasets([table, table])  # several chunks, and rows out of order and repeated
    found = DatasetRows(whole).fetch(np.array([3, 0, 6, 3, 1]))
    assert [ids.tolist() for ids, _ in found] == [[4, 5, 6], [1, 2], [3], [4, 5, 6], []]
    assert [labels.tolist() for _, labels in found] == [[4, 5, -100], [-100, 2], [3], [4, 5, -100], []]
    assert all(part.dtype == np.int64 for pair in found for part in pair)
