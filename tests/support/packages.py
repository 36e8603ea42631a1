"""A package of a test's own, installed by pip into a folder as site-packages is."""

import subprocess
import sys

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "0.1"
[project.entry-points."dataflex_mega.plugins"]
mine = "{name}"
"""


def install(folder, name, source):
    """Install a package of one module that registers plug-ins -> the folder to put on sys.path."""
    package, target = folder / "source", folder / "site"
    (package / name).mkdir(parents=True)
    (package / "pyproject.toml").write_text(PROJECT.format(name=name))
    (package / name / "__init__.py").write_text(source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(package)], check=True)
    return target
