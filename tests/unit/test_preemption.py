"""Requests to leave: at once before the training, remembered during it, and what is no request."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from dataflex_mega import preemption
from dataflex_mega.errors import Stopped
from dataflex_mega.preemption import default_actions, stop_requests, when_stopped

# A program whose main thread does not come back to Python: two threads of one lock.
BLOCKED = """
import sys, time
from dataflex_mega import errors, preemption
preemption.SAME_REQUEST, preemption.LEAVING = 0.3, 0.3
with preemption.stop_requests() as request:
    request.training = sys.argv[1] == "training"
    print("ready", flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            time.sleep(1)
        except errors.Stopped:
            pass  # code that swallows it
"""


def blocked(phase, signals):
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, phase], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in range(signals):
        time.sleep(0.6 if number else 0)
        process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=20)
    return process.returncode, text


def test_before_the_training_a_signal_ends_the_program_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stop, stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143 and not stop.value.agreed
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_training_a_signal_is_remembered_and_its_repetition_is_no_second_one():
    with stop_requests() as request:
        request.training = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        assert request.requested()
        stop = when_stopped(request, lambda name: [None, name])
        with pytest.raises(Stopped) as stopped:
            stop(7, "checkpoint-7")
    assert stopped.value.line == "stopped by SIGUSR1 at step 7; checkpoint-7; the same command goes on"
    assert stopped.value.code == 143 and stopped.value.agreed


def test_a_second_signal_ends_the_program_wherever_it_is():
    status, text = blocked("training", 2)
    assert status == 143 and "stopped by a second SIGTERM" in text and "Traceback" not in text


def test_a_program_that_swallows_the_first_one_ends_too():
    status, text = blocked("start", 1)
    assert status == 143 and "stopped by SIGTERM" in text


def test_what_is_off_changes_nothing():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with stop_requests(enabled=False):
        assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_code_with_signals_of_its_own_sees_the_default_ones():
    with stop_requests(), default_actions():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_to_a_forked_child_is_no_request():
    """As when a pool of datasets ends its workers."""
    with stop_requests() as request:
        request.training = True
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        child.terminate()
        child.join(10)
        time.sleep(0.2)
        assert child.exitcode == -signal.SIGTERM and not request.requested()
