"""Builds the wheels for CPython 3.10 to 3.14 on x86_64 (manylinux_2_28), checks each and runs it.

The compiler is Zig's Clang, which is on PyPI and links for any version of glibc, so the machine's own does not matter.
Everything but the wheels stays in build-wheels/. A version of Python that this machine has not is named at the end:
there is no wheel for it.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from environments import HERE, NVRTC, WORK, Environment, requirements_of, run
from interpreters import WANTED, Interpreter, Search, describe, search
from toolchain import Toolchain
from wheel_rules import PLATFORM

ROOT = HERE.parents[1]


def version_of_source() -> str:
    found = re.search(r"project\(flash-attn-jit VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    return found[1]


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def build(toolchain: Toolchain, interpreter: Interpreter, pack: bool) -> Path:
    """The wheel as CMake makes it. One build folder serves all, so that only the module is compiled for each Python."""
    builder = Environment(
        f"python{interpreter.version}", interpreter.executable, requirements_of("scikit-build-core", "pybind11")
    )
    folder, raw = WORK / "cmake", WORK / "raw"
    # CMake asks anew about the Python; without its own file scikit-build-core does not see another's build and wipe it.
    for name in ("CMakeCache.txt", ".skbuild-info.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(raw, ignore_errors=True)
    environment = {**toolchain.environment(), **toolchain.python_headers(interpreter)}
    if pack:
        environment["FLASH_ATTN_JIT_BUNDLE"] = "sm_75"
    definitions = [f"-Ccmake.define.{name}={value}" for name, value in toolchain.definitions().items()]
    log = WORK / f"build-{interpreter.version}{'-pack' if pack else ''}.log"
    options = ["--no-deps", "--no-build-isolation", f"-Cbuild-dir={folder}", *definitions]
    builder.pip("wheel", "--verbose", *options, "--wheel-dir", raw, ROOT, env=environment, log=log)
    (wheel,) = raw.glob("*.whl")
    return wheel


def repair_and_check(toolchain: Toolchain, wheel: Path, interpreter: Interpreter, version: str, out: Path) -> Path:
    """The same with its platform's tag, which auditwheel gives where it finds it to be true."""
    repaired = WORK / "repaired"
    shutil.rmtree(repaired, ignore_errors=True)
    auditwheel: list[str | Path] = [
        toolchain.tools.folder / "bin" / "auditwheel",
        "repair",
        "--only-plat",
        "--plat",
        PLATFORM,
    ]
    log = WORK / f"auditwheel-{interpreter.version}.log"
    run(*auditwheel, "--wheel-dir", repaired, wheel, env=toolchain.environment(), log=log)
    (made,) = repaired.glob("*.whl")
    run(toolchain.tools.python, HERE / "check_wheel.py", made, version, interpreter.version)
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(made, out / made.name))


def try_out(wheel: Path, interpreter: Interpreter, torch: dict[str, str]) -> str:
    """Runs it in an environment of its own, with another's torch where there is one of this Python."""
    shutil.rmtree(WORK / "try", ignore_errors=True)
    environment = Environment("try", interpreter.executable, [str(wheel), "--no-deps"])
    site = torch.get(interpreter.version)
    if site is not None:
        (library,) = environment.folder.glob("lib/python3.*/site-packages")
        (library / "torch_of_another_environment.pth").write_text(site + "\n")
    mode = "without-torch" if site is None else "with-torch"
    run(environment.python, HERE / "try_wheel.py", mode)
    return mode.replace("-", " ")


def torch_folders(commands: list[str]) -> dict[str, str]:
    """Python's version -> site-packages that have torch."""
    code = "import sysconfig, torch; print(sysconfig.get_path('purelib'))"
    found = {}
    for command in commands:
        told = describe(command)
        done = subprocess.run([command, "-c", code], capture_output=True, text=True, check=False)
        if not isinstance(told, Interpreter) or done.returncode != 0:
            raise SystemExit(f"--torch {command}: this Python has no torch; accepted: one that imports it")
        found[told.version] = done.stdout.strip()
    return found


def build_all(interpreters: Search, packs: list[bool], torch: dict[str, str], out: Path) -> list[str]:
    """A line about each wheel."""
    tools = Environment("tools", sys.executable, [*requirements_of(), *([NVRTC] if any(packs) else [])])
    toolchain = Toolchain(tools)
    lines = []
    # A configuration without a pack removes what one with it has made, so those with it come one after the other.
    for pack, interpreter in itertools.product(packs, interpreters.found.values()):
        version = version_of_source() + ("+sm75" if pack else "")
        say(f"{version} for Python {interpreter.version} ({interpreter.executable})")
        start = time.monotonic()
        made = build(toolchain, interpreter, pack)
        wheel = repair_and_check(toolchain, made, interpreter, version, out)
        tried = try_out(wheel, interpreter, torch)
        megabytes, seconds = wheel.stat().st_size / 1e6, time.monotonic() - start
        lines.append(f"{wheel}: {megabytes:.1f} MB, {seconds:.0f} s, checked, ran {tried}")
    return lines


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="build for this interpreter; may be repeated")
    parser.add_argument("--only", action="append", choices=WANTED, help="of these versions of Python alone")
    parser.add_argument("--pack", choices=("no", "yes", "both"), default="no", help="with the kernels for sm_75")
    parser.add_argument("--torch", action="append", default=[], help="a Python that has torch, to run its wheel with")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels (default: dist)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    if platform.machine() != "x86_64":
        raise SystemExit(f"this machine is {platform.machine()}; wheels are made on x86_64. Elsewhere: pip install .")
    interpreters = search(options.python, options.only or WANTED)
    packs = {"no": [False], "yes": [True], "both": [False, True]}[options.pack]
    lines = build_all(interpreters, packs, torch_folders(options.torch), options.out)
    say("wheels")
    print("\n".join(lines) or "none")
    for version, reason in interpreters.lacking.items():
        print(f"no wheel for Python {version}: {reason}")
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
