"""Crafted and damaged files of every kind that is read: nothing in them runs, and each is refused in one line."""

import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.selectors._npy import read_npy
from dataflex_mega.compare import suite
from dataflex_mega.config import components, load
from dataflex_mega.data import manifest
from dataflex_mega.data.score_files import read_scores
from dataflex_mega.engines.checkpoint_index import load_plain
from dataflex_mega.errors import UserError
from dataflex_mega.offline.embeddings import open_embeddings
from dataflex_mega.store.manifest import read_manifest


class Touch:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def refused(function, *arguments):
    with pytest.raises(UserError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# -- .npy --------------------------------------------------------------------------------------------------------------


def npy(header, data=b"", version=1):
    text = header.encode()
    length = struct.pack("<H", len(text)) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def objects(marker):
    stream = io.BytesIO()
    np.save(stream, np.array([Touch(marker)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def archive(_):
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    return stream.getvalue()


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}"
ARRAYS = {
    "objects": objects,
    "a pickle": lambda marker: pickle.dumps(Touch(marker)),
    "torch's file": lambda marker: torch_file(marker),
    "an archive": archive,
    "code": lambda marker: npy(f"__import__('os').mkdir({str(marker)!r})\n"),
    "code in a field": lambda marker: npy(GOOD.replace("(2, 2)", f"(__import__('os').mkdir({str(marker)!r}), 2)")),
    "code of the other version": lambda marker: npy(f"__import__('os').mkdir({str(marker)!r})\n", version=2),
    "no literal": lambda _: npy("{'descr': \n"),
    "deep": lambda _: npy("(" * 9000),
    "long": lambda _: npy(" " * 60_000),
    "no field": lambda _: npy("{'descr': '<f4'}\n"),
    "a list": lambda _: npy("[1, 2]\n"),
    "huge": lambda _: npy(GOOD.replace("(2, 2)", "(1099511627776, 1024)"), b"\0" * 16),
    "negative": lambda _: npy(GOOD.replace("(2, 2)", "(-2, -2)"), b"\0" * 16),
    "text in the shape": lambda _: npy(GOOD.replace("(2, 2)", "('2', 2)"), b"\0" * 16),
    "no tuple": lambda _: npy(GOOD.replace("(2, 2)", "2"), b"\0" * 16),
    "cut": lambda _: npy(GOOD + "\n", b"\0" * 15),
    "empty": lambda _: b"",
    "magic alone": lambda _: b"\x93NUMPY",
    "texts": lambda _: npy(GOOD.replace("<f4", "<U4"), b"\0" * 64),
}


def torch_file(marker):
    stream = io.BytesIO()
    torch.save(Touch(marker), stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(tmp_path, marker, name):
    file = tmp_path / "x.npy"
    file.write_bytes(ARRAYS[name](marker))
    readers = [
        lambda: read_scores(str(file), "score"),
        lambda: open_embeddings(file),
        lambda: read_npy(file, {"<f4": torch.float32}, ("N", "K"), "numbers"),
    ]
    for read in readers:
        assert str(file) in refused(read)


def test_a_good_array_is_read(tmp_path):
    file = tmp_path / "x.npy"
    file.write_bytes(npy(GOOD + "\n", np.arange(4, dtype="<f4").tobytes()))
    assert read_scores(str(file), "score").tolist() == [0, 1, 2, 3]
    assert open_embeddings(file)[0].tolist() == [[0, 1], [2, 3]]
    assert read_npy(file, {"<f4": torch.float32}, ("N", "K"), "numbers").tolist() == [[0, 1], [2, 3]]


# -- YAML and JSON -----------------------------------------------------------------------------------------------------

TAGS = (
    "!!python/object/apply:os.mkdir [{}]",
    "!!python/object/new:os.mkdir [{}]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('{}')\"]",
    "!custom {}",
)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("nested", ["{}: {}", "a: {{{}: {}}}", "a:\n  - {{{}: {}}}"])
def test_tags_of_yaml(tmp_path, marker, tag, nested):
    file = tmp_path / "x.yaml"
    file.write_text(nested.format("mixer", tag.replace("{}", str(marker))) + "\n")
    assert "x.yaml" in refused(load.load, str(file))
    assert "x.yaml" in refused(suite.read, str(file))
    assert "x.yaml" in refused(components.read_component, str(file), "mixers", "odm")


def test_interpolations_call_nothing(tmp_path, marker):
    file = tmp_path / "x.yaml"
    created = f"a: ${{oc.create:{{_target_: os.mkdir, path: {marker}}}}}"
    for text in (f"a: ${{eval:__import__('os').mkdir('{marker}')}}", created):
        file.write_text(text)
        try:
            assert "path" in load.load(str(file))["a"]
        except UserError as error:
            assert "\n" not in str(error)


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in (folder / "code", tmp_path / "outside"):
        file.with_suffix(".bin").write_bytes(b"\0" * 20)
        file.with_suffix(".idx").write_bytes(b"x")
    domain = manifest.CorpusDomain("code", "code", 2, 10, 1.0, "a", "b")
    tokenizer = manifest.CorpusTokenizer("f" * 64, 512, 0)
    made = manifest.Corpus(folder, "uint16", tokenizer, (domain,), 2, 0, (), "r")
    (folder / manifest.NAME).write_text(made.to_json())
    return folder


CHANGES = {
    "a file above": {"prefix": "../outside"},
    "an absolute file": {"prefix": "{tmp}/outside"},
    "a folder": {"prefix": ".."},
    "no prefix": {"prefix": ""},
    "a prefix that is a number": {"prefix": 5},
    "no name": {"name": None},
    "a name that is a list": {"name": ["code"]},
    "tokens that are text": {"tokens": "10"},
    "tokens below zero": {"tokens": -10},
    "documents that are true": {"documents": True},
    "a field too many": {"more": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_manifests_of_corpora(corpus, tmp_path, name):
    content = json.loads((corpus / manifest.NAME).read_text())
    changes = {key: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for key, v in CHANGES[name].items()}
    content["domains"][0].update(changes)
    (corpus / manifest.NAME).write_text(json.dumps(content))
    assert refused(manifest.read, corpus).startswith(f"corpus_dir: {corpus / manifest.NAME} is damaged: ")


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", "[" * 100_000, '{"version": 1}', '{"version": [1], "identity": 1}']
)
def test_manifests_of_any_kind(corpus, content):
    (corpus / manifest.NAME).write_text(content)
    assert manifest.NAME in refused(manifest.read, corpus)
    assert manifest.NAME in refused(read_manifest, corpus / manifest.NAME, "store", 1)


def test_a_domain_that_is_listed_twice(corpus):
    content = json.loads((corpus / manifest.NAME).read_text())
    content["domains"] *= 2
    (corpus / manifest.NAME).write_text(json.dumps(content))
    assert "domain 'code' is listed 2 times" in refused(manifest.read, corpus)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_common_values_of_megatron(tmp_path, marker):
    file = tmp_path / "common.pt"
    for content in ({"optimizer": {"lr": Touch(marker)}}, Touch(marker)):
        torch.save(content, file)
        message = refused(load_plain, file)
        assert message == f"{file}: cannot be read: it names posix.mkdir, which is not executed"
    for content in (b"", b"PK\x03\x04", pickle.dumps(Touch(marker)), b"\x80\x02."):
        file.write_bytes(content)
        assert str(file) in refused(load_plain, file)
    torch.save({"optimizer": {"param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "step": torch.ones(())}]}}, file)
    assert load_plain(file)["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)


def header(text, length=None):
    content = text.encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


WEIGHTS = {
    "empty": b"",
    "cut": struct.pack("<Q", 100) + b"{",
    "a huge header": header("{}", 1 << 62),
    "no JSON": header("__import__('os')"),
    "beyond the end": header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    "overlapping": header(
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        ' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    )
    + b"\0" * 8,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_safetensors_of_a_model(tmp_path, name):
    weights = pytest.importorskip("dataflex_mega.engines.megatron.weights", reason="needs megatron-core")
    from transformers import LlamaConfig

    (tmp_path / weights.ONE_FILE).write_bytes(WEIGHTS[name])
    assert str(tmp_path) in refused(weights.HFCheckpointReader, tmp_path, LlamaConfig(num_hidden_layers=1))


@pytest.mark.parametrize("listed", [[], None, {"a": "../x.safetensors"}, {"a": 5}, {"a": "/etc/passwd"}])
def test_indexes_of_a_model(tmp_path, listed):
    weights = pytest.importorskip("dataflex_mega.engines.megatron.weights", reason="needs megatron-core")
    from transformers import LlamaConfig

    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": listed}))
    assert weights.INDEX in refused(weights.HFCheckpointReader, tmp_path, LlamaConfig(num_hidden_layers=1))
