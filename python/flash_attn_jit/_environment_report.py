"""``python -m flash_attn_jit``: what there is to run, and what a bug report must say of its environment.

It has to speak where torch, the driver or the package itself does not work, so everything it asks for may be missing,
and what fails is a line of the report. It starts no process, opens no network connection, makes no CUDA context and
imports none of the packages whose versions it tells, but torch.
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGE = "flash_attn_jit"
_PROGRAM = "flash-attn-jit"
TO_RUN = {
    "python -m flash_attn_jit [--json]": "this text",
    "python -m flash_attn_jit.bench": "speed, whole models, accuracy, memory and host cost beside PyTorch's attention",
    "python -m flash_attn_jit.demo": "builds a T4's kernels for some models, runs and checks them, on any machine",
    "python -m flash_attn_jit.report": "a page of what tuning tried and why the winners won; --demo without a GPU",
    "python -m flash_attn_jit.check": "is this GPU right, and how fast: one JSON to attach to an issue",
    _PROGRAM: "the program: devices, inspect, model, prebuild, pack, tune, report, cache",
}
# By their distributions' names: other attention kernels, then those who call them, then what brings NVRTC.
PACKAGES = (
    "flash-attn",
    "flash-attn-3",
    "xformers",
    "flashinfer-python",
    "sageattention",
    "spas-sage-attn",
    "triton",
    "kernels",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "trl",
    "unsloth",
    "deepspeed",
    "timm",
    "vllm",
    "sglang",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
)
_PREFIX = "FLASH_ATTN_JIT_"
_HIDES_GPUS = "CUDA_VISIBLE_DEVICES"


def is_asked_for() -> bool:
    """Whether Python was started as ``python -m flash_attn_jit``: while it looks for the module to run, and so while it
    imports the package for that, the first argument is "-m"."""
    if sys.argv[:1] != ["-m"]:
        return False
    module = sys.orig_argv[-len(sys.argv)]  # or with its flag: -mflash_attn_jit
    return re.fullmatch(rf"(-\w*m)?{_PACKAGE}(\.__main__)?", module) is not None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception as error:  # metadata that is there and cannot be read
        return _words(error)


def _import_error() -> str | None:
    """What stands in the way of ``import flash_attn_jit``."""
    package = sys.modules[_PACKAGE]
    if hasattr(package, "__all__"):
        return None  # it is imported to its end
    # Once more from its start, and now past the place where it asked for this report.
    sys.argv[0] = str(Path(__file__).with_name("__main__.py"))
    try:
        importlib.reload(package)
    except Exception as error:
        return _words(error)
    return None


def program_path() -> str | None:
    beside_python = Path(sysconfig.get_path("scripts")) / _PROGRAM
    return str(beside_python) if beside_python.exists() else shutil.which(_PROGRAM)


def _package() -> dict[str, Any]:
    return {
        "version": _version_of("flash-attn-jit"),
        "folder": str(Path(__file__).parent),
        "import_error": _import_error(),
        "program": program_path(),
    }


def _system() -> dict[str, Any]:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = "Linux"
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):  # a C library that is not glibc
        libc = None
    return {"os": name, "kernel": platform.release(), "machine": platform.machine(), "libc": libc}


def _torch() -> dict[str, Any]:
    found: dict[str, Any] = {"installed": _version_of("torch"), "version": None, "cuda": None, "file": None}
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return {**found, "error": _words(error)}
    found["version"] = str(getattr(torch, "__version__", None))
    found["cuda"] = getattr(getattr(torch, "version", None), "cuda", None)
    found["file"] = getattr(torch, "__file__", None)
    return {**found, "error": None}


def _kernel_module() -> str | None:
    """The version of the driver's kernel module, such as 535.104.05, which is what NVIDIA's driver packages are named
    after."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found.group(1) if found else None


def _machine() -> dict[str, Any]:
    """Of the compiled module: driver, GPUs, NVRTC, the cache's folder, the bundled pack, or why none is known."""
    try:
        core = importlib.import_module(f"{_PACKAGE}._core")
        core.set_python_search_path([folder for folder in sys.path if folder])
        machine: dict[str, Any] = json.loads(core.machine_report_json())
    except Exception as error:
        return {"error": _words(error)}
    return machine


@functools.cache
def nvrtc_for_packs() -> str | None:
    """The path of the NVRTC that packs are built with here; None where there is none."""
    found: str | None = (_machine().get("nvrtc") or {}).get("used_for", {}).get("packs")
    return found


def cache_folder() -> Path | None:
    """None where kernels stay in memory. Raises RuntimeError where it is not known."""
    machine = _machine()
    if reason := machine.get("error") or machine.get("configuration_error"):
        raise RuntimeError(reason)
    return Path(machine["cache"]) if machine.get("cache") else None


