"""What `import dataflex_mega` gives: every public name, a version, types, and no cost before it is used."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import dataflex_mega as dm


def test_every_public_name_is_there_once_and_about_twenty():
    assert len(dm.__all__) == len(set(dm.__all__)) and 18 <= len(dm.__all__) <= 26
    assert dm.__all__ == sorted(dm.__all__)
    for name in dm.__all__:
        assert getattr(dm, name) is not None
        assert name in dir(dm)


def test_the_version_is_that_of_the_project():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'version = "{dm.__version__}"' in project
    assert importlib.metadata.version("dataflex_mega")


def test_importing_costs_nothing():
    code = "import sys, dataflex_mega; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_train_is_the_function_after_the_program_was_imported():
    import dataflex_mega.train  # noqa: F401

    assert callable(dm.train) and dm.train.__module__ == "dataflex_mega.api"
    assert sys.modules["dataflex_mega.train"].main


def test_the_package_is_typed():
    assert (Path(dm.__file__).parent / "py.typed").is_file()


def test_an_unknown_name_is_named():
    try:
        dm.less_score  # noqa: B018
    except AttributeError as error:
        assert "less_score" in str(error)
    else:
        raise AssertionError("there is no such name")
