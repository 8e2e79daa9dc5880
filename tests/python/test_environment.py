"""What the package says where something around it is missing or wrong; each in a process of its own."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_python

CALL = """
import torch, flash_attn_jit
q = torch.randn(1, 8, 1, 64).half()
flash_attn_jit.flash_attn_func(q, q, q)
"""


def fails(code, *words, **changes):
    done = run_python(code, **changes)
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last_line, done.stderr
    return done.stderr


def test_cpu_tensors_without_the_interpreter():
    fails(
        CALL,
        "ValueError",
        "q is on device cpu",
        "CUDA",
        "FLASH_ATTN_JIT_INTERPRET=1",
        FLASH_ATTN_JIT_INTERPRET=None,
    )


@pytest.mark.parametrize(
    "variable, value",
    [
        ("FLASH_ATTN_JIT_INTERPRET", "maybe"),
        ("FLASH_ATTN_JIT_TARGET", "sm_75"),
        ("FLASH_ATTN_JIT_CACHE_MAX_BYTES", "lots"),
    ],
)
def test_bad_value(variable, value):
    fails(CALL, "flash_attn_jit.errors.ConfigError", variable, value, **{variable: value})


def test_importing_reads_no_variable():
    done = run_python("import flash_attn_jit", FLASH_ATTN_JIT_TARGET="nonsense")
    assert done.returncode == 0, done.stderr


def test_the_source_is_not_the_package():
    source = Path(__file__).parents[2] / "python"
    done = run_python(f"import sys; sys.path.insert(0, {str(source)!r}); import flash_attn_jit")
    assert done.returncode == 1
    assert f"flash_attn_jit in {source}/flash_attn_jit has no compiled module" in done.stderr
    assert "pip install ." in done.stderr


def test_without_torch():
    fails("import sys; sys.modules['torch'] = None; import flash_attn_jit", "ImportError", "pip install torch")


def test_old_torch():
    code = """
import sys, types
old = types.ModuleType("torch")
old.__version__ = "2.3.1+cu121"
sys.modules["torch"] = old
import flash_attn_jit
"""
    fails(
        code,
        "ImportError",
        "2.4 or newer",
        "2.3.1+cu121",
        "pip install --upgrade torch",
    )


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems(platform):
    fails(
        f"import sys; sys.platform = {platform!r}; import flash_attn_jit",
        "ImportError: flash_attn_jit is for Linux.",
    )


def test_a_host_compiler_that_is_not_there(tmp_path):
    error = fails(
        CALL,
        "FLASH_ATTN_JIT_CXX",
        FLASH_ATTN_JIT_CXX=tmp_path / "no-such-compiler",
        FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache",
    )
    assert "no-such-compiler" in error


CATCH_COMPILE_ERROR = """
import json, torch, flash_attn_jit
from flash_attn_jit import _core
def work_interpreted():
    q = torch.randn(1, 8, 1, 64).half()
    flash_attn_jit.flash_attn_func(q, q, q)
def work_compiled():
    (spec, *_) = _core.select_kernels(["fwd"], [64], [False], [1], "sm_75")
    _core.process_library().find_or_compile(spec, "sm_75")
try:
    WORK()
except flash_attn_jit.CompileError as error:
    print(json.dumps([str(error), error.log, error.options, error.source_path]))
"""


@pytest.mark.parametrize("work", ["work_interpreted", "work_compiled"])
def test_a_template_that_does_not_compile(work, tmp_path):
    templates = tmp_path / "templates"
    shutil.copytree(Path(__file__).parents[2] / "templates", templates)
    with open(templates / "sequence.cuh", "a") as sequence:
        sequence.write("\nthis is no C++\n")
    cache = tmp_path / "cache"
    done = run_python(
        CATCH_COMPILE_ERROR.replace("WORK", work),
        FLASH_ATTN_JIT_TEMPLATES=templates,
        FLASH_ATTN_JIT_CACHE_DIR=cache,
    )
    assert done.returncode == 0, done.stderr
    message, log, options, source_path = json.loads(done.stdout)
    assert "sequence.cuh" in log and options and log in message
    assert source_path in message and "this is no C++" in Path(source_path).read_text()
    assert not list(cache.glob("*.kernel"))
