"""Every exception is one line: what it says, whose fault it is, and where its trace is kept."""

import builtins
import errno
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dataflex_mega import exit_status as ending
from dataflex_mega.error_lines import Place, describe
from dataflex_mega.errors import CodeError, ConfigError, TrainingFault, UserCode


def raised(action):
    """The exception of a call."""
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


def fail(error):
    raise error


def test_own_errors_are_lines_already():
    assert describe(ConfigError("mixer: no")) == describe(ConfigError("mixer:\n  no"))
    line = describe(ConfigError("mixer: no"))
    assert (line.text, line.status, line.keeps_trace) == ("mixer: no", 2, False)
    assert describe(TrainingFault("step 3: NaN")).status == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_what_the_system_refuses_names_key_and_file(number, tmp_path):
    file = tmp_path / "out" / "metrics.jsonl"
    error = OSError(number, os.strerror(number), str(file))
    line = describe(error, {"output_dir": tmp_path / "out", "dataset_dir": tmp_path})
    assert line.status == 2 and line.keeps_trace and line.text.startswith(f"output_dir: {file}: ")
    assert os.strerror(number) not in line.text and "OSError" not in line.text


def test_a_full_disk_below_a_librarys_own_error_is_what_is_told(tmp_path):
    def write(path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0") from None

    def write_in_between(path):
        try:
            fail(OSError(errno.ENOSPC, "No space left on device", str(path)))
        except OSError as error:
            raise RuntimeError("Parent directory does not exist") from error

    line = describe(raised(lambda: write_in_between(tmp_path / "x")), {"output_dir": tmp_path})
    assert line.text.startswith(f"output_dir: {tmp_path / 'x'}: no space left") and line.status == 2
    line = describe(raised(lambda: write(tmp_path / "x")), {"output_dir": tmp_path})
    assert line.text.startswith(f"output_dir: {tmp_path / 'x'}: a file could not be written whole") and line.status == 2


def test_error_numbers_of_rust_libraries_are_read_from_their_text():
    line = describe(raised(lambda: fail(Exception("I/O error: No space left on device (os error 28)"))))
    assert line.status == 2 and "no space left" in line.text


def test_a_damaged_file_is_named_though_its_library_does_not(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 40)
    line = describe(raised(lambda: load_file(file)), {"model_name_or_path": tmp_path})
    assert line.status == 2 and line.text.startswith(f"model_name_or_path: {file}: not a whole safetensors file")
    broken = tmp_path / "config.json"
    broken.write_text("{")

    def read(path):
        return json.loads(path.read_text())

    assert describe(raised(lambda: read(broken))).text.startswith(f"{broken}: not JSON")
    broken.write_bytes(b"\xe9")
    assert describe(raised(lambda: read(broken))).text.startswith(f"{broken}: not UTF-8 text")


def test_a_bug_of_ours_is_said_to_be_one():
    from dataflex_mega.config.environment import check_environment

    line = describe(raised(lambda: check_environment(None)))  # type: ignore[arg-type]
    assert line.status == 1 and line.text.startswith("internal: TypeError: ") and line.keeps_trace


def test_a_library_that_refuses_while_parts_are_built_is_about_the_keys_it_read():
    from dataflex_mega.llamafactory import optim

    class Arguments:
        training = None
        finetuning = None

    def refuse(*_):
        return torch.optim.AdamW([torch.zeros(1)], betas=(2.0, 0.9))

    class Model(torch.nn.Module):
        pass

    from llamafactory.train import trainer_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_utils, "create_custom_optimizer", refuse)
        line = describe(raised(lambda: optim.build_optimizer(Arguments(), Model())))
    assert line.status == 2 and "adam_beta1" in line.text and "Invalid beta" in line.text and "torch" in line.text
    late = describe(raised(lambda: torch.optim.AdamW([torch.zeros(1)], betas=(2.0, 0.9))))
    assert late.status == 1 and late.text.startswith("torch: ValueError: Invalid beta")


def test_memory_names_what_needs_less():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        line = describe(error)
        assert line.status == 1 and "memory" in line.text and "per_device_train_batch_size" in line.text


