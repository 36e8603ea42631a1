"""`dataflex-cli store`: what it takes, what it refuses, and when it starts further processes."""

import sys

import pytest
import torch

from dataflex_mega import cli
from dataflex_mega.commands import _launcher
from dataflex_mega.commands import store as store_command
from dataflex_mega.errors import ConfigError
from dataflex_mega.store import build
from dataflex_mega.store.layout import StoreLayout


@pytest.fixture
def built(tmp_path):
    layout = StoreLayout(num_samples=20, width=4, num_shards=2, block_size=8)
    for shard in range(2):
        writer = build.ShardWriter(tmp_path, build.create_or_resume(tmp_path, {"model": "abc"}, layout), shard)
        for block in writer.missing_blocks:
            writer.write(torch.full((len(layout.ids_of_block(block)), 4), float(block)))
        writer.close()
    build.finalize(tmp_path, {"model": "abc"}, layout)
    return tmp_path


def test_help_says_how_and_needs_no_process(capsys, monkeypatch):
    monkeypatch.setattr(_launcher, "device_count", lambda: 8)
    assert cli.main(["store", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"dataflex-cli store {command}" in printed for command in store_command.COMMANDS)
    assert cli.main(["store"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bild", "run.yaml"], "invalid choice: 'bild'"),
        (["build"], "required: what"),
        (["info", "out", "selector.side=4"], "store info: takes one folder"),
        (["verify", "out", "--folder", "x"], "store verify: takes one folder"),
        (["score", "run.yaml", "--top", "0"], "--top must be at least 1, found 0"),
        (["score", "run.yaml", "--output", "x.txt"], "--output must end in .npy"),
        (["score", "run.yaml", "--weights", "1,2"], "with at least one checkpoint"),
        (["build", "run.yaml", "--checkpoints", "a"], "belong to score"),
        (["score", "run.yaml", "--checkpoints", "a,b", "--weights", "1"], "for each of 2 checkpoints, found [1.0]"),
        (["score", "run.yaml", "--checkpoints", "a,b", "--weights", "1,-2"], "must be a number > 0"),
        (["score", "run.yaml", "--checkpoints", "a", "--folder", "x"], "leave out --folder"),
        (["score", "run.yaml", "--checkpoints", "a", "--weights", "x"], "invalid numbers value: 'x'"),
    ],
)
def test_what_it_does_not_take_is_one_line(capsys, argv, message):
    assert cli.main(["store", *argv]) == 2
    heard = capsys.readouterr().err
    assert message in heard and heard.count("\n") == 1


def test_options_may_stand_anywhere():
    given = store_command.parse_arguments(
        ["score", "run.yaml", "--top", "3", "selector.side=4", "--folder", "x", "seed=1"]
    )
    assert (given.what, given.overrides, given.top, str(given.folder)) == (
        "run.yaml",
        ["selector.side=4", "seed=1"],
        3,
        "x",
    )
    with pytest.raises(ConfigError):
        store_command.parse_arguments(["score", "run.yaml", "--tpo", "3"])


def test_info_and_verify_read_a_store(built, capsys):
    assert cli.main(["store", "info", str(built)]) == 0
    printed = capsys.readouterr().out
    assert (
        "20 samples x 4 numbers" in printed
        and "shards: 2, blocks: 3 of 8 samples" in printed
        and "model: abc" in printed
    )
    assert cli.main(["store", "verify", str(built)]) == 0
    assert "3 blocks, 20 samples" in capsys.readouterr().out
    path = built / "shard-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert cli.main(["store", "verify", str(built)]) == 1
    assert "damaged in the rows of samples 16..19" in capsys.readouterr().out
    assert cli.main(["store", "info", str(built / "none")]) == 2


def test_building_goes_through_torchrun_where_there_are_several_processes(monkeypatch, tmp_path):
    started = []
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    monkeypatch.setattr(_launcher, "check_configuration", lambda given: started.append(given))
    monkeypatch.setattr(_launcher, "run_child", lambda command: started.append(command) or 7)
    assert cli.main(["store", "build", "run.yaml", "--folder", "x", "seed=1"]) == 7
    assert started[0] == ["run.yaml", "seed=1"]
    assert started[1][:2] == [sys.executable, "-m"] and "--nproc_per_node=4" in started[1]
    assert started[1][-7:] == [
        "-m", "dataflex_mega.commands.store", "build", "run.yaml", "--folder", "x", "seed=1",
    ]  # fmt: skip
