"""`corpus_dir` and `eval_corpus_dir`: what they allow, fill in, and refuse."""

import pytest

from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.corpus import with_names
from dataflex_mega.config.fates import FATES
from dataflex_mega.config.parse import parse_config
from dataflex_mega.data import manifest
from dataflex_mega.data.manifest import Corpus, CorpusDomain, CorpusTokenizer
from dataflex_mega.errors import ConfigError, DataError
from tests.unit.config.conftest import LF_KEYS


def write_corpus(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / f"{name}.bin").write_bytes(b"\0" * 20)
        (folder / f"{name}.idx").write_bytes(b"x")
    domains = tuple(CorpusDomain(name, name, 2, 10, 1 / len(names), "", "") for name in names)
    made = Corpus(folder, "uint16", CorpusTokenizer("f", 512, 0), domains, 2, 0, (), "")
    (folder / manifest.NAME).write_text(made.to_json())


@pytest.fixture
def check(tmp_path):
    """Check a run on a corpus of code, prose, tables but for `keys`; None takes a key out -> its configuration."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_corpus(tmp_path / "train", "code", "prose", "tables")
    write_corpus(tmp_path / "held", "code", "prose")
    right = {
        "model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "stage": "pt",
        "mixer": "static", "corpus_dir": str(tmp_path / "train"),
    }  # fmt: skip
    known = {**dict.fromkeys(FATES, "bool"), "dataset_dir": "str", **LF_KEYS}

    def check(**keys):
        for key in ("corpus_dir", "eval_corpus_dir"):
            if keys.get(key):
                keys[key] = str(tmp_path / keys[key])
        given = {key: value for key, value in {**right, **keys}.items() if value is not None}
        config = parse_config(given, known)
        check_dynamic(config)
        return config

    return check


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"dataset": "prose,code"},
        {"eval_corpus_dir": "held", "eval_strategy": "steps"},
        {"eval_corpus_dir": "held", "eval_dataset": "prose", "eval_strategy": "steps"},
        {"mixture_sample_rule": "stratified"},
        {"init_mixture_proportions": [1, 2, 3]},
        {"dataset": "prose", "init_mixture_proportions": [1]},
    ],
)
def test_right_configurations_pass(check, keys):
    check(**keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"corpus_dir": "trains"}, "corpus_dir: folder"),
        ({"dataset": "code,prosa"}, "dataset: 'prosa' is not a domain of"),
        ({"dataset": "code,code"}, "dataset: 'code' is listed 2 times"),
        ({"eval_corpus_dir": "held", "eval_dataset": "tables"}, "eval_dataset: 'tables' is not a domain of"),
        ({"eval_dataset": "code"}, "eval_dataset: with corpus_dir it names domains of eval_corpus_dir"),
        ({"eval_strategy": "steps"}, "eval_strategy: steps needs eval_corpus_dir"),
        ({"corpus_dir": None, "dataset": "a", "eval_corpus_dir": "held"}, "eval_corpus_dir: needs corpus_dir"),
        ({"stage": "sft"}, "corpus_dir: a corpus is for stage: pt, found stage: sft"),
        ({"cutoff_len": 1}, "cutoff_len: a row needs at least 2 tokens, found 1"),
        ({"packing": False}, "packing: has no effect with corpus_dir"),
        ({"packing": True}, "packing: has no effect with corpus_dir"),
        ({"neat_packing": True}, "neat_packing: has no effect with corpus_dir"),
        ({"val_size": 0.1}, "val_size: has no effect with corpus_dir"),
        ({"dataset_dir": "data"}, "dataset_dir: has no effect with corpus_dir"),
        ({"max_samples": 5}, "max_samples: has no effect with corpus_dir"),
        ({"init_mixture_proportions": [1, 2]}, "2 numbers for 3 datasets (code, prose, tables)"),
        ({"mixer": None}, "corpus_dir: has no effect with train_type: static, since LLaMA-Factory cannot read"),
        ({"mixer": None, "train_type": "static"}, "corpus_dir: has no effect with train_type: static"),
        (
            {"mixer": None, "train_type": "static", "corpus_dir": None, "eval_corpus_dir": "held"},
            "eval_corpus_dir: has no",
        ),
    ],
)
def test_contradictions_are_refused_by_name(check, keys, words):
    with pytest.raises((ConfigError, DataError)) as caught:
        check(**keys)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_plain_training_on_megatron_may_read_a_corpus(check):
    config = check(mixer=None, train_type="static", engine="megatron")
    assert config.dataflex.corpus_dir is not None


def test_all_domains_stand_in_for_a_dataset_that_is_left_out(check):
    config = check(eval_corpus_dir="held")
    every = with_names(config.dataflex, config.llamafactory, [], [])
    assert (every["dataset"], every["eval_dataset"]) == (["code", "prose", "tables"], ["code", "prose"])
    some = with_names(config.dataflex, config.llamafactory, ["prose"], ["code"])
    assert (some["dataset"], some["eval_dataset"]) == (["prose"], ["code"])
    assert "dataset" not in config.llamafactory
    config = check()
    assert "eval_dataset" not in with_names(config.dataflex, config.llamafactory, [], [])