def test_user_code_that_raises_is_named_with_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "their_reward.py").write_text("def reward(x):\n    return x.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    import their_reward  # type: ignore[import-not-found]

    line = describe(raised(lambda: their_reward.reward(3)))
    assert line.status == 2 and f"{tmp_path / 'their_reward.py'}, line 2, in reward: AttributeError" in line.text


@pytest.mark.parametrize("error", [ValueError("v"), SystemExit(3), SyntaxError("s"), KeyError("k"), AssertionError()])
def test_code_of_the_configuration_may_raise_anything(error):
    def run():
        with UserCode("plugins: cannot import 'x'"):
            raise error

    caught = raised(run)
    assert isinstance(caught, CodeError) and str(caught).startswith("plugins: cannot import 'x': ")
    assert caught.__cause__ is error and describe(caught).keeps_trace and describe(caught).status == 2


def test_code_of_the_configuration_may_say_no_itself_and_be_interrupted():
    for error in (ConfigError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), UserCode("plugins"):
            raise error


# -- exit_status -------------------------------------------------------------------------------------------------------


def bug():
    return None + 1  # type: ignore[operator]


def test_the_trace_goes_into_error_log_and_the_line_names_it(tmp_path, capsys):
    place = Place(tmp_path / "out", {})
    for _ in range(2):
        assert ending.exit_status(lambda: fail(MemoryError()), place=place) == 1
    said = capsys.readouterr().err.splitlines()
    log = (tmp_path / "out" / "error.log").read_text()
    assert len(said) == 2 and all(
        line.startswith("error: ") and f"(trace in {tmp_path / 'out' / 'error.log'})" in line for line in said
    )
    assert log.count("Traceback (most recent call last)") == 2 and "rank 0 of 1" in log and "in fail" in log


def test_where_output_dir_cannot_be_written_the_trace_goes_elsewhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ending.tempfile, "gettempdir", lambda: str(tmp_path))
    assert ending.exit_status(bug, place=Place(tmp_path / "file" / "out", {})) in (1, 2)
    kept = tmp_path / f"dataflex_mega-{os.getpid()}" / "error.log"
    assert f"(trace in {kept})" in capsys.readouterr().err and "TypeError" in kept.read_text()
    monkeypatch.setattr(ending.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    ending.exit_status(bug)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" in said  # rather than lost


def test_a_users_mistake_leaves_no_file(tmp_path, capsys):
    place = Place(tmp_path / "out", {})
    assert ending.exit_status(lambda: fail(ConfigError("mixer: no")), place=place) == 2
    assert capsys.readouterr().err == "error: mixer: no\n" and not (tmp_path / "out").exists()


def test_interrupts_and_ends_are_not_errors(capsys):
    assert ending.exit_status(lambda: fail(KeyboardInterrupt()), "stopped") == 130
    assert capsys.readouterr().err == "stopped\n"
    with pytest.raises(SystemExit):
        ending.exit_status(lambda: fail(SystemExit(0)))


def test_nobody_has_to_listen_to_standard_error(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def action():
        print("x", file=sys.stderr)
        ending.get_logger().info("y")
        return 0

    monkeypatch.setattr(sys, "stderr", Closed())
    assert ending.exit_status(action) == 0
    monkeypatch.setattr(sys, "stderr", None)
    assert ending.exit_status(action) == 0
    assert builtins.print is print


def shell(tmp_path, code, rest):
    """The end of a Python program whose streams a shell has bent."""
    script = tmp_path / "program.py"
    script.write_text(code)
    command = f"{sys.executable} {script} {rest}"
    return subprocess.run(command, shell=True, executable="/bin/bash", capture_output=True, text=True)


def test_a_pipe_that_is_closed_ends_a_command_quietly(tmp_path):
    code = "import sys\nfrom dataflex_mega.cli import main\nsys.stdin.read()\nsys.exit(main(['help']))\n"
    done = shell(tmp_path, code, "< <(sleep 0.3) | true; echo ${PIPESTATUS[0]}")
    assert done.stdout.strip() == "0" and done.stderr == ""


def test_closed_streams_do_not_give_their_numbers_to_files(tmp_path):
    code = f"""import sys
from dataflex_mega.exit_status import exit_status
opened = []
def action():
    opened.append(open({str(tmp_path / "f")!r}, "w"))
    return opened[0].fileno()
sys.exit(exit_status(action))
"""
    done = shell(tmp_path, code, "2>&- >&- <&-; echo $?")
    assert int(done.stdout) > 2


def test_several_processes_print_a_line_once_and_keep_every_trace(tmp_path):
    """Rank 1 fails alone, rank 0 only loses it: the main process tells what ended rank 1."""
    code = """
import sys, time
from dataflex_mega.error_lines import Place
from dataflex_mega.exit_status import exit_status
from pathlib import Path
def alike():
    raise MemoryError("all of them")
def alone():
    if os.environ["RANK"] == "1":
        raise MemoryError("rank one")
    time.sleep(0.3)
    raise type("DistBackendError", (RuntimeError,), {})("Connection closed by peer")
import os
sys.exit(exit_status({"alike": alike, "alone": alone}[sys.argv[1]], place=Place(Path(sys.argv[2]), {})))
"""
    for case in ("alike", "alone"):
        processes = []
        for number in range(2):
            environment = {**os.environ, "RANK": str(number), "WORLD_SIZE": "2", "MASTER_PORT": "1"}
            command = [sys.executable, "-c", code, case, str(tmp_path / case)]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        said = [process.communicate()[1] for process in processes]
        lines = [line for text in said for line in text.splitlines()]
        assert [process.returncode for process in processes] == [1, 1]
        assert len(lines) == 1 and ("all of them" if case == "alike" else "rank one") in lines[0], lines
        log = (tmp_path / case / "error.log").read_text()
        assert "rank 0 of 2" in log and "rank 1 of 2" in log and log.count("Traceback (most") >= 2
