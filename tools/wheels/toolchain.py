"""Zig's Clang as the compiler of a CMake build for another glibc than the machine's."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from environments import WORK, Environment
from interpreters import Interpreter

TARGET = "x86_64-linux-gnu.2.28"
# Header-only libraries: their folder, and what CMakeLists.txt calls them.
LIBRARIES = {"nlohmann": "nlohmann_json", "CLI": "CLI11"}


class Toolchain:
    def __init__(self, tools: Environment) -> None:
        self.tools, self.folder = tools, WORK / f"zig-{TARGET}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (zig,) = tools.folder.glob("lib/python3.*/site-packages/ziglang/zig")
        for name, words in {
            "cc": f"cc -target {TARGET} -mcpu=baseline",
            "c++": f"c++ -target {TARGET} -mcpu=baseline",
            "ar": "ar",
            "ranlib": "ranlib",
        }.items():
            self.program(name).write_text(f'#!/bin/sh\nexec {shlex.quote(str(zig))} {words} "$@"\n')
            self.program(name).chmod(0o755)

    def program(self, name: str) -> Path:
        return self.folder / name

    def environment(self) -> dict[str, str]:
        """This process's, less what would change a build."""
        changes = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "PYTHONPATH")
        prefixes = ("CMAKE_", "SKBUILD_", "FLASH_ATTN_JIT_", "PIP_CONFIG_SETTINGS")
        kept = {k: v for k, v in os.environ.items() if k not in changes and not k.startswith(prefixes)}
        return {
            **kept,
            "CC": str(self.program("cc")),
            "CXX": str(self.program("c++")),
            "PATH": f"{self.tools.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.tools.folder),
            "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig-cache"),
            "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig-cache"),
        }

    def definitions(self) -> dict[str, str]:
        """For CMake. The machine's own headers are another glibc's, so libraries of headers are linked into a folder of
        their own; one that is not here is downloaded by CMake."""
        headers = self.folder / "headers"
        headers.mkdir(exist_ok=True)
        found = {"CMAKE_AR": str(self.program("ar")), "CMAKE_RANLIB": str(self.program("ranlib"))}
        # The module's own code is one unit already, and Zig would make its C++ library anew for it.
        found["CMAKE_INTERPROCEDURAL_OPTIMIZATION"] = "OFF"
        found["CMAKE_FIND_USE_CMAKE_SYSTEM_PATH"] = "OFF"
        for folder, library in LIBRARIES.items():
            found[f"CMAKE_DISABLE_FIND_PACKAGE_{library}"] = "ON"
            source = Path("/usr/include") / folder
            if source.exists():
                self.link(headers / folder, source)
                found[f"{library}_INCLUDE_DIR"] = str(headers)
        return found

    def python_headers(self, interpreter: Interpreter) -> dict[str, str]:
        """Debian's pyconfig.h includes another by a path in /usr/include. The flag is the same for all, so that what
        knows of no Python is compiled once."""
        folder = f"x86_64-linux-gnu/python{interpreter.version}"
        headers = self.folder / "python-headers"
        if interpreter.headers == f"/usr/include/python{interpreter.version}" and Path("/usr/include", folder).exists():
            self.link(headers / folder, Path("/usr/include", folder))
        return {"CXXFLAGS": f"-isystem {headers}"}

    @staticmethod
    def link(link: Path, target: Path) -> None:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
