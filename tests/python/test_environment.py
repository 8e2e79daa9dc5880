"""What the package says where something around it is missing or wrong; each in a process of its own."""

import os

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
    fails(CALL, "ValueError", "q is on device cpu", "CUDA", "FLASH_ATTN_JIT_INTERPRET=1", FLASH_ATTN_JIT_INTERPRET=None)


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


def test_without_torch():
    fails("import sys; sys.modules['torch'] = None; import flash_attn_jit", "ImportError", "pip install torch")


def test_old_torch():
    code = "import sys, types; old = types.ModuleType('torch'); old.__version__ = '2.3.1+cu121'; sys.modules['torch'] = old\n"
    fails(code + "import flash_attn_jit", "ImportError", "2.4 or newer", "2.3.1+cu121", "pip install --upgrade torch")


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems(platform):
    fails(f"import sys; sys.platform = {platform!r}; import flash_attn_jit", "ImportError: flash_attn_jit is for Linux.")


def test_a_host_compiler_that_is_not_there(tmp_path):
    error = fails(CALL, "FLASH_ATTN_JIT_CXX", FLASH_ATTN_JIT_CXX=tmp_path / "no-such-compiler",
                  FLASH_ATTN_JIT_CACHE_DIR=tmp_path / "cache")
    assert "no-such-compiler" in error


def test_templates_that_do_not_compile(tmp_path):
    import subprocess
    import sys

    broken = tmp_path / "templates"
    broken.mkdir()
    code = (
        "import sys; from flash_attn_jit import _core\n"
        "try:\n    _core.process_library().find_or_compile(_core.select_forward_kernels([64], [False], [1], 'sm_75')[0], 'sm_75')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "FLASH_ATTN_JIT_TEMPLATES": str(broken)})
    assert "FLASH_ATTN_JIT_TEMPLATES" in done.stdout + done.stderr or "flash_fwd.cuh" in done.stdout + done.stderr
