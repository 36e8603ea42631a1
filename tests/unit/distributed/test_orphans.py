"""Processes end with the one that started them, and only those that should."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.unit.commands.test_forwarding import is_alive

# Prints its child's number and waits.
PARENT = """
import os, sys, time
from dataflex_mega.distributed import orphans
orphans.end_children()
child = os.fork()
if child == 0:
    if sys.argv[1] == "daemon":
        if os.fork():
            time.sleep(0.5)
            os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(("kind", "lives"), [("child", False), ("daemon", True)])
def test_a_forked_child_ends_with_the_training_and_a_daemon_does_not(kind, lives):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        time.sleep(0.8 if lives else 0)  # until its own parent is gone
        parent.kill()
        parent.wait()
        assert until(lambda: not is_alive(child), 1 if lives else 5) != lives
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


# A launcher whose worker asks to end with it.
LAUNCHER = """
import os, subprocess, sys, time
code = "import os, time; from dataflex_mega.distributed import orphans; orphans.die_with_launcher();" \\
       "print(os.getpid(), flush=True); time.sleep(60)"
environment = {**os.environ, **dict([word.split("=") for word in sys.argv[1:]])}
subprocess.run([sys.executable, "-c", code], env=environment)
"""


@pytest.mark.parametrize(("variables", "lives"), [(["TORCHELASTIC_RUN_ID=x"], False), ([], True)])
def test_a_worker_ends_with_torchrun_and_a_program_outlives_who_started_it(variables, lives):
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, *variables], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    worker = int(launcher.stdout.readline())
    try:
        launcher.kill()
        launcher.wait()
        assert until(lambda: not is_alive(worker), 1 if lives else 5) != lives
    finally:
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)
