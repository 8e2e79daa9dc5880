"""The scripts of examples/ that need xformers."""

from example_scripts import run_example

from flash_attn_jit.integrations import xformers


def test_xformers_attention(capsys):
    xformers.calls.reset()
    run_example("xformers_attention.py")
    assert "xformers: 1 calls ran in flash_attn_jit, 0 in xformers" in capsys.readouterr().out
