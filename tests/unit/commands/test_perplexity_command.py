"""`dataflex-cli perplexity`: messages that name its options, not keys of a YAML."""

from pathlib import Path
from typing import Any

import pytest

from dataflex_mega import cli
from dataflex_mega.commands import perplexity
from tests.support import corpus


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "eval_corpus_dir: domain 'a' has 21 tokens, a row of cutoff_len has 2048",
            "--corpus: domain 'a' has 21 tokens, a row of --cutoff-len has 2048",
        ),
        ("eval_dataset: no domain 'x'; there is a, b", "--dataset: no domain 'x'; there is a, b"),
        ("dataset_dir: /my/dataset_dir not found", "--dataset-dir: /my/dataset_dir not found"),
        ("dataset 'x' of the stage: no target tokens", "--dataset 'x' of the stage: no target tokens"),
        ("template: no template 'template'", "--template: no template 'template'"),
        ("batch size: must be at least 1, found 0", "--batch-size: must be at least 1, found 0"),
        ("the template is missing", "the template is missing"),
    ],
)
def test_keys_become_the_options_that_stand_for_them(message: str, expected: str) -> None:
    assert perplexity.with_options(message) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = corpus.write(tmp_path_factory.mktemp("perplexity"))
    options = ["--dataset", "prose", "--dataset-dir", str(made / "data"), "--tokenizer", str(made / "model")]
    assert cli.main(["corpus", *options, "--output", str(made / "corpus")]) == 0
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cutoff-len", "99999999"], "error: --corpus: domain 'prose' has "),
        (["--cutoff-len", "99999999"], " tokens, a row of --cutoff-len has 99999999\n"),
        (["--batch-size", "0"], "error: --batch-size: must be at least 1, found 0\n"),
        (["--dataset", "poetry"], "error: --dataset: "),
    ],
)
def test_a_mistake_in_an_option_is_named_by_the_option(
    options: list[str], message: str, folder: Path, capsys: Any
) -> None:
    typed = ["--model", str(folder / "model"), "--corpus", str(folder / "corpus"), "--cutoff-len", "32", *options]
    assert cli.main(["perplexity", *typed]) == 2
    error = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert message in error and error.startswith("error: ")
