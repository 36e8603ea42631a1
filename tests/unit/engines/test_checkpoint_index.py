"""Indexes of checkpoints: ours round-trips, torch's pickle is read the same, and crafted files execute nothing."""

import io
import json
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dataflex_mega.engines.checkpoint_index import INDEX, IndexReader, IndexWriter, PlainValues, load_plain, one_line
from dataflex_mega.engines.pickled_index import PICKLED, read_pickled_index
from dataflex_mega.errors import CheckpointError


class Touch:
    """Pickles as a call of a function that makes a file."""

    def __init__(self, marker, function=os.mkdir):
        self.marker, self.function = marker, function

    def __reduce__(self):
        return self.function, (str(self.marker),)


def example():
    return {
        "model": {"weight": torch.arange(12.0).reshape(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"step": torch.tensor(3.0), "betas": (0.9, 0.95), "lr": 1e-3, "fused": None, "names": ["a", "b"]},
    }


def blank():
    return {
        "model": {"weight": torch.zeros(3, 4), "half": torch.zeros(2, dtype=torch.bfloat16)},
        "optimizer": {"step": torch.tensor(0.0), "betas": (0, 0), "lr": 0.0, "fused": 1, "names": []},
    }


def save(state, writer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer)


def load(folder):
    state = blank()
    with warnings.catch_warnings(), one_line(folder):
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=IndexReader(folder), planner=PlainValues())
    return state


def assert_example(state):
    expected = example()
    assert torch.equal(state["model"]["weight"], expected["model"]["weight"])
    assert state["model"]["half"].dtype == torch.bfloat16 and state["model"]["half"].tolist() == [1, 1]
    assert state["optimizer"].pop("step") == 3.0
    del expected["optimizer"]["step"]
    assert state["optimizer"] == expected["optimizer"]


@pytest.fixture
def ours(tmp_path):
    save(example(), IndexWriter(tmp_path / "ours"))
    return tmp_path / "ours"


@pytest.fixture
def of_torch(tmp_path):
    save(example(), dcp.FileSystemWriter(tmp_path / "torch", sync_files=False))
    return tmp_path / "torch"


def test_the_index_is_json_and_round_trips(ours):
    assert sorted(path.name for path in ours.iterdir()) == ["__0_0.distcp", INDEX]
    assert_example(load(ours))


def test_an_index_of_torch_is_read_as_ours_is(ours, of_torch):
    """Apart from the places in the file, which depend on nothing else, both say the same."""
    assert_example(load(of_torch))
    pickled, plain = read_pickled_index(of_torch / PICKLED), json.loads((ours / INDEX).read_text())
    assert plain.pop("version") == 1
    assert pickled == plain


def crafted(kind, marker):
    """A pickle that calls mkdir(marker) when it is unpickled as usual."""
    if kind == "call":
        return pickle.dumps(Touch(marker))
    if kind == "inside an index":
        metadata = dcp.Metadata(state_dict_metadata={}, planner_data=Touch(marker), storage_data={})
        return pickle.dumps(metadata)
    if kind == "old protocol":
        return b"cos\nmkdir\n(S'" + str(marker).encode() + b"'\ntR."
    if kind == "instance":
        return b"(S'" + str(marker).encode() + b"'\nios\nmkdir\n."
    if kind == "dotted name":  # protocol 4 looks names up through modules
        name = "serialization.os.mkdir"
        return (
            pickle.PROTO
            + b"\x04\x8c\x05torch\x8c"
            + bytes([len(name)])
            + name.encode()
            + b"\x93\x8c"
            + bytes([len(str(marker))])
            + str(marker).encode()
            + b"\x85R."
        )
    if kind == "extension":
        return pickle.PROTO + b"\x02\x82\x01."
    if kind == "getattr":
        return pickle.dumps(Touch(marker, getattr))
    raise AssertionError(kind)


KINDS = ("call", "inside an index", "old protocol", "instance", "dotted name", "extension", "getattr")


