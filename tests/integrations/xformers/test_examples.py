"""The scripts of examples/ that need xformers."""

from example_scripts import run_example


def test_xformers_attention(capsys):
    run_example("xformers_attention.py")
    assert "xformers: 1 calls ran in flash_attn_jit, 0 in xformers" in capsys.readouterr().out
