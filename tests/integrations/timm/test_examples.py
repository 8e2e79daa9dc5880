"""The scripts of examples/ that need timm."""

from example_scripts import run_example


def test_timm_vit(capsys):
    run_example("timm_vit.py")
    assert "sdpa: 2 calls ran in flash_attn_jit, 0 in PyTorch" in capsys.readouterr().out