def _cache(folder: str | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    found: dict[str, Any] = {"folder": folder, "files": 0, "bytes": 0, "error": None}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    found["files"] += 1
                    found["bytes"] += entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        found["error"] = "not there yet"
    except OSError as error:
        found["error"] = _words(error)
    return found


def _bundled_pack(path: str | None) -> dict[str, Any] | None:
    """The pack that was installed with the package."""
    if path is None:
        return None
    try:
        return {"path": path, "bytes": os.stat(path).st_size, "error": None}
    except OSError as error:
        return {"path": path, "bytes": None, "error": _words(error)}


def collect() -> dict[str, Any]:
    package, torch = _package(), _torch()
    machine = _machine()
    return {
        "run": TO_RUN,
        "package": package,
        "python": {"version": sys.version.split()[0], "executable": sys.executable},
        "system": _system(),
        "torch": torch,
        "compiled_module_error": machine.get("error"),
        "configuration_error": machine.get("configuration_error"),
        "driver": {**machine.get("driver", {}), "kernel_module": _kernel_module()},
        "gpus": machine.get("devices"),
        "nvrtc": machine.get("nvrtc"),
        "cache": _cache(machine.get("cache")),
        "bundled_pack": _bundled_pack(machine.get("bundled_pack")),
        "offline": machine.get("offline"),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIX) or name == _HIDES_GPUS
        },
        "packages": {name: version for name in PACKAGES if (version := _version_of(name))},
    }


def _torch_lines(torch: dict[str, Any]) -> list[str]:
    if torch["error"]:
        state = f"{torch['installed']}, which cannot be imported" if torch["installed"] else "not installed"
        return [f"torch: {state} ({torch['error']})"]
    return [f"torch: {torch['version']}, CUDA {torch['cuda'] or 'none'}, {torch['file']}"]


def _driver_lines(report: dict[str, Any]) -> list[str]:
    driver, gpus = report["driver"], report["gpus"]
    module = f", kernel module {driver['kernel_module']}" if driver["kernel_module"] else ""
    if gpus is None:
        return [f"CUDA driver: unknown{module}"]
    if not driver["found"]:
        return [f"CUDA driver: none ({driver['reason']}){module}"]
    lines = [f"CUDA driver: {driver['cuda_version']}, {driver['path']}{module}"]
    for gpu in gpus:
        supported = "" if gpu["supported"] else ", not supported"
        lines.append(
            f"GPU {gpu['ordinal']}: {gpu['name']}, {gpu['arch']}, {gpu['multiprocessors']} multiprocessors{supported}"
        )
    return lines if gpus else [*lines, "GPUs: none"]


def _nvrtc_lines(nvrtc: dict[str, Any] | None) -> list[str]:
    if nvrtc is None:
        return ["NVRTC: not looked for"]
    lines = [
        f"NVRTC: {found['version'] or 'unknown version'}, {found['path']} ({found['place']})"
        for found in nvrtc["found"]
    ] or [f"NVRTC: none found. Looked in {len(nvrtc['searched'])} places: {_PROGRAM} devices lists them."]
    return lines + [f"NVRTC for {use}: {path or 'none'}" for use, path in nvrtc["used_for"].items()]


def _cache_lines(report: dict[str, Any]) -> list[str]:
    cache = report["cache"]
    if cache is None:
        is_known = not (report["configuration_error"] or report["compiled_module_error"])
        return ["cache: none, kernels stay in memory" if is_known else "cache: unknown"]
    size = cache["error"] or f"{cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB"
    return [f"cache: {cache['folder']}, {size}"]


def _pack_lines(report: dict[str, Any]) -> list[str]:
    bundled = report["bundled_pack"]
    size = bundled and (bundled["error"] or f"{bundled['bytes'] / 2**20:.1f} MiB")
    lines = [f"bundled pack: {bundled['path']}, {size}" if bundled else "bundled pack: none"]
    return [*lines, "offline: no kernel is compiled for a GPU"] if report["offline"] else lines


def text(report: dict[str, Any]) -> str:
    package, python, system = report["package"], report["python"], report["system"]
    width = max(len(command) for command in report["run"])
    commands = [f"  {command.ljust(width)}   {what}" for command, what in report["run"].items()]
    lines = [
        f"flash-attn-jit: {package['version'] or 'of unknown version (no metadata)'}, {package['folder']}",
        f"import flash_attn_jit: {package['import_error'] or 'works'}",
        f"program: {package['program'] or 'not found'}",
    ]
    lines += [
        f"{what.replace('_', ' ')}: {report[what]}"
        for what in ("compiled_module_error", "configuration_error")
        if report[what]
    ]
    lines += [
        f"Python: {python['version']}, {python['executable']}",
        f"system: {system['os']}, {system['libc'] or 'no glibc'}, {system['machine']}, Linux {system['kernel']}",
    ]
    lines += _torch_lines(report["torch"]) + _driver_lines(report) + _nvrtc_lines(report["nvrtc"])
    lines += _cache_lines(report) + _pack_lines(report)
    lines += [f"variable: {name}={value}" for name, value in report["variables"].items()] or ["variables: none"]
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    lines.append(f"other packages: {packages or 'none'}")
    return "\n".join(
        ["To run (--help tells more):", *commands, "", "For a bug report:", *(f"  {line}" for line in lines)]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_PACKAGE}",
        description="Prints what there is to run, and a report of the environment for bug reports. Nothing is timed, "
        "downloaded or started, and it works where torch or the driver does not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    report = collect()
    # A path or a variable may hold bytes that are not UTF-8, and a terminal may know fewer letters.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    print(json.dumps(report, indent=1) if options.json else text(report))
