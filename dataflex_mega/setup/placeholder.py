"""A wheel of the torchaudio that stands in where none can be imported, written without any build tool.

    python -m dataflex_mega.setup.placeholder FOLDER    # write the wheel into FOLDER and print its path

Inside this package `llamafactory.compat` stands in by itself; the wheel is for the processes that LLaMA-Factory starts, such
as the trainings of its web UI, and for `llamafactory-cli` on its own. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

SOURCE = Path(__file__).with_name("torchaudio_placeholder.py")
METADATA = """\
Metadata-Version: 2.1
Name: torchaudio
Version: {version}
Summary: Stands in for torchaudio where no wheel of it works: importable, and an error that says so on any use.
License: Apache-2.0
Requires-Python: >=3.11
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: dataflex_mega\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> Path:
    """Write the wheel into `folder`, always with the same bytes. Returns its path."""
    source = SOURCE.read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert match is not None
    version = match.group(1)
    info = f"torchaudio-{version}.dist-info"
    files = {
        "torchaudio/__init__.py": source,
        f"{info}/METADATA": METADATA.format(version=version),
        f"{info}/WHEEL": WHEEL,
    }
    lines = [f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""])
    path = folder / f"torchaudio-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name), text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(write_wheel(Path(sys.argv[1])))
