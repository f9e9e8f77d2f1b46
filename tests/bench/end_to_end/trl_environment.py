"""The environment that TRL runs in: its own packages on top of ours, so that torch and transformers are the same files.

Kept in a cache folder and made again when ours changes. Nothing is ever installed into ours.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

TRL = "1.16.0"
SHARED = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "safetensors", "huggingface_hub")
"""Must stay what they are with us, or the comparison would be one of versions."""

CACHE = Path(".bench") / f"trl-{TRL}"


class TrlMissing(Exception):
    """The environment could not be made; one line."""


def python_with_trl() -> Path:
    """The interpreter of that environment; the first call downloads TRL and what it needs besides.

    Raises:
        TrlMissing: no network, or no versions that go together.
    """
    python = CACHE / "bin" / "python"
    stamp, wanted = CACHE / "made_for.json", _identity()
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python.absolute()
    shutil.rmtree(CACHE, ignore_errors=True)
    venv.create(CACHE, with_pip=False, symlinks=True)
    ours = sysconfig.get_path("purelib")
    theirs = CACHE / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # pip comes from there, too.
    (theirs / "ours.pth").write_text(f"{ours}\n")
    constraints = CACHE / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version(name)}\n" for name in SHARED))
    command = [str(python.absolute()), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run(
        [*command, "--constraint", str(constraints), f"trl=={TRL}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise TrlMissing(f"TRL {TRL} cannot be installed: {(lines or ['pip said nothing'])[-1]}")
    stamp.write_text(json.dumps(wanted))
    return python.absolute()


def _identity() -> dict[str, str]:
    return {"trl": TRL, "python": sys.version, **{name: version(name) for name in SHARED}}
