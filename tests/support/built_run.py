"""A run that is built but not trained, in this process, for tests that inspect it or take single steps."""

from __future__ import annotations

import copy
from pathlib import Path

import yaml


def build_run(config):
    """A configuration -> (run.build.PreparedRun, its trainer)."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import build

    path = Path(f"{config['output_dir']}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    parsed = parse_config(load(str(path), ()), argument_types())
    check_dynamic(parsed)
    return build(parsed)


class Trial:
    """Steps of an engine that are taken back: parameters and optimizer are as they were after `undo`."""

    def __init__(self, engine):
        self.engine = engine
        self.parameters = copy.deepcopy(engine.model.state_dict())
        self.optimizer = copy.deepcopy(engine.optimizer.state_dict())

    def undo(self):
        self.engine.model.load_state_dict(self.parameters)
        self.engine.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
