"""The reference losses: reading gives what was written, builds resume, other identities and damage are named."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex_mega.errors import CheckpointError
from dataflex_mega.store.reference_losses import BLOCK_SIZE, ReferenceLossCache, model_fingerprint

SAMPLES = 2 * BLOCK_SIZE + 17
IDENTITY = {"model": "abc", "data": {"code": "1", "prose": "2"}, "cutoff_len": 32}


def losses(sample: int) -> torch.Tensor:
    return torch.linspace(0, 3, sample % 5 + 1) + sample / 7


def cache(folder: Path, **changes: Any) -> ReferenceLossCache:
    options = {"identity": IDENTITY, "samples": SAMPLES, "dtype": "float32", **changes}
    return ReferenceLossCache(folder, options["identity"], options["samples"], options["dtype"])


def write(made: ReferenceLossCache, blocks: list[int]) -> None:
    for block in blocks:
        made.write_block(block, [losses(int(i)) for i in made.ids_of_block(block)])


@pytest.fixture
def built(tmp_path: Path) -> ReferenceLossCache:
    made = cache(tmp_path / "cache")
    made.create_or_resume()
    write(made, [0, 1, 2])
    made.finalize()
    return made


def test_every_sample_comes_back_in_any_order(built: ReferenceLossCache) -> None:
    ids = np.random.default_rng(0).permutation(SAMPLES)
    for i, found in zip(ids, cache(built.folder).fetch(ids), strict=True):
        assert found.dtype == np.float32 and found.tolist() == losses(int(i)).tolist()


def test_a_block_is_laid_out_as_its_documentation_says(built: ReferenceLossCache) -> None:
    raw = built.block_file(2).read_bytes()
    content, count = raw[:-32], 17
    assert hashlib.sha256(content).digest() == raw[-32:]
    begins = struct.unpack(f"<{count + 1}q", content[: 8 * (count + 1)])
    values = struct.unpack(f"<{begins[-1]}f", content[8 * (count + 1) :])
    for place in range(count):
        assert list(values[begins[place] : begins[place + 1]]) == losses(2 * BLOCK_SIZE + place).tolist()


def test_bfloat16_is_half_the_size_and_rounds_as_torch_does(tmp_path: Path) -> None:
    made = cache(tmp_path, dtype="bfloat16", samples=3)
    made.create_or_resume()
    write(made, [0])
    made.finalize()
    for i, found in enumerate(made.fetch(np.arange(3))):
        assert found.tolist() == losses(i).bfloat16().float().tolist()
    assert made.block_file(0).stat().st_size == 8 * 4 + 2 * (1 + 2 + 3) + 32


def test_a_build_that_was_cut_off_goes_on_and_ends_in_the_same_bytes(built: ReferenceLossCache, tmp_path: Path) -> None:
    other = cache(tmp_path / "other")
    other.create_or_resume()
    write(other, [1])
    (other.folder / ".block-000002.bin.7-ab.tmp").write_bytes(b"half a bl")  # what a kill leaves
    other.block_file(0).write_bytes(built.block_file(0).read_bytes()[:-5])
    again = cache(tmp_path / "other")
    again.create_or_resume()
    assert not again.is_complete() and again.missing_blocks() == [0, 2]
    with pytest.raises(CheckpointError, match="block-000000"):
        again.finalize()
    write(again, [0, 2])
    again.finalize()
    assert again.is_complete() and again.integrity_errors() == []
    for name in ("block-000000.bin", "block-000001.bin", "block-000002.bin", "manifest.json"):
        assert (again.folder / name).read_bytes() == (built.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"identity": {**IDENTITY, "model": "def"}}, "model: abc there, def here"),
        ({"identity": {**IDENTITY, "cutoff_len": 64}}, "cutoff_len: 32 there, 64 here"),
        ({"identity": {**IDENTITY, "data": {"code": "1", "prose": "3"}}}, "data:"),
        ({"samples": SAMPLES - 1}, f"samples: {SAMPLES} there, {SAMPLES - 1} here"),
        ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 here"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(built: ReferenceLossCache, changes: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        cache(built.folder, **changes).is_complete()


def test_damage_is_found_by_whoever_has_the_block(built: ReferenceLossCache) -> None:
    raw = bytearray(built.block_file(1).read_bytes())
    raw[500] ^= 1
    built.block_file(1).write_bytes(raw)
    faults = [cache(built.folder).integrity_errors(rank, 2) for rank in range(2)]
    assert faults[0] == [] and "block-000001.bin is missing or damaged" in faults[1][0]
    built.block_file(2).unlink()
    assert "block-000002.bin" in cache(built.folder).integrity_errors(0, 2)[0]


def test_a_block_of_the_right_form_but_another_build_is_damage_too(built: ReferenceLossCache) -> None:
    built.write_block(1, [losses(int(i)) + 1 for i in built.ids_of_block(1)])
    assert "block-000001.bin" in cache(built.folder).integrity_errors()[0]


def test_a_manifest_that_is_not_one_is_named(built: ReferenceLossCache) -> None:
    (built.folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        cache(built.folder).is_complete()
    (built.folder / "manifest.json").write_text(json.dumps({"version": 9, "identity": {}, "blocks": None}))
    with pytest.raises(CheckpointError, match="version 9"):
        cache(built.folder).is_complete()


def test_an_unfinished_cache_is_not_read(tmp_path: Path) -> None:
    made = cache(tmp_path)
    made.create_or_resume()
    assert not made.is_complete() and "not finished" in made.integrity_errors()[0]
    with pytest.raises(CheckpointError, match=r"block-000000\.bin cannot be read"):
        made.fetch(np.arange(1))


def test_wrong_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block 0 has 256 samples, given 1"):
        cache(tmp_path).write_block(0, [torch.ones(3)])


def test_a_models_fingerprint_follows_its_weights_and_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        model_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = model_fingerprint(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"of no matter")
    assert model_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    second = model_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({first, second, model_fingerprint(tmp_path)}) == 3
