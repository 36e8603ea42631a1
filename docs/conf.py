"""Sphinx configuration: `make docs`, or `sphinx-build -W -b html docs docs/_build`."""

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
