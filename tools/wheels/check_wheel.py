"""Checks a wheel, and exits with 1 where it is not what users may be given. Runs where pyelftools is installed.

usage: check_wheel.py WHEEL VERSION PYTHON_VERSION
"""

from __future__ import annotations

import sys
from pathlib import Path

from wheel_facts import read_wheel
from wheel_rules import problems

SOURCE = Path(__file__).resolve().parents[2] / "python"


def package_files() -> set[str]:
    """The files of the packages in the source, by their names in a wheel."""
    files = (
        path for package in ("flash_attn_jit", "flash_attention_interface") for path in (SOURCE / package).rglob("*")
    )
    return {str(path.relative_to(SOURCE)) for path in files if path.is_file() and "__pycache__" not in path.parts}


def main(file: str, version: str, python: str) -> int:
    wheel = read_wheel(Path(file))
    found = problems(wheel, version, python, package_files())
    for problem in found:
        print(f"{file}: {problem}", file=sys.stderr)
    newest = max((version for binary in wheel.binaries for version in binary.glibc), default=())
    needed = sorted(set().union(*(binary.needed for binary in wheel.binaries)))
    print(f"{wheel.file_name}: glibc {'.'.join(map(str, newest))}, {', '.join(needed)}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
