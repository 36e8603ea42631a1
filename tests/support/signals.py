"""Callbacks that send a signal to their own rank, or do not return."""

import os
import signal
import time

from transformers import TrainerCallback


class TermAtThree(TrainerCallback):
    """SIGTERM to the last rank in step 3, before that step's sums are reduced."""

    number = signal.SIGTERM

    def on_step_end(self, args, state, control, **kwargs):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if state.global_step == 2 and int(os.environ.get("RANK", "0")) == world - 1:
            os.kill(os.getpid(), self.number)


class Usr1AtThree(TermAtThree):
    """The same with SIGUSR1."""

    number = signal.SIGUSR1


class SleepAtThree(TrainerCallback):
    """The last rank does not come back from step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            time.sleep(600)
