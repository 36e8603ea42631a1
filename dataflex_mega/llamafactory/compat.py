"""Make `llamafactory` importable beside a CPU build of torch, without touching any installed file.

Two optional packages get in the way of text training. torchaudio is imported by LLaMA-Factory at module level although
only audio loading uses it; a torchvision whose binary does not fit the installed torch makes transformers' model
classes unimportable. Both are probed here once: a package that cannot be imported is treated as not installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
from types import ModuleType

from dataflex_mega.errors import UserError
from dataflex_mega.setup.imports import first_cause

BINARY_FAULTS = (ImportError, OSError, RuntimeError, AttributeError)
REMEDY = "run dataflex-cli setup"
SUPPORTED = ((0, 9, 5), (0, 10, 0))


class _MissingAudio(ModuleType):
    """Stands for torchaudio where it does not work: importable, and an ImportError on any use."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"torchaudio.{name} is needed for audio data, but no working torchaudio is installed")


def works(module: str) -> bool:
    """Whether an installed `module` can be imported; False when it is absent."""
    if importlib.util.find_spec(module) is None:
        return False
    try:
        importlib.import_module(module)
    except BINARY_FAULTS:
        for name in [m for m in sys.modules if m == module or m.startswith(module + ".")]:
            del sys.modules[name]
        return False
    return True


def ensure_importable() -> None:
    """Call before the first import of llamafactory. Raises UserError when it is absent, broken or of another version."""
    if "llamafactory.hparams" in sys.modules:
        return
    # These switch LLaMA-Factory to another argument class at import time; here they only choose our engine.
    for name in ("USE_MCA", "USE_MEGATRON_BRIDGE", "ALLOW_EXTRA_ARGS"):
        os.environ.pop(name, None)
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    # On a CPU with AVX512 it advises, in every process, to fetch a kernel for inference.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if "torchvision" not in sys.modules and not works("torchvision"):
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # find_spec now answers "not installed"
    if "torchaudio" not in sys.modules and not works("torchaudio"):
        audio = _MissingAudio("torchaudio")
        audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", loader=None)
        sys.modules["torchaudio"] = audio
    if importlib.util.find_spec("llamafactory") is None:
        raise UserError(f"llamafactory is not installed: {REMEDY}")
    version = llamafactory_version()
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        found = ".".join(map(str, version))
        raise UserError(f"llamafactory {found} is installed; 0.9.5 up to but not 0.10 is supported")
    try:
        importlib.import_module("llamafactory.hparams")
    except BINARY_FAULTS as error:  # a package that it needs is missing or broken
        remedy = f"{REMEDY}; dataflex-cli env names what is broken"
        raise UserError(f"llamafactory cannot be imported ({first_cause(error)}): {remedy}") from error


def llamafactory_version() -> tuple[int, ...]:
    """(0, 9, 5) for 0.9.5 and 0.9.5.dev0 alike."""
    from importlib.metadata import version

    parts = version("llamafactory").split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
