"""A run that is built and not trained, in this process: for tests that look inside or take single steps."""

from __future__ import annotations

import copy
from pathlib import Path

import yaml


def opened(config):
    """A configuration -> (run.build.Build, its trainer)."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.parse import split
    from dataflex_mega.llamafactory.args import keys
    from dataflex_mega.run.build import Build

    path = Path(f"{config['output_dir']}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    made = split(load(str(path), ()), keys())
    check_dynamic(made)
    run = Build(made)
    return run, run.trainer()


class Trial:
    """Steps of an engine that are taken back: parameters and optimizer are as they were after `undo`."""

    def __init__(self, engine):
        self.engine = engine
        self.parameters = copy.deepcopy(engine.model.state_dict())
        self.optimizer = copy.deepcopy(engine.optimizer.state_dict())

    def undo(self):
        self.engine.model.load_state_dict(self.parameters)
        self.engine.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
