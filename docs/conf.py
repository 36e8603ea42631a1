"""Sphinx configuration: `make docs`, or `sphinx-build -W -b html docs docs/_build`."""

import importlib.util
import tomllib
from pathlib import Path

about = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

project = about["name"]
author = "the dataflex_mega authors"
copyright = f"{author}, {about['license']}"
release = version = about["version"]

extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = False


def write_pages(app) -> None:
    """A page on every algorithm, from the code of now."""
    path = Path(__file__).parent.parent / "tools" / "algorithm_pages.py"
    spec = importlib.util.spec_from_file_location("algorithm_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(Path(app.srcdir) / "generated")


def setup(app) -> None:
    """Sphinx calls this."""
    app.connect("builder-inited", write_pages)
