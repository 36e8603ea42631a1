"""Why an import failed, in one line."""

import importlib
from pathlib import Path

import pytest

from dataflex_mega.setup.imports import first_cause


def failure(module: str) -> BaseException:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        return error
    raise AssertionError(module)


def test_the_package_that_lacks_a_module_is_named_behind_the_one_that_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    for name, source in {
        "outer_one": "try:\n    import inner_one.core\nexcept ImportError as e:\n    raise RuntimeError from e",
        "inner_one": "",
        "inner_one/core": "import not_there_at_all",
    }.items():
        path = folder / name / "__init__.py" if "/" not in name else folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    assert first_cause(failure("outer_one")) == "No module named 'not_there_at_all' (imported by inner_one)"
    assert first_cause(failure("not_there_at_all")) == "No module named 'not_there_at_all'"


def test_other_errors_are_their_first_line_and_not_long() -> None:
    assert first_cause(OSError("libcudart.so.13: cannot open\nmore")) == "libcudart.so.13: cannot open"
    assert first_cause(RuntimeError()) == "RuntimeError"
    assert len(first_cause(RuntimeError("x" * 300))) == 100
