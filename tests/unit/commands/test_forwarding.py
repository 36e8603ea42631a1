"""A launcher's child ends with it, and signals to the launcher reach the workers."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from dataflex_mega.commands._forwarding import run_child

# A launcher, its child and the child's worker, each of which prints its number; the worker leaves with 5 on a signal.
WORKER = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: os._exit(5))
print(os.getpid(), flush=True)
time.sleep(60)
"""
CHILD = f"""
import os, subprocess, sys
from dataflex_mega.distributed.orphans import die_with_parent
print(os.getpid(), flush=True)
parent = os.getpid()
sys.exit(subprocess.run([sys.executable, "-c", {WORKER!r}], preexec_fn=lambda: die_with_parent(parent)).returncode)
"""
LAUNCHER = f"""
import sys
from dataflex_mega.commands._forwarding import run_child
sys.exit(run_child([sys.executable, "-c", {CHILD!r}]))
"""


def start():
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    return launcher, [int(launcher.stdout.readline()) for _ in range(2)]


def is_alive(process):
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_signal_reaches_the_worker_and_its_status_comes_back():
    launcher, processes = start()
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(30) == 5 and not any(map(is_alive, processes))


def test_nothing_outlives_a_launcher_that_is_killed():
    launcher, processes = start()
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 5
    while any(map(is_alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, processes))


def test_the_status_of_a_killed_child_is_that_of_a_shell():
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137
