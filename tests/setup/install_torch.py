"""Installs the torch that an extra or a dependency group pins: its CPU build on a machine without an NVIDIA GPU, where
it can be had.

usage: install_torch.py PYPROJECT_TOML EXTRA_OR_GROUP
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pinned_torch(pyproject: Path, name: str) -> str:
    """The requirement "torch==X" of the list of that name (tomllib is not in Python 3.10)."""
    requirements = re.search(rf"^{re.escape(name)} = \[\n(.*?)^\]", pyproject.read_text(), re.MULTILINE | re.DOTALL)
    found = re.search(r'"(torch==[^"]+)"', requirements.group(1)) if requirements else None
    if not found:
        raise SystemExit(f"{pyproject}: no requirement torch==VERSION in {name}")
    return found.group(1)


def pip(*arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, text=True, check=False, capture_output=quiet)


def machine_has_nvidia_gpu() -> bool:
    return bool(glob.glob("/proc/driver/nvidia/gpus/*") or glob.glob("/dev/nvidia[0-9]*"))


def default_is_cpu_build(requirement: str) -> bool:
    """Whether the torch that pip finds by itself is a CPU build: one that asks for no CUDA library."""
    answer = pip(
        "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", requirement, quiet=True
    )
    if answer.returncode != 0:
        return False
    metadata = json.loads(answer.stdout)["install"][0]["metadata"]
    if "+" in metadata["version"]:
        return metadata["version"].endswith("+cpu")
    return not any(re.match(r"(nvidia|cuda)-", needed) for needed in metadata.get("requires_dist", []))


def is_installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    try:
        return importlib.metadata.version(name).partition("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


def install(requirement: str) -> int:
    if is_installed(requirement):
        print(f"{requirement}: there already", flush=True)
        return 0
    if machine_has_nvidia_gpu():
        print(f"{requirement}: the default build, for this machine's NVIDIA GPU", flush=True)
    elif default_is_cpu_build(requirement):
        print(f"{requirement}: the default build, which is a CPU build", flush=True)
    else:
        print(f"{requirement}: the CPU build from {CPU_INDEX}", flush=True)
        tried = pip("install", "--timeout", "10", "--retries", "0", "--index-url", CPU_INDEX, requirement)
        if tried.returncode == 0:
            return 0
        print(f"{requirement}: no CPU build to be had, so the default build", flush=True)
    return pip("install", requirement).returncode


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    sys.exit(install(pinned_torch(Path(sys.argv[1]), sys.argv[2])))
