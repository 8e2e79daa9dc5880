"""`python -m flash_attn_jit`: what there is to run and the environment, whatever is missing or broken around it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment, run_python

import flash_attn_jit
from flash_attn_jit import _environment_report as report

PACKAGE = Path(flash_attn_jit.__file__).parent
MODULE = ("-m", "flash_attn_jit")


def run(*arguments, cwd, **changes):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(tmp_path, **changes):
    """The report as JSON; the text must come out of it too."""
    found = json.loads(run(*MODULE, "--json", cwd=tmp_path, **changes))
    assert "For a bug report:" in report.text(found)
    return found


def test_report(tmp_path):
    import torch

    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "one.kernel").write_bytes(b"x" * 1000)
    (cache / "two.kernel").write_bytes(b"x" * 24)
    found = told(tmp_path, FLASH_ATTN_JIT_CACHE_DIR=cache, FLASH_ATTN_JIT_TARGET="compute_75")
    assert found["package"]["version"] == flash_attn_jit.__version__ and found["package"]["import_error"] is None
    assert Path(found["package"]["program"]).name == "flash-attn-jit"
    assert found["python"]["version"] == sys.version.split()[0]
    assert found["torch"]["version"] == torch.__version__ and found["torch"]["error"] is None
    assert found["cache"] == {"folder": str(cache), "files": 2, "bytes": 1024, "error": None}
    assert found["variables"]["FLASH_ATTN_JIT_TARGET"] == "compute_75"
    assert found["nvrtc"]["found"] and found["driver"]["found"] in (False, True)
    assert re.search(r"glibc \d", found["system"]["libc"]) and found["system"]["os"]
    assert found["configuration_error"] is None and found["compiled_module_error"] is None
    assert found["offline"] is False


def test_text(tmp_path):
    text = run(*MODULE, cwd=tmp_path, FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "none")
    for line in (
        "  python -m flash_attn_jit.bench ",
        "  python -m flash_attn_jit.demo ",
        "  import flash_attn_jit: works",
        f"  cache: {tmp_path / 'none'}, not there yet",
        f"  variable: FLASH_ATTN_JIT_CACHE_DIR={tmp_path / 'none'}",
        "  NVRTC for packs: /",
    ):
        assert line in text, text
    assert not (tmp_path / "none").exists(), "a report makes nothing"


def test_a_bundled_pack_and_offline(tmp_path):
    copy = tmp_path / "flash_attn_jit"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "bundled_pack.zip"))
    assert told(tmp_path)["bundled_pack"] is None
    (copy / "bundled_pack.zip").write_bytes(b"x" * 2**20)
    found = told(tmp_path, FLASH_ATTN_JIT_OFFLINE=1)
    assert found["bundled_pack"] == {"path": str(copy / "bundled_pack.zip"), "bytes": 2**20, "error": None}
    assert found["offline"] is True
    text = report.text(found)
    assert f"  bundled pack: {copy / 'bundled_pack.zip'}, 1.0 MiB\n" in text
    assert "  offline: no kernel is compiled for a GPU\n" in text


def test_every_module_that_can_be_run_is_listed():
    runnable = {"flash_attn_jit"}
    for path in PACKAGE.rglob("*.py"):
        is_private = path.name.startswith("_") and path.name != "__main__.py"
        if not is_private and 'if __name__ == "__main__"' in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            runnable.add(".".join(parts).removesuffix(".__main__"))
    listed = {command.split()[2] for command in report.TO_RUN if command.startswith("python -m ")}
    assert listed == runnable


def fake_torch(tmp_path, source):
    folder = tmp_path / "fake"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(source)
    return folder


@pytest.mark.parametrize(
    "source, words",
    [
        ('raise OSError("libcudart.so.12: cannot open shared object file")', "libcudart.so.12"),
        ('raise RuntimeError("half installed")', "half installed"),
        ('__version__ = "2.3.1+cu121"', "2.4 or newer; this is 2.3.1+cu121"),
        ("", "AttributeError"),  # an empty folder of that name: no version at all
    ],
)
def test_a_torch_that_is_too_old_or_broken(source, words, tmp_path):
    found = told(tmp_path, PYTHONPATH=fake_torch(tmp_path, source))
    assert words in found["package"]["import_error"]
    assert source == "" or words in str(found["torch"]["error"]) or "2.3.1" in found["torch"]["version"]
    assert found["nvrtc"]["found"] is not None and found["cache"]["folder"]


def test_a_package_that_breaks_half_way(tmp_path):
    """Whatever its import does is done, to its end."""
    copy = tmp_path / "flash_attn_jit"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "__init__.py", "a") as init:
        init.write("\nraise AttributeError('the very last line')\n")
    assert told(tmp_path)["package"]["import_error"] == "AttributeError: the very last line"


def test_nothing_but_the_package(tmp_path):
    """No site-packages: no torch, no metadata."""
    (tmp_path / "flash_attn_jit").symlink_to(PACKAGE)
    text = run("-S", *MODULE, cwd=tmp_path)
    assert "flash-attn-jit: of unknown version" in text
    assert "import flash_attn_jit: ImportError: flash_attn_jit needs PyTorch 2.4 or newer: pip install torch" in text
    assert "torch: not installed" in text and "cache: /" in text


def test_without_the_compiled_module(tmp_path):
    copy = tmp_path / "flash_attn_jit"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_core*.so", "__pycache__"))
    found = told(tmp_path)
    assert found["package"]["folder"] == str(copy)
    assert "_core" in found["compiled_module_error"] and "no compiled module" in found["package"]["import_error"]
    assert found["gpus"] is None and found["torch"]["error"] is None


@pytest.mark.parametrize(
    "variable, value",
    [
        ("FLASH_ATTN_JIT_INTERPRET", "maybe"),
        ("FLASH_ATTN_JIT_TARGET", "sm_75"),
        ("FLASH_ATTN_JIT_OFFLINE", "yes"),
        ("FLASH_ATTN_JIT_CACHE_MAX_BYTES", "lots"),
        ("FLASH_ATTN_JIT_NVRTC", "/no/such/libnvrtc.so"),
    ],
)
def test_a_bad_variable_is_told(variable, value, tmp_path):
    found = told(tmp_path, **{variable: value})
    assert variable in found["configuration_error"] and value in found["configuration_error"]
    assert found["variables"][variable] == value
    assert found["package"]["import_error"] is None and found["driver"]["found"] in (False, True)
    assert found["nvrtc"] is None and found["cache"] is None


def test_other_packages_are_named_and_not_imported(tmp_path):
    site = tmp_path / "site"
    for name, version in (("flash_attn", "2.8.3"), ("xformers", "0.0.35")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise SystemExit('imported')")
        metadata = site / f"{name}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    found = told(tmp_path, PYTHONPATH=site)
    assert found["packages"]["flash-attn"] == "2.8.3" and found["packages"]["xformers"] == "0.0.35"


def test_torch_is_asked_nothing_of_cuda():
    done = run_python(
        "import torch\n"
        "def refuse(*arguments): raise AssertionError('torch.cuda was asked')\n"
        "for name in ('init', '_lazy_init', 'is_available', 'device_count', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "from flash_attn_jit import _environment_report as report\n"
        "print(report.text(report.collect()))"
    )
    assert done.returncode == 0, done.stderr
    assert "torch.cuda was asked" not in done.stdout and "import flash_attn_jit: works" in done.stdout


def test_a_variable_of_bytes_that_are_no_text(tmp_path):
    for arguments in (MODULE, (*MODULE, "--json")):
        out = run(*arguments, cwd=tmp_path, FLASH_ATTN_JIT_CXX="g++-\udcff", PYTHONIOENCODING="ascii")
        assert "g++-" in out and out.isascii()


@pytest.mark.parametrize(
    "arguments",
    [
        ("-mflash_attn_jit",),
        ("-Bm", "flash_attn_jit"),
        ("-m", "flash_attn_jit.__main__"),
        ("-W", "error", *MODULE),
    ],
    ids=str,
)
def test_however_it_is_asked_for(arguments, tmp_path):
    without_torch = fake_torch(tmp_path, "raise ImportError('no torch')")
    for more in ((), ("--json",)):
        assert "no torch" in run(*arguments, *more, cwd=tmp_path, PYTHONPATH=without_torch)


@pytest.mark.parametrize(
    "arguments", [("-m", "flash_attn_jit.demo"), ("-c", "import flash_attn_jit", "-m", "flash_attn_jit")]
)
def test_others_fail_where_torch_does(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment(PYTHONPATH=fake_torch(tmp_path, "raise ImportError('no torch')")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "ImportError: no torch" in done.stderr and not done.stdout


def test_an_argument_that_is_not_known(tmp_path):
    done = subprocess.run(
        [sys.executable, *MODULE, "--jsn"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and "--jsn" in done.stderr


def test_a_gpu_and_its_driver_in_the_text(monkeypatch):
    monkeypatch.setattr(report, "_kernel_module", lambda: "535.104.05")
    machine = {
        "driver": {"found": True, "path": "/lib/libcuda.so.1", "cuda_version": "12.2"},
        "devices": [
            {"ordinal": 0, "name": "Tesla T4", "arch": "sm_75", "multiprocessors": 40, "supported": True},
            {"ordinal": 1, "name": "Tesla P4", "arch": "sm_61", "multiprocessors": 20, "supported": False},
        ],
        "nvrtc": {"found": [], "used_for": {"packs": None}, "searched": [{}, {}]},
        "cache": None,
    }
    monkeypatch.setattr(report, "_machine", lambda: machine)
    text = report.text(report.collect())
    for line in (
        "CUDA driver: 12.2, /lib/libcuda.so.1, kernel module 535.104.05",
        "GPU 0: Tesla T4, sm_75, 40 multiprocessors\n",
        "GPU 1: Tesla P4, sm_61, 20 multiprocessors, not supported\n",
        "NVRTC: none found. Looked in 2 places",
        "NVRTC for packs: none",
        "cache: none, kernels stay in memory",
    ):
        assert line in text, text


@pytest.mark.parametrize(
    "line, version",
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("something else", None),
    ],
)
def test_version_of_the_kernel_module(line, version, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, errors: line)
    assert report._kernel_module() == version
