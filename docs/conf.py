"""Sphinx configuration: `make docs`, or `sphinx-build -W -b html docs docs/_build`."""

import importlib.util
import tomllib
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).parent.parent
about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = about["name"]
author = "the dataflex_mega authors"
copyright = f"{author}, {about['license']}"
release = version = about["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # annotations name types of torch and others, which have no page here

html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = False


def load_tool(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api_pages, tables = load_tool("api_pages"), load_tool("markdown_tables")


def write_pages(app) -> None:
    """Write a page per algorithm and the API reference from the current code."""
    load_tool("algorithm_pages").write(Path(app.srcdir) / "generated")
    api_pages.write(Path(app.srcdir) / "generated")


def convert_docstring(app, what, name, obj, options, lines) -> None:
    """The package's docstrings are plain text: make them reStructuredText."""
    lines[:] = api_pages.to_rst(lines)


def check_tables(app, page, source) -> None:
    """Warn of broken tables, which Markdown would show as text; -W makes the warning an error."""
    for line, message in tables.breaches(source[0]):
        logging.getLogger(__name__).warning(message, location=(page, line))


def setup(app) -> None:
    """Connect the hooks; Sphinx calls this."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", convert_docstring)
    app.connect("source-read", check_tables)
