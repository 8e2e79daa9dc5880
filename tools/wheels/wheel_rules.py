"""What a wheel must be to be given to users."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wheel_facts import Binary, Wheel

PLATFORM = "manylinux_2_28_x86_64"
GLIBC = (2, 28)
# The C library alone: the C++ run-time library is linked in, and CUDA's and torch's are opened where they are found.
ALLOWED = {"ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1"}
# What glibc itself has of the C++ ABI.
OF_GLIBC = {"__cxa_atexit", "__cxa_finalize", "__cxa_thread_atexit_impl"}
PACK = "flash_attn_jit/bundled_pack.zip"


def of_cpp_library(symbol: str) -> bool:
    return symbol.startswith(("_Z", "__cxa_", "_Unwind_", "__gxx_")) and symbol not in OF_GLIBC


def binary_problems(binary: Binary) -> Iterator[str]:
    if binary.machine != "EM_X86_64":
        yield f"it is for {binary.machine}; accepted: EM_X86_64"
    if strange := binary.needed - ALLOWED:
        yield f"it links {', '.join(sorted(strange))}; accepted: {', '.join(sorted(ALLOWED))}"
    if binary.search_paths:
        yield f"it has library paths of its own: {', '.join(sorted(binary.search_paths))}"
    if newer := [version for version in binary.glibc if version > GLIBC]:
        yield f"it asks for glibc {'.'.join(map(str, max(newer)))}; accepted: up to {'.'.join(map(str, GLIBC))}"
    if foreign := sorted(filter(of_cpp_library, binary.imported)):
        yield f"it takes names of the C++ library from elsewhere: {', '.join(foreign[:5])}"
    accepted = {"PyInit__core"} if binary.name.endswith(".so") else set()
    if binary.exported != accepted:
        named = ", ".join(sorted(binary.exported)[:5]) or "nothing"
        yield f"it exports {named}; accepted: {', '.join(accepted) or 'nothing'}"


def problems(wheel: Wheel, version: str, python: str, package_files: set[str]) -> list[str]:
    """What is wrong with the wheel of `version` for Python `python` ("3.11") that has to hold `package_files`."""
    interpreter = "cp" + python.replace(".", "")
    tag = f"{interpreter}-{interpreter}-{PLATFORM}"
    found = []
    if wheel.file_name != (wanted := f"flash_attn_jit-{version}-{tag}.whl"):
        found.append(f"its name is {wheel.file_name}; accepted: {wanted}")
    if wheel.tags != {tag}:
        found.append(f"its tags are {', '.join(sorted(wheel.tags))}; accepted: {tag}")
    if missing := sorted(package_files - wheel.files):
        found.append(f"it lacks {', '.join(missing)}")
    if (PACK in wheel.files) != ("+" in version):
        found.append(f"{PACK} is {'in it' if PACK in wheel.files else 'missing'}, and its version is {version}")
    binaries = {re.sub(r"\.cpython-.*", "", binary.name.rsplit("/", 1)[-1]) for binary in wheel.binaries}
    if binaries != {"_core", "flash-attn-jit"}:
        found.append(f"its binaries are {', '.join(sorted(binaries)) or 'none'}; accepted: _core, flash-attn-jit")
    for binary in wheel.binaries:
        found.extend(f"{binary.name}: {problem}" for problem in binary_problems(binary))
    return found