@pytest.mark.parametrize("kind", KINDS)
def test_a_crafted_pickle_runs_nothing(of_torch, tmp_path, kind):
    marker = tmp_path / "executed"
    content = crafted(kind, marker)
    if kind in KINDS[:5]:  # it would: the test can fail
        pickle.loads(content)
        marker.rmdir()
    (of_torch / PICKLED).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: not an index of a checkpoint") as raised:
        load(of_torch)
    assert not marker.exists() and "\n" not in str(raised.value)


def test_the_refused_name_is_named(of_torch, tmp_path):
    (of_torch / PICKLED).write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match=r"it names posix\.mkdir"):
        load(of_torch)


def test_a_pickle_cannot_change_a_class_for_the_next_reading(of_torch):
    """BUILD on a class sets its attributes; the class is made anew for each reading."""
    good = (of_torch / PICKLED).read_bytes()
    poison = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'field'\nNs\x86b."
    (of_torch / PICKLED).write_bytes(poison)
    with pytest.raises(CheckpointError):
        load(of_torch)
    (of_torch / PICKLED).write_bytes(good)
    assert_example(load(of_torch))


@pytest.mark.parametrize("place", ["whole", "value"])
def test_a_crafted_value_runs_nothing(ours, tmp_path, place):
    """Values that are no tensors, and tensors themselves, are torch.save's files within .distcp."""
    marker = tmp_path / "executed"
    stream = io.BytesIO()
    torch.save(Touch(marker) if place == "whole" else {"lr": Touch(marker)}, stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    marker.rmdir()
    index = json.loads((ours / INDEX).read_text())
    for key in ("optimizer.lr",):
        index["values"][key] = {"file": "more", "offset": 0, "length": len(stream.getvalue())}
    (ours / "more").write_bytes(stream.getvalue())
    (ours / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="cannot be read") as raised:
        load(ours)
    assert not marker.exists() and "\n" not in str(raised.value) and "mkdir" in str(raised.value)
    with pytest.raises(CheckpointError, match="mkdir"):
        load_plain(ours / "more")
    assert not marker.exists()


def test_a_crafted_tensor_runs_nothing(ours, tmp_path):
    marker = tmp_path / "executed"
    stream = io.BytesIO()
    torch.save(Touch(marker), stream)
    index = json.loads((ours / INDEX).read_text())
    index["tensors"]["model.weight"]["chunks"][0].update(file="more", offset=0, length=len(stream.getvalue()))
    (ours / "more").write_bytes(stream.getvalue())
    (ours / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="mkdir"):
        load(ours)
    assert not marker.exists()


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "empty": {},
    "no tensors": {"version": 1, "values": {}},
    "another version": {"version": 2, "tensors": {}, "values": {}},
    "no dtype": {"version": 1, "values": {}, "tensors": {"a": {"dtype": "load", "size": [], "chunks": []}}},
    "a negative size": {"version": 1, "values": {}, "tensors": {"a": {"dtype": "int8", "size": [-1], "chunks": []}}},
    "a file outside": {"version": 1, "tensors": {}, "values": {"a": {"file": "../x", "offset": 0, "length": 1}}},
    "an absolute file": {"version": 1, "tensors": {}, "values": {"a": {"file": "/etc/passwd", "offset": 0, "length": 1}}},
    "an offset that is text": {"version": 1, "tensors": {}, "values": {"a": {"file": "x", "offset": "0", "length": 1}}},
    "other tensors": {"version": 1, "tensors": {}, "values": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_index_is_one_line(ours, name):
    content = DAMAGED[name]
    (ours / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError) as raised:
        load(ours)
    assert str(ours) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_cut_file_is_one_line(ours, of_torch, cut):
    for file in (ours / "__0_0.distcp", of_torch / PICKLED):
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(CheckpointError) as raised:
            load(file.parent)
        assert str(file.parent) in str(raised.value) and "\n" not in str(raised.value)


def test_no_index_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither index\.json nor \.metadata"):
        load(tmp_path)
