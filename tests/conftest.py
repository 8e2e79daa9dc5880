"""Set before flash_attn_jit reads its variables: CPU tensors are interpreted, the cache is the tests' own."""

import fcntl
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest

_folder = tempfile.TemporaryDirectory(prefix="flash-attn-jit-tests-")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the process that starts them
    # Sessions of tests one after the other may share theirs.
    _cache = os.environ.get("FLASH_ATTN_JIT_TEST_CACHE_DIR") or str(Path(_folder.name) / "cache")
    os.environ["FLASH_ATTN_JIT_CACHE_DIR"] = _cache
os.environ["FLASH_ATTN_JIT_INTERPRET"] = "1"
# What tests compute is small and workers share the cores: torch's other threads would wait for each other, busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _variable in ("FLASH_ATTN_JIT_PREBUILT", "FLASH_ATTN_JIT_TEMPLATES", "FLASH_ATTN_JIT_OFFLINE"):
    os.environ.pop(_variable, None)


def environment(**changes: Any) -> dict[str, str]:
    """This process's environment with some variables set, or unset where None."""
    values = {**os.environ, **{name: str(value) for name, value in changes.items() if value is not None}}
    return {name: value for name, value in values.items() if changes.get(name, "") is not None}


def hear_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_python(code: str, **changes: Any) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter runs `code`, outside of any folder that holds a package."""
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            preexec_fn=hear_ctrl_c,
            env=environment(**changes),
            cwd=_folder.name,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired as expired:  # its own text leaves out what was printed
        pytest.fail(f"{expired}\n{expired.stdout!r}\n{expired.stderr!r}")


def run_module(name: str, *arguments: Any, cwd: Path, **changes: Any) -> "subprocess.CompletedProcess[str]":
    """`python -m flash_attn_jit.NAME ...` in the folder `cwd`."""
    command = [sys.executable, "-m", f"flash_attn_jit.{name}", *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=900)


def program_path() -> Path:
    path = Path(sysconfig.get_path("scripts")) / "flash-attn-jit"
    assert path.exists(), f"the program is not installed at {path}"
    if path.read_bytes()[:2] == b"#!":
        pytest.skip("the program was left out of the build: CLI11 was missing")
    return path


def run_program(*arguments: Any, **changes: Any) -> "subprocess.CompletedProcess[bytes]":
    command = [str(program_path()), *(str(argument) for argument in arguments)]
    return subprocess.run(command, env=environment(**changes), cwd=_folder.name, capture_output=True, timeout=900)


# What follows skips the rest of a test that asks for more than the oldest torch, or what comes with it, can do.


def needs_torch(version: str, why: str) -> None:
    import torch

    if torch.__version__ < version:  # compared as a version
        pytest.skip(f"since torch {version} {why}")


def needs_enable_gqa() -> None:
    needs_torch("2.5", "scaled_dot_product_attention has enable_gqa")


def needs_traced_function_modes() -> None:
    needs_torch("2.6", "torch.compile traces function modes, and so the router")


def needs_nvrtc_of_the_tables() -> None:
    """Tiles are chosen, and their costs made, with newer ones than the 12.1 of torch 2.4."""
    version = importlib.metadata.version("nvidia-cuda-nvrtc-cu12")
    if tuple(map(int, version.split(".")[:2])) < (12, 8):
        pytest.skip(f"NVRTC {version} makes other code of the default tiles, some of which spills")


def find_nvrtc(major: int) -> Path:
    """libnvrtc of the Python package that the extra cu12 or cu13 brings."""
    folder = {12: "cuda_nvrtc", 13: "cu13"}[major]
    for site in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        library = Path(site) / "nvidia" / folder / "lib" / f"libnvrtc.so.{major}"
        if library.exists():
            return library
    pytest.fail(f"NVRTC {major} is not installed: pip install 'flash-attn-jit[cu{major}]'")


TESTS_ALL = os.environ.get("FLASH_ATTN_JIT_TEST_ALL") == "1"

# prebuild's default pack; `make test` is content with one of its group sizes.
GROUP_SIZES = [1, 2, 4, 8] if TESTS_ALL else [1]
DEFAULT_PACK = [
    *("--kinds", "fwd", "--head-dims", "64,128", "--causal", "both"),
    *("--gqa", ",".join(map(str, GROUP_SIZES))),
]


class Pack:
    """The default pack of sm_75, made by the program with one NVRTC."""

    def __init__(self, folder: Path, nvrtc: Path):
        self.folder, self.nvrtc = folder, nvrtc
        self.result = self.build()

    def build(self) -> dict[str, Any]:
        done = run_program(
            "prebuild",
            "--arch",
            "sm_75",
            *DEFAULT_PACK,
            "--out",
            self.folder,
            "--nvrtc",
            self.nvrtc,
            "--json",
        )
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    def kernels(self) -> list[dict[str, Any]]:
        """What the verified files say of themselves."""
        done = run_python(
            "import json, sys; from flash_attn_jit import _core\n"
            "library = _core.open_pack_for_writing(sys.argv[1])\n"
            f"specs = _core.select_kernels(['fwd'], [64, 128], [False, True], {GROUP_SIZES}, 'sm_75')\n"
            "print(json.dumps([library.find_or_compile(spec, 'sm_75') for spec in specs]))".replace(
                "sys.argv[1]", repr(str(self.folder))
            )
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def _pack(tmp_path_factory: pytest.TempPathFactory, major: int) -> Pack:
    """One for all workers: the first builds it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with open(shared / f"nvrtc{major}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Pack(shared / f"nvrtc{major}", find_nvrtc(major))


@pytest.fixture(scope="session")
def pack_12(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return _pack(tmp_path_factory, 12)


@pytest.fixture(scope="session")
def pack_13(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return _pack(tmp_path_factory, 13)
