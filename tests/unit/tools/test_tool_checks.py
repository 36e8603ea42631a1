"""tools/checks.py: each rule on small files that break it and that do not."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def checks(tool: Any, root: Path) -> Any:
    """The tool, which imports its neighbours as a script does: from its own folder."""
    sys.path.insert(0, str(root / "tools"))
    yield tool("checks")
    sys.path.remove(str(root / "tools"))


def found(checks: ModuleType, root: Path, files: dict[str, str]) -> list[str]:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return [str(breach) for breach in checks.check(root)]


def in_package(checks: ModuleType, root: Path, name: str, source: str) -> list[str]:
    return found(checks, root, {f"dataflex_mega/{name}": source})


def test_a_file_may_have_400_lines_and_no_more(checks: ModuleType, tmp_path: Path) -> None:
    assert in_package(checks, tmp_path, "types.py", "x = 1\n" * 400) == []
    assert in_package(checks, tmp_path, "types.py", "x = 1\n" * 401) == [
        "dataflex_mega/types.py:1: 401 lines; at most 400"
    ]


def test_a_function_may_have_60_lines_and_no_more(checks: ModuleType, tmp_path: Path) -> None:
    assert in_package(checks, tmp_path, "types.py", "def f():\n" + "    x = 1\n" * 59) == []
    assert in_package(checks, tmp_path, "types.py", "\ndef f():\n" + "    x = 1\n" * 60) == [
        "dataflex_mega/types.py:2: f has 61 lines; at most 60"
    ]


def nested(depth: int) -> str:
    lines = ["def f(x):"] + ["    " * (n + 1) + "if x:" for n in range(depth)]
    return "\n".join([*lines, "    " * (depth + 1) + "pass"]) + "\n"


def test_blocks_may_be_nested_4_deep_and_no_more(checks: ModuleType, tmp_path: Path) -> None:
    assert in_package(checks, tmp_path, "types.py", nested(4)) == []
    assert in_package(checks, tmp_path, "types.py", nested(5)) == [
        "dataflex_mega/types.py:1: f has 5 levels of nesting; at most 4"
    ]


def test_elif_chains_and_inner_functions_are_not_deeper(checks: ModuleType, tmp_path: Path) -> None:
    chain = "def f(x):\n    if x == 0:\n        pass\n" + "".join(
        f"    elif x == {n}:\n        pass\n" for n in range(1, 9)
    )
    assert in_package(checks, tmp_path, "types.py", chain) == []
    inner = nested(3) + " " * 16 + "def g(y):\n" + "".join(" " * (20 + 4 * n) + "if y:\n" for n in range(4))
    assert in_package(checks, tmp_path, "types.py", inner + " " * 36 + "pass\n") == []


def test_a_function_may_have_8_parameters_beside_self(checks: ModuleType, tmp_path: Path) -> None:
    eight = "class A:\n    def f(self, a, b, /, c, d, *e, f, g, **h):\n        pass\n"
    assert in_package(checks, tmp_path, "types.py", eight) == []
    nine = eight.replace("*e, f", "*e, i, f")
    assert in_package(checks, tmp_path, "types.py", nine) == ["dataflex_mega/types.py:2: f has 9 parameters; at most 8"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f():\n    global x, y\n", "2: global x, y"),
        ("try:\n    pass\nexcept:\n    pass\n", "3: catches everything"),
        ("try:\n    pass\nexcept Exception:\n    pass\n", "3: catches everything"),
        ("try:\n    pass\nexcept (OSError, BaseException) as e:\n    pass\n", "3: catches everything"),
        ("import os\nos.sep = 'x'\n", "2: changes os.sep"),
        ("import os.path as p\np.sep: str = 'x'\n", "2: changes p.sep"),
        ("from os import path\n(a, path.sep) = 1, 2\n", "2: changes path.sep"),
        ("import os\ndel os.sep\n", "2: changes os.sep"),
        ("from a import B\nB.c.d += 1\n", "2: changes B.c.d"),
        ("from a import B\nsetattr(B, 'c', 1)\n", "2: setattr or delattr"),
        ("from . import errors\n", "1: relative import"),
    ],
)
def test_forbidden_constructs_are_found_in_package_tools_and_tests(
    checks: ModuleType, tmp_path: Path, source: str, message: str
) -> None:
    for place in ("dataflex_mega/types.py", "tools/x.py", "tests/unit/test_x.py"):
        root = tmp_path / place.partition("/")[0]
        lines = [line for line in found(checks, root, {place: source}) if "may not import" not in line]
        assert len(lines) == 1 and lines[0].startswith(f"{place}:{message}")


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A'] = 'b'\n",
        "class A:\n    def f(self):\n        self.x = 1\n",
        "import os\ndef f(os):\n    os.x = 1\n",
        "try:\n    pass\nexcept (OSError, ValueError):\n    pass\n",
        "import os\nx = os.path\nprint(os.sep == x)\n",
    ],
)
def test_harmless_constructs_are_let_through(checks: ModuleType, tmp_path: Path, source: str) -> None:
    assert in_package(checks, tmp_path, "types.py", source) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("types.py", "from dataflex_mega.data import pool", "types may not import data.pool (allowed: none)"),
        ("data/x.py", "import dataflex_mega.engines.base", "data may not import engines.base"),
        (
            "control/a.py",
            "from dataflex_mega.algorithms.mixers import odm",
            "control may not import algorithms.mix",
        ),
        (
            "algorithms/mixers/a.py",
            "from dataflex_mega.algorithms.mixers.b import B",
            "an algorithm imports algorithms",
        ),
        ("algorithms/mixers/a.py", "import numpy", "an algorithm imports numpy; only torch and the standard library"),
        ("algorithms/mixers/a.py", "import torch.distributed", "algorithms may not import torch.distributed"),
        ("engines/fsdp/a.py", "from dataflex_mega.engines.megatron import b", "one engine imports the other"),
        ("engines/megatron/a.py", "from dataflex_mega.engines.fsdp.b import c", "one engine imports the other"),
        ("trainer.py", "def f():\n    import transformers.utils", "trainer may not import transformers"),
        ("control/a.py", "from megatron.core import x", "control may not import megatron"),
        ("trainer.py", "import torch\ntorch.distributed.barrier()", "trainer may not import torch.distributed"),
        ("metrics.py", "from torch import distributed", "metrics may not import torch.distributed"),
        ("train.py", "from llamafactory.hparams import x", "train may not import llamafactory (only llamafactory)"),
        ("novel.py", "from dataflex_mega.types import x", "novel has no place in LAYERS"),
    ],
)
def test_imports_against_the_layers_are_found(
    checks: ModuleType, tmp_path: Path, module: str, source: str, message: str
) -> None:
    others = ("data/pool", "engines/base", "engines/fsdp/b", "engines/megatron/b", "algorithms/mixers/b", "errors")
    files = {f"dataflex_mega/{name}.py": "" for name in (*others, "algorithms/mixers/odm")}
    lines = found(checks, tmp_path, {**files, f"dataflex_mega/{module}": source + "\n"})
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith(f"dataflex_mega/{module}:")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("algorithms/mixers/a.py", "import math, torch\nfrom dataflex_mega.algorithms.base import Mixer"),
        ("algorithms/base.py", "from torch import Tensor\nfrom dataflex_mega import types, errors"),
        ("engines/fsdp/a.py", "import torch.distributed as dist\nfrom dataflex_mega import objective"),
        ("llamafactory/a.py", "import llamafactory\nfrom dataflex_mega.llamafactory.b import c"),
        ("train.py", "from dataflex_mega.llamafactory.b import c\nfrom dataflex_mega.trainer import T"),
        ("control/a.py", "from dataflex_mega.algorithms.base import Mixer"),
        (
            "algorithms/mixers/a.py",
            "from dataflex_mega.algorithms._b import c\nfrom dataflex_mega.algorithms.mixers._b import d",
        ),
    ],
)
def test_imports_that_follow_the_layers_are_let_through(
    checks: ModuleType, tmp_path: Path, module: str, source: str
) -> None:
    assert in_package(checks, tmp_path, module, source + "\n") == []


TYPING_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dataflex_mega.data import a\n"
IN_A_FUNCTION = "def f():\n    from dataflex_mega.data.a import x\n"
AT_THE_TOP = "from dataflex_mega.data.a import x\n"


@pytest.mark.parametrize("closing", [TYPING_ONLY, IN_A_FUNCTION, AT_THE_TOP])
def test_circles_between_modules_of_a_room_are_found_however_they_are_closed(
    checks: ModuleType, tmp_path: Path, closing: str
) -> None:
    files = {
        "dataflex_mega/data/a.py": "from dataflex_mega.data import b\n",
        "dataflex_mega/data/b.py": "import dataflex_mega.data.c\n",
        "dataflex_mega/data/c.py": "",
    }
    assert found(checks, tmp_path, files) == []
    files["dataflex_mega/data/c.py"] = closing
    assert found(checks, tmp_path, files) == [
        "dataflex_mega/data/a.py:1: import cycle: dataflex_mega.data.a, dataflex_mega.data.b, dataflex_mega.data.c"
    ]


def test_a_circle_between_rooms_is_found_where_no_module_is_in_a_circle(checks: ModuleType, tmp_path: Path) -> None:
    files = {
        "dataflex_mega/engines/base.py": "",
        "dataflex_mega/engines/names.py": "def f():\n    from dataflex_mega.engines.megatron import sizes\n",
        "dataflex_mega/engines/megatron/model.py": "from dataflex_mega.engines.base import Engine\n",
        "dataflex_mega/engines/megatron/sizes.py": "",
    }
    assert found(checks, tmp_path, files) == [
        "dataflex_mega/engines/base.py:1: rooms import one another: engines, engines.megatron"
    ]
    files["dataflex_mega/engines/names.py"] = ""
    assert found(checks, tmp_path, files) == []


def test_a_class_name_is_used_once_in_the_package_and_freely_in_tests(checks: ModuleType, tmp_path: Path) -> None:
    twice = "class Pool: ...\n"
    assert found(checks, tmp_path, {"dataflex_mega/data/a.py": twice, "tests/unit/test_a.py": twice}) == []
    assert in_package(checks, tmp_path, "signals/b.py", "def f():\n    class Pool: ...\n") == [
        "dataflex_mega/signals/b.py:2: class Pool is also at dataflex_mega/data/a.py:1"
    ]
    assert in_package(checks, tmp_path, "signals/b.py", "def f():\n    class Heap: ...\n") == []


REQUESTS = "class Request: ...\nclass Loss(Request): ...\nclass TopLoss(Loss): ...\n"


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("isinstance(x, requests.Request)", "Request"),
        ("isinstance(x, (int, TopLoss))", "TopLoss"),
        ("isinstance(x, int | Loss)", "Loss"),
        ("issubclass(x, Loss)", "Loss"),
        ("type(x) is Loss", "Loss"),
        ("[r for r in x if type(r) in (Loss, int)]", "Loss"),
        ("isinstance(x, UsesStore)", "UsesStore"),
        ("isinstance(x, types.NeedsLoads)", "NeedsLoads"),
    ],
)
def test_only_the_registry_of_providers_asks_for_kinds_of_requests(
    checks: ModuleType, tmp_path: Path, question: str, kind: str
) -> None:
    asked = f"def f(x):\n    return {question}\n"
    files = {
        "dataflex_mega/algorithms/requests.py": REQUESTS,
        "dataflex_mega/providers/registry.py": asked,
        "dataflex_mega/control/a.py": asked,
    }
    assert found(checks, tmp_path, files) == [
        f"dataflex_mega/control/a.py:2: asks whether something is a {kind}; only the registry of providers may"
    ]


def test_a_match_asks_for_a_kind_too_and_other_classes_may_be_asked_for(checks: ModuleType, tmp_path: Path) -> None:
    files = {
        "dataflex_mega/algorithms/requests.py": REQUESTS,
        "dataflex_mega/control/a.py": "def f(x):\n    match x:\n        case Loss(): pass\n        case int(): pass\n",
        "dataflex_mega/data/a.py": "def f(x):\n    return isinstance(x, (int, Pool)), type(x) is Used, of(x, Loss)\n",
    }
    assert found(checks, tmp_path, files) == [
        "dataflex_mega/control/a.py:3: asks whether something is a Loss; only the registry of providers may"
    ]


@pytest.mark.parametrize("docstring", ["G.", "Both tensors.", "See Controller.", "The inverse of `state_dict`.", ""])
@pytest.mark.parametrize("head", ["def f():", "class A:", "class A:\n  def f(self):", "async def f():"])
def test_a_docstring_says_something(checks: ModuleType, tmp_path: Path, head: str, docstring: str) -> None:
    lines = in_package(checks, tmp_path, "types.py", f'{head}\n    """{docstring}"""\n')
    line = head.count("\n") + 1
    said = f"dataflex_mega/types.py:{line}: the docstring {docstring!r} says nothing; remove it, or state a fact"
    assert lines == ([said] if docstring else [])


def test_a_docstring_of_three_words_passes_and_one_of_a_module_counts(checks: ModuleType, tmp_path: Path) -> None:
    assert in_package(checks, tmp_path, "types.py", 'def f():\n    """[n] float32 scores."""\n') == []
    assert in_package(checks, tmp_path, "types.py", '"""The types."""\n') == [
        "dataflex_mega/types.py:1: the docstring 'The types.' says nothing; remove it, or state a fact"
    ]
    assert found(checks, tmp_path / "other", {"tests/unit/test_a.py": '"""Tests."""\n'}) == []


def test_the_exit_status_says_whether_a_rule_is_broken(
    checks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "a.py").write_text("x = 1\n")
    assert checks.main([str(tmp_path)]) == 0
    (tmp_path / "tools" / "a.py").write_text("def f():\n    global x\n")
    assert checks.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["tools/a.py:2: global x", "checks: 1 breaches"]


def test_an_import_through_the_package_closes_the_circles_of_its_lazy_names(checks: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "dataflex_mega"
    package.mkdir()
    (package / "__init__.py").write_text("from dataflex_mega.types import A\n")
    (package / "errors.py").write_text("")
    (package / "types.py").write_text("from dataflex_mega import errors\n")
    assert any("import cycle: dataflex_mega, dataflex_mega.types" in str(breach) for breach in checks.check(tmp_path))
    (package / "types.py").write_text("import dataflex_mega.errors as errors\n")
    assert not any("import cycle" in str(breach) for breach in checks.check(tmp_path))


@pytest.mark.parametrize(
    ("source", "breaks"),
    [
        ("import os\nos.replace('a', 'b')\n", True),
        ("def f(path, other):\n    path.rename(other)\n    path.replace(other)\n", True),
        ("def f(path):\n    path.write_text('x')\n", True),
        ("import numpy as np\ndef f(path, x):\n    np.save(path, x)\n", True),
        ("import numpy as np\ndef f(stream, x):\n    np.save(stream, x)\n", False),
        ("def f(text):\n    return text.replace('a', 'b')\n", False),
        ("from dataclasses import replace\ndef f(x):\n    return replace(x, a=1)\n", False),
    ],
)
def test_only_files_py_renames_and_writes_under_final_names(
    checks: ModuleType, tmp_path: Path, source: str, breaks: bool
) -> None:
    assert bool(in_package(checks, tmp_path, "types.py", source)) == breaks
    assert in_package(checks, tmp_path / "other", "files.py", source) == []
