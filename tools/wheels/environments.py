"""The virtual environments that wheels are built and tried in: the tools', and one of each interpreter."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build-wheels"
REQUIREMENTS = HERE / "requirements.txt"
NVRTC = "nvidia-cuda-nvrtc-cu12==12.9.86"


def run(*command: str | Path, env: dict[str, str] | None = None, log: Path | None = None) -> None:
    """Ends the program where the command fails; with `log`, what it prints goes there."""
    words = [str(word) for word in command]
    if log is None:
        code = subprocess.run(words, env=env, check=False).returncode
    else:
        with log.open("w") as output:
            code = subprocess.run(words, env=env, stdout=output, stderr=output, check=False).returncode
    if code != 0:
        tail = f"; the end of {log}:\n{log.read_text()[-3000:]}" if log else ""
        raise SystemExit(f"{' '.join(words)} ended with {code}{tail}")


class Environment:
    """Made anew only where its interpreter or its requirements have changed."""

    def __init__(self, name: str, interpreter: str, requirements: list[str]) -> None:
        self.folder = WORK / name
        self.python = self.folder / "bin" / "python"
        wanted = hashlib.sha256("\n".join([interpreter, *requirements]).encode()).hexdigest()
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        # Not every Python brings pip: that of this script's Python works for all.
        run(interpreter, "-m", "venv", "--without-pip", self.folder)
        self.pip("install", *requirements)
        stamp.write_text(wanted)

    def pip(self, *arguments: str | Path, env: dict[str, str] | None = None, log: Path | None = None) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments]
        run(*command, *([] if log else ["--quiet"]), env=env, log=log)


def requirements_of(*names: str) -> list[str]:
    """The lines of requirements.txt for these packages, or all of them."""
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    return [line for line in lines if not names or line.split("==")[0] in names]
