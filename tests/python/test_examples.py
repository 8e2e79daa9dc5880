"""The scripts of examples/ that need nothing but torch; the others' tests are in tests/integrations."""

from conftest import needs_torch, run_python
from example_scripts import EXAMPLES


def run(name: str) -> str:
    done = run_python(f"import runpy; runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sdpa_process_wide():
    assert "sdpa: 1 calls ran in flash_attn_jit, 0 in PyTorch" in run("sdpa_process_wide.py")


def test_torch_varlen():
    needs_torch("2.11", "torch.nn.attention has a registry")
    assert "torch_attention: 1 calls ran in flash_attn_jit" in run("torch_varlen.py")


def test_flash_attn_by_name():
    assert "2.8.3 torch.Size([1, 32, 2, 64])" in run("flash_attn_by_name.py")
