"""The command line: help, delegation to LLaMA-Factory, and when it starts further processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from dataflex_mega import cli
from dataflex_mega.commands import _launcher
from dataflex_mega.errors import UserError

ARGUMENTS = ["run.yaml", "a b=c"]
LAUNCHER_VARIABLES = (
    "NPROC_PER_NODE", "FORCE_TORCHRUN", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "MIN_NNODES",
    "MAX_NNODES", "MAX_RESTARTS", "LOCAL_RANK", "WORLD_SIZE", "USE_RAY",
)  # fmt: skip


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def devices(count):
    return lambda: count


def options(environment, count=0):
    """The torchrun options of an environment, as name -> value."""
    command = _launcher.torchrun_command(environment, ARGUMENTS, devices(count), "dataflex_mega.train")
    assert command[:3] == [sys.executable, "-m", "dataflex_mega.distributed.torchrun"]
    assert command[-4:] == ["-m", "dataflex_mega.train", *ARGUMENTS]
    return dict(option.removeprefix("--").split("=", 1) for option in command[3:-4])


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["-h"]])
def test_help_teaches_by_example(capsys, argv):
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    for name in ("train", "components", "env", "version", *cli.DELEGATED):
        assert name in printed
    assert "dataflex-cli train run.yaml mixer=odm" in printed


def test_every_command_has_a_file_and_a_place_in_the_help():
    assert [name for name, _ in cli.load_commands()] == [
        "train", "reference", "store", "doremi", "components", "compare", "regmix", "perplexity", "export", "embed", "near",
        "tsds", "corpus", "convert", "demo", "setup", "env", "version",
    ]  # fmt: skip
    for name, module in cli.load_commands():
        assert callable(module.main), name
        assert f"\n  {name}" in cli.help_text() or f"| {name} " in cli.help_text()


def test_a_new_file_is_a_new_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "greet.py").write_text(
        "SUMMARY = 'greet NAME   say hello'\n\n\ndef main(argv):\n    print('hello', *argv)\n    return 5\n"
    )
    monkeypatch.setattr(cli.commands, "__path__", [*cli.commands.__path__, str(tmp_path)])
    assert cli.main(["greet", "you"]) == 5
    assert capsys.readouterr().out == "hello you\n"
    assert "  greet NAME   say hello\n  help " in cli.help_text()


def test_only_what_is_run_is_imported():
    code = "import sys; from dataflex_mega import cli; cli.main(['help']); assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version_is_the_installed_one(capsys):
    from importlib.metadata import version

    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"dataflex_mega {version('dataflex_mega')}\n"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("trian", "(did you mean 'train'?)"),
        ("exprot", "(did you mean 'export'?)"),
        ("zzz", "; there is train, reference, store, doremi, components"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(capsys, command, hint):
    assert cli.main([command]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    assert heard.err.startswith(f"error: unknown command {command!r}{hint if hint[0] == ';' else ' ' + hint}")
    assert heard.err.count("\n") == 1


def test_train_help_is_that_of_training(capsys):
    assert cli.main(["train", "--help"]) == 0
    assert "CONFIG is a LLaMA-Factory training YAML" in capsys.readouterr().out


def test_training_in_this_process_ends_with_one_line_for_a_mistake(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(_launcher, "device_count", devices(0))
    assert cli.main(["train", str(tmp_path / "no.yaml")]) == 2
    heard = capsys.readouterr().err
    assert heard == f"error: config: {tmp_path / 'no.yaml'} not found\n"


def test_env_asks_the_doctor(monkeypatch):
    from dataflex_mega import doctor

    heard = []
    monkeypatch.setattr(doctor, "main", lambda argv: heard.append(argv) or 3)
    assert cli.main(["env", "--x"]) == 3
    assert heard == [["--x"]]


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "dataflex_mega", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown command 'trian' (did you mean 'train'?)\n")


# -- components --------------------------------------------------------------------------------------------------------


def test_components_lists_every_algorithm_with_its_parameters(capsys):
    from dataflex_mega.registry import CONTRACTS, get_parameters, list_builtin_names

    assert cli.main(["components"]) == 0
    sections = dict(zip(CONTRACTS, capsys.readouterr().out.split("\n\n"), strict=True))
    for role, section in sections.items():
        assert section.startswith(f"{role}:\n")
        for name in list_builtin_names(role):
            assert f"\n  {name} " in section
            for key, parameter in get_parameters(role, name).items():
                assert f"    {key}: {parameter.type_text} " in section


def test_components_of_one_role(capsys):
    assert cli.main(["components", "mixer"]) == 0
    printed = capsys.readouterr().out
    assert "mixer:" in printed
    assert "selector:" not in printed


def test_components_of_no_role(capsys):
    assert cli.main(["components", "mixr"]) == 2
    assert "no role 'mixr' (did you mean 'mixer'?)" in capsys.readouterr().err


# -- starting processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [
        ({}, 0, False),
        ({}, 1, False),
        ({}, 2, True),
        ({"USE_RAY": "1"}, 2, False),
        ({"NPROC_PER_NODE": "1"}, 2, False),
        ({"NPROC_PER_NODE": "2"}, 0, True),
        ({"NPROC_PER_NODE": "auto"}, 0, True),
        ({"FORCE_TORCHRUN": "1"}, 0, True),
        ({"FORCE_TORCHRUN": "true", "NPROC_PER_NODE": "1"}, 0, True),
        ({"FORCE_TORCHRUN": "0"}, 0, False),
        ({"NNODES": "2"}, 1, True),
        ({"NNODES": "1"}, 1, False),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "FORCE_TORCHRUN": "1"}, 8, False),
    ],
)
def test_when_further_processes_are_started(environment, count, expected):
    assert _launcher.needs_launcher(environment, devices(count)) is expected


def test_one_node_gets_a_free_port_and_a_process_for_each_device():
    found = options({}, count=4)
    assert int(found.pop("master_port")) > 0
    assert found == {"nproc_per_node": "4", "nnodes": "1", "node_rank": "0", "master_addr": "127.0.0.1"}


def test_forced_without_a_device_is_one_process():
    assert options({"FORCE_TORCHRUN": "1"})["nproc_per_node"] == "1"


def test_several_nodes():
    given = {
        "NNODES": "3", "NODE_RANK": "2", "NPROC_PER_NODE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    assert options(given, count=1) == {
        "nproc_per_node": "8", "nnodes": "3", "node_rank": "2", "master_addr": "10.0.0.1", "master_port": "29500",
    }  # fmt: skip


def test_an_elastic_run():
    given = {
        "RDZV_ID": "job", "MIN_NNODES": "1", "MAX_NNODES": "4", "MAX_RESTARTS": "3", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500", "NPROC_PER_NODE": "2",
    }  # fmt: skip
    assert options(given) == {
        "nproc_per_node": "2", "max_restarts": "3", "nnodes": "1:4", "rdzv_id": "job", "rdzv_backend": "c10d",
        "rdzv_endpoint": "10.0.0.1:29500",
    }  # fmt: skip
    fixed = options({"RDZV_ID": "job", "NNODES": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"})
    assert fixed["nnodes"] == "2"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE: expected a whole number >= 1, found 'two'"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE: expected a whole number >= 1, found '0'"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT: expected a whole number >= 1, found 'x'"),
        ({"NNODES": "-1"}, "NNODES: expected a whole number >= 1, found '-1'"),
        ({"NODE_RANK": "1"}, "NODE_RANK: must be below NNODES, which is 1, found 1"),
        (
            {"NNODES": "2", "MASTER_PORT": "1"},
            "MASTER_ADDR: missing; with NNODES=2 every node must be given the same one",
        ),
        ({"NNODES": "2", "MASTER_ADDR": "h"}, "MASTER_PORT: missing; with NNODES=2"),
        ({"MIN_NNODES": "1"}, "MIN_NNODES: has no effect without RDZV_ID"),
        ({"RDZV_ID": "j", "MIN_NNODES": "1"}, "MIN_NNODES: needs MAX_NNODES too"),
        ({"RDZV_ID": "j", "MAX_NNODES": "1"}, "MAX_NNODES: needs MIN_NNODES too"),
        (
            {"RDZV_ID": "j", "MIN_NNODES": "3", "MAX_NNODES": "2"},
            "MIN_NNODES: must not be above MAX_NNODES, which is 2",
        ),
        ({"MAX_RESTARTS": "many"}, "MAX_RESTARTS: expected a whole number >= 0, found 'many'"),
    ],
)
def test_a_variable_that_cannot_be_meant(environment, message):
    with pytest.raises(UserError) as caught:
        _launcher.torchrun_command(environment, ARGUMENTS, devices(1), "dataflex_mega.train")
    assert str(caught.value).startswith(message)


def test_a_mistake_is_found_once_before_any_process_starts(capsys, tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("stage: sft\nlaerning_rate: 1\n")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr(_launcher, "torchrun_command", lambda *_: pytest.fail("a process would have been started"))
    assert cli.main(["train", str(path)]) == 2
    assert capsys.readouterr().err == "error: unknown key 'laerning_rate' (did you mean 'learning_rate'?)\n"


def test_what_only_a_dynamic_run_refuses_is_found_before_any_process_starts(capsys, tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("stage: kto\nmodel_name_or_path: gpt2\ndataset: a\noutput_dir: out\n")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr(_launcher, "torchrun_command", lambda *_: [sys.executable, "-c", "raise SystemExit(0)"])
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["train", str(path), "weighter=loss"]) == 2
    assert "error: stage: dynamic training takes pt, sft, dpo, found 'kto'" in capsys.readouterr().err


def test_the_status_of_the_processes_is_ours(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("stage: sft\n")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr(_launcher, "torchrun_command", lambda *_: [sys.executable, "-c", "raise SystemExit(7)"])
    assert cli.main(["train", str(path)]) == 7


# -- handing on --------------------------------------------------------------------------------------------------------


class Script:
    """An installed command that notes what it was called with."""

    def __init__(self):
        self.seen = None

    def load(self):
        return self

    def __call__(self):
        self.seen = list(sys.argv)
        last = Path(sys.argv[-1])
        self.content = last.read_text() if last.is_file() else None


@pytest.fixture
def script(monkeypatch):
    """What stands for llamafactory-cli; nothing is missing of what its commands need."""
    script = Script()
    monkeypatch.setattr(sys, "argv", ["dataflex-cli"])
    monkeypatch.setattr(cli.metadata, "entry_points", lambda **_: [script])
    monkeypatch.setattr(cli, "find_spec", lambda _: True)
    return script


@pytest.mark.parametrize("command", cli.DELEGATED)
def test_other_commands_go_to_llamafactory_with_their_arguments(command, script, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: base\n")
    assert cli.main([command, str(file), "a=b"]) == 0
    assert script.seen == ["llamafactory-cli", command, str(file), "a=b"]


@pytest.mark.parametrize(
    "arguments",
    [["model_name_or_path=base", "temperature=0.5"], ["--model_name_or_path", "base", "--temperature=0.5"],
     ["--model-name-or-path", "base", "--temperature", "0.5"]],
)  # fmt: skip
def test_keys_without_a_file_become_a_file(arguments, script):
    assert cli.main(["chat", *arguments]) == 0
    command, word, file = script.seen
    assert (command, word) == ("llamafactory-cli", "chat") and file.endswith(".yaml")
    assert script.content == "model_name_or_path: base\ntemperature: 0.5\n"


def test_a_json_file_becomes_one_that_llamafactory_reads(script, tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"model_name_or_path": "base", "flags": [1, 2]}')
    assert cli.main(["export", str(file), "flags=[3]"]) == 0
    assert script.content == "flags:\n- 3\nmodel_name_or_path: base\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "expected a .yaml"), (["none.yaml"], "none.yaml not found"), (["a=1", "stray"], "'stray'"),
     (["model"], ".yaml"), (["broken.yaml"], "line 1")],
)  # fmt: skip
def test_other_arguments_end_in_one_line(arguments, words, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [")
    assert cli.main(["export", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1 and script.seen is None


def test_a_missing_package_is_named_with_the_command_that_installs_it(script, monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("fastapi", "gradio") else True)
    assert cli.main(["api", "model_name_or_path=x"]) == 2
    assert capsys.readouterr().err == "error: api: needs fastapi; dataflex-cli setup --extras serve\n"
    assert cli.main(["webui"]) == 2
    assert capsys.readouterr().err == "error: webui: needs gradio; dataflex-cli setup --extras webui\n"


def test_what_llamafactory_gave_up_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dataflex-cli"])
    assert cli.main(["eval", "model_name_or_path=x"]) == 2
    assert capsys.readouterr().err.startswith("error: eval: llamafactory-cli no longer does this")


def test_without_its_command_the_absence_is_named(capsys, monkeypatch):
    monkeypatch.setattr(cli.metadata, "entry_points", lambda **_: [])
    assert cli.main(["chat", "model_name_or_path=x"]) == 2
    assert capsys.readouterr().err == "error: chat: llamafactory-cli is not installed\n"


def test_a_free_port_can_be_bound():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", _launcher.free_port()))
