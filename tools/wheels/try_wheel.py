"""Runs what is installed beside this Python, as a user would first; fails where anything is wrong.

usage: try_wheel.py with-torch|without-torch

With torch a call and its backward pass are interpreted, so the host's C++ compiler makes kernels, and the compiled
module loads them. Without, the compiled module is loaded by itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SITE = Path(sysconfig.get_path("platlib"))
PROGRAM = Path(sysconfig.get_path("scripts")) / "flash-attn-jit"


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


def message_of(error: type[BaseException], call: object, *arguments: object) -> str:
    assert callable(call)
    try:
        call(*arguments)
    except error as raised:
        assert type(raised) is error, type(raised)
        return str(raised)
    raise AssertionError(f"{call} raised nothing")


def try_program() -> None:
    devices = run_program("devices")
    version = importlib.metadata.version("flash-attn-jit").partition("+")[0]
    assert devices.returncode == 0 and f"flash-attn-jit {version}\n" in devices.stdout, devices
    source = run_program("inspect", "--kind", "fwd", "--head-dim", "64", "--emit", "source")
    assert source.returncode == 0 and "__global__" in source.stdout, source
    refused = run_program("inspect", "--kind", "fwd", "--head-dim", "300", "--emit", "spec")
    assert refused.returncode == 2 and "accepted: a whole number from 1 to 256" in refused.stderr, refused


def try_pack() -> None:
    pack = SITE / "flash_attn_jit" / "bundled_pack.zip"
    assert pack.exists() == ("+" in importlib.metadata.version("flash-attn-jit"))
    if pack.exists():
        verified = run_program("pack", "verify", str(pack))
        assert verified.returncode == 0, verified


def try_module_errors(core: ModuleType) -> None:
    text = message_of(ValueError, core.select_kernels, ["none"], [64], [False], [1], "sm_75")
    assert "kind is 'none'; accepted: fwd" in text, text
    text = message_of(RuntimeError, core.write_manifest, "/proc/no/such/folder")
    assert "/proc/no/such/folder" in text, text


def try_module_alone() -> None:
    (file,) = (SITE / "flash_attn_jit").glob("_core.*.so")
    spec = spec_from_file_location("_core", file, loader=ExtensionFileLoader("_core", str(file)))
    assert spec is not None and spec.loader is not None
    core = module_from_spec(spec)
    spec.loader.exec_module(core)
    assert core.select_kernels(["fwd"], [64], [True], [1], "sm_75")
    try_module_errors(core)


def try_package() -> None:
    os.environ["FLASH_ATTN_JIT_INTERPRET"] = "1"
    import torch

    import flash_attn_jit
    from flash_attn_jit import _core

    assert SITE in Path(flash_attn_jit.__file__).parents, flash_attn_jit.__file__
    try_module_errors(_core)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 16, 2, 32).half() for _ in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = flash_attn_jit.flash_attn_func(leaves[0], leaves[1], leaves[2], causal=True)
    assert isinstance(out, torch.Tensor)
    gradients = torch.autograd.grad(out, leaves, dout)
    exact = [tensor.double().transpose(1, 2).requires_grad_() for tensor in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=True)
    expected_gradients = torch.autograd.grad(expected, exact, dout.double().transpose(1, 2))
    for got, wanted in zip((out, *gradients), (expected, *expected_gradients)):
        torch.testing.assert_close(got.double(), wanted.transpose(1, 2), atol=4e-3, rtol=4e-3)

    wrong = torch.zeros(1, 16, 2, 300).half()
    refused = message_of(flash_attn_jit.UnsupportedError, flash_attn_jit.flash_attn_func, wrong, wrong, wrong)
    assert "head_dim is 300" in refused, refused
    refused = message_of(ValueError, flash_attn_jit.flash_attn_func, q[0], k, v)
    assert refused.startswith("q has 3 dimensions"), refused


def main(mode: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FLASH_ATTN_JIT_CACHE_DIR"] = cache
        try_program()
        try_pack()
        {"with-torch": try_package, "without-torch": try_module_alone}[mode]()


if __name__ == "__main__":
    if sys.argv[1:] not in (["with-torch"], ["without-torch"]):
        raise SystemExit(__doc__)
    main(sys.argv[1])
