"""The manifest of a corpus: what was written is read, and missing or damaged files are named."""

import json

import pytest

from dataflex_mega.data import manifest
from dataflex_mega.data.manifest import Corpus, CorpusDomain, CorpusTokenizer, check_tokenizer, tokenizer_fingerprint
from dataflex_mega.errors import DataError
from tests.support.corpus import tool


@pytest.fixture
def folder(tmp_path):
    for name, tokens in (("code", 10), ("prose", 30)):
        (tmp_path / f"{name}.bin").write_bytes(b"\0" * 2 * tokens)
        (tmp_path / f"{name}.idx").write_bytes(b"x")
    domains = (
        CorpusDomain("code", "code", 2, 10, 0.25, "a", "b"),
        CorpusDomain("prose", "prose", 3, 30, 0.75, "c", "d"),
    )
    made = Corpus(
        tmp_path, "uint16", CorpusTokenizer("f" * 64, 512, 0), domains, 6, 1, ({"path": "x", "bytes": 9},), "r"
    )
    (tmp_path / manifest.NAME).write_text(made.to_json())
    return tmp_path


def refused(folder, key="corpus_dir"):
    with pytest.raises(DataError) as caught:
        manifest.read(folder, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_is_read(folder):
    found = manifest.read(folder)
    assert found.names == ("code", "prose") and found.tokens == 40 and found.bad_rows == 1
    assert found.to_json() == (folder / manifest.NAME).read_text()
    assert found.prefix(found.domains[1]) == folder / "prose"


def test_domains_are_picked_in_the_order_asked_for(folder):
    corpus = manifest.read(folder)
    assert [d.name for d in corpus.pick(["prose", "code"])] == ["prose", "code"]
    assert corpus.pick([]) == corpus.domains
    with pytest.raises(DataError, match=r"dataset: 'prosa' is not a domain of .* \(did you mean 'prose'\?\)"):
        corpus.pick(["prosa"])
    with pytest.raises(DataError, match=r"eval_dataset: 'zzz' .*; it has code, prose"):
        corpus.pick(["zzz"], "eval_dataset")


def test_a_missing_folder_or_manifest_is_named_with_the_nearest_name(folder):
    assert f"(did you mean {folder.name!r}?)" in refused(folder.with_name(folder.name + "_"))
    (folder / manifest.NAME).unlink()
    assert "eval_corpus_dir: " in refused(folder, "eval_corpus_dir") and "manifest.json not found; " in refused(folder)


def test_files_that_are_gone_or_of_another_size_are_named(folder):
    (folder / "code.bin").write_bytes(b"\0" * 18)
    assert "code.bin has 18 bytes, its manifest says 20" in refused(folder)
    (folder / "code.idx").unlink()
    assert "code.idx not found (domain 'code'" in refused(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("domains"), "is damaged: KeyError 'domains'"),
        (lambda m: m.update(version=9), "has version 9, this program reads 1"),
        (lambda m: m.update(format="other"), "is not a corpus manifest"),
        (lambda m: m.update(dtype="int8"), "is damaged: dtype 'int8'"),
        (lambda m: m["domains"][0].pop("tokens"), "is damaged: TypeError"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, change, words):
    found = json.loads((folder / manifest.NAME).read_text())
    change(found)
    (folder / manifest.NAME).write_text(json.dumps(found))
    assert words in refused(folder)


def test_files_of_megatron_without_a_manifest_name_the_command_that_writes_it(folder):
    (folder / manifest.NAME).unlink()
    assert "dataflex-cli corpus --from-megatron" in refused(folder)
    for path in folder.glob("*.idx"):
        path.unlink()
    assert "; `dataflex-cli corpus` writes it" in refused(folder)


def test_text_that_is_not_json_is_refused(folder):
    (folder / manifest.NAME).write_text("{")
    assert "not JSON" in refused(folder)


def test_the_fingerprint_knows_another_vocabulary_but_no_added_token():
    maker = tool("tiny_model")
    one, other = maker.make_tokenizer(["ab ab abc"], 300), maker.make_tokenizer(["xy xy xyz"], 300)
    first = tokenizer_fingerprint(one)
    assert first != tokenizer_fingerprint(other)
    one.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert tokenizer_fingerprint(one) == first


def test_a_corpus_of_another_tokenizer_is_refused(folder):
    with pytest.raises(DataError, match="corpus_dir: .* was tokenized with another tokenizer"):
        check_tokenizer(manifest.read(folder), tool("tiny_model").make_tokenizer(["ab"], 300))


def test_a_domain_counts_once(folder):
    corpus = manifest.read(folder)
    with pytest.raises(DataError, match=r"dataset: .* is listed 2 times"):
        corpus.pick([corpus.names[0], corpus.names[0]])
    content = json.loads((folder / manifest.NAME).read_text())
    content["domains"].append(content["domains"][0])
    (folder / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"is damaged: domain .* is listed 2 times"):
        manifest.read(folder)
