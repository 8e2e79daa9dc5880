"""Runs the tests of integrations, each with the packages and versions that it is about in an environment of its own.

usage: run_integrations.py [--sample | --gpu] [--setup] [NAME ...] [-- PYTEST_OPTION ...]

tests/integrations/PACKAGE/requirements-VERSION.txt makes the environment PACKAGE-VERSION in .venv-integrations, which
also sees all that this Python's environment has: torch and flash_attn_jit are installed once. NAME is such a name, or a
PACKAGE for all of its versions; without one all run. --sample runs the tests that are marked so, with the requirements
that have the line "# sample". --gpu runs those that need a GPU, and no others. --setup installs only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "integrations"
ENVIRONMENTS = ROOT / ".venv-integrations"
NO_TESTS = 5  # pytest's exit status where nothing was collected


class Environment:
    def __init__(self, requirements: Path) -> None:
        self.requirements = requirements
        self.tests = requirements.parent
        self.name = f"{self.tests.name}-{requirements.stem.removeprefix('requirements-')}"
        self.folder = ENVIRONMENTS / self.name
        self.python = self.folder / "bin" / "python"

    def is_in_sample(self) -> bool:
        return "# sample" in self.requirements.read_text().splitlines()

    def set_up(self) -> None:
        wanted = hashlib.sha256(self.requirements.read_bytes() + sys.version.encode()).hexdigest()
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], check=True)
        library = sysconfig.get_path("purelib", vars={"base": str(self.folder), "platbase": str(self.folder)})
        Path(library, "base_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*pip, "--requirement", str(self.requirements)], check=True)
        stamp.write_text(wanted)

    def run(self, marks: str, options: list[str], cache: str) -> int:
        """pytest's exit status."""
        variables = {**os.environ, "FLASH_ATTN_JIT_TEST_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
        pytest = [str(self.python), "-m", "pytest", "-m", marks, "-n", str(os.cpu_count())]
        return subprocess.run([*pytest, str(self.tests), *options], cwd=ROOT, env=variables, check=False).returncode


def wanted_environments(names: list[str], sample: bool) -> list[Environment]:
    found = [Environment(path) for path in sorted(TESTS.glob("*/requirements-*.txt"))]
    known = {environment.name for environment in found} | {environment.tests.name for environment in found}
    for name in names:
        if name not in known:
            raise SystemExit(f"no such environment: {name}. There are: {', '.join(sorted(known))}")
    if names:
        found = [e for e in found if e.name in names or e.tests.name in names]
    return [environment for environment in found if not sample or environment.is_in_sample()]


def main(arguments: list[str]) -> int:
    options = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
    flags, names = {a for a in arguments if a.startswith("-")}, [a for a in arguments if not a.startswith("-")]
    if flags - {"--sample", "--setup", "--gpu"}:
        raise SystemExit(__doc__)
    marks = "gpu" if "--gpu" in flags else "sample and not gpu" if "--sample" in flags else "not gpu"
    environments = wanted_environments(names, "--sample" in flags)
    if not environments:
        raise SystemExit(f"of {', '.join(names)} nothing is in the sample")
    failed = []
    passes = (0, NO_TESTS) if "--gpu" in flags else (0,)  # not each has tests that need one
    with tempfile.TemporaryDirectory(prefix="flash-attn-jit-integrations-") as own:
        cache = os.environ.get("FLASH_ATTN_JIT_TEST_CACHE_DIR") or own
        for environment in environments:
            start = time.monotonic()
            environment.set_up()
            print(f"== {environment.name}: set up in {time.monotonic() - start:.0f} s", flush=True)
            if "--setup" not in flags and environment.run(marks, options, cache) not in passes:
                failed.append(environment.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
