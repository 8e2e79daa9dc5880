"""The interpreters that wheels are built for: those that are found, and why the others are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

WANTED = ("3.10", "3.11", "3.12", "3.13", "3.14")

_DESCRIBE = """
import json, os, sys, sysconfig
headers = sysconfig.get_path("include")
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "executable": sys.executable,
    "implementation": sys.implementation.name,
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "headers": headers if os.path.exists(os.path.join(headers, "Python.h")) else None,
}))
"""


class Interpreter(NamedTuple):
    version: str
    executable: str
    headers: str


class Search(NamedTuple):
    found: dict[str, Interpreter]
    lacking: dict[str, str]  # version -> why


def describe(command: str) -> Interpreter | str | None:
    """What the Python of that name is; text where no wheel can be built for it; None where it does not run."""
    try:
        done = subprocess.run([command, "-c", _DESCRIBE], capture_output=True, text=True, check=True, timeout=60)
        told = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    if told["implementation"] != "cpython":
        return f"{command} is {told['implementation']}, and wheels are for CPython"
    if told["free_threaded"]:
        return f"{command} is a free-threaded build, for which no wheel is made"
    if told["headers"] is None:
        return f"{command} has no Python.h (Debian, Ubuntu: apt-get install python{told['version']}-dev)"
    return Interpreter(told["version"], told["executable"], told["headers"])


def candidates(version: str) -> Iterator[str]:
    """Commands that may be the Python of this version: on the PATH, then pyenv's."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if path := shutil.which(f"python{version}", path=folder):
            yield path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from (str(path) for path in sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True))


def search(commands: Iterable[str], wanted: Iterable[str] = WANTED) -> Search:
    """An interpreter for each version that is wanted: of `commands`, which must all be right, else of candidates()."""
    found: dict[str, Interpreter] = {}
    lacking: dict[str, str] = {}
    for command in commands:
        told = describe(command)
        if not isinstance(told, Interpreter):
            raise SystemExit(f"--python {command}: {told or 'it does not run, or is no Python'}")
        if told.version not in wanted:
            accepted = ", ".join(wanted)
            raise SystemExit(f"--python {command} is Python {told.version}; accepted: {accepted}")
        found.setdefault(told.version, told)
    for version in wanted:
        for command in () if version in found else candidates(version):
            told = describe(command)
            if isinstance(told, Interpreter) and told.version == version:
                found[version] = told
                break
            if isinstance(told, str):
                lacking.setdefault(version, told)
        if version not in found:
            lacking.setdefault(version, f"no python{version} on the PATH or among pyenv's")
    return Search(
        {version: found[version] for version in wanted if version in found},
        {version: lacking[version] for version in wanted if version not in found},
    )
