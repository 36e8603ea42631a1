"""The examples that help prints run as they are printed, with files of the test in place of the placeholders."""

import re
import shlex
import shutil

import pytest
import yaml

from dataflex_mega import cli
from dataflex_mega.train import HELP
from tests.support import corpus, runs
from tests.support.bad_inputs import llamafactory  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("printed"))


def printed():
    """The commands of `dataflex-cli help`, without what stands behind two spaces."""
    lines = cli.help_text().partition("examples:\n")[2].splitlines()
    commands = [re.split(r"\s{2,}", line.strip())[0] for line in lines if "dataflex-cli " in line]
    return [command for command in commands if "NPROC_PER_NODE" not in command]


def test_help_has_examples():
    assert len(printed()) >= 4 and any(" export " in command for command in printed())


@pytest.mark.parametrize("command", printed())
def test_an_example_of_help_runs_as_printed(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    keys = runs.base(
        folder, output_dir=str(folder / "out" / str(abs(hash(command)))), max_steps=2, finetuning_type="lora"
    )
    if command.endswith("run.yaml"):
        keys["mixer"], keys["update_step"] = "static", 1  # training by LLaMA-Factory is tested elsewhere
    (folder / "run.yaml").write_text(yaml.safe_dump({**keys, "lora_target": "all"}))
    words = shlex.split(command)[1:]
    if words[0] == "export":
        adapter = runs.base(folder, output_dir=str(folder / "adapter"), max_steps=1, finetuning_type="lora", mixer="static",
                            lora_target="all", save_strategy="steps")  # fmt: skip
        assert runs.train_here(adapter)[0] == 0
        places = {
            "base": str(folder / "model"),
            "out": str(folder / "adapter"),
            "qwen": "empty",
            "merged": str(folder / "m"),
            "saves/run/checkpoint-100": str(folder / "adapter" / "checkpoint-1"),
            "true": "true",
        }
        shutil.rmtree(folder / "m", ignore_errors=True)
        words = ["export", *("=".join([*word.split("=")[:-1], places[word.split("=")[-1]]]) for word in words[1:])]
    monkeypatch.setattr("sys.argv", ["dataflex-cli"])
    status = cli.main(words)
    assert status == 0, capsys.readouterr().err
    if words[0] == "export":
        assert (folder / "m" / "config.json").is_file()


def test_the_help_of_training_names_keys_that_exist(folder):
    for line in re.findall(r"^  (selector|mixer|weighter): (\w+)", HELP, re.MULTILINE):
        assert cli.main(["components", line[0], *[]]) == 0


@pytest.mark.parametrize("command", cli.command_names())
def test_every_command_has_help(command, capsys):
    try:
        status = cli.main([command, "--help"])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert status == 0 and said.out and not said.err
