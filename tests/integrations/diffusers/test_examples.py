"""The scripts of examples/ that need diffusers."""

from example_scripts import run_example

from flash_attn_jit.integrations import diffusers


def test_diffusers_images(capsys):
    diffusers.calls.reset()
    run_example("diffusers_images.py")
    assert "diffusers: 10 calls ran in flash_attn_jit, 0 in PyTorch" in capsys.readouterr().out


def test_end_to_end(capsys):
    run_example("end_to_end.py", "--small", "--rounds", "1", "--models", "unet")
    assert "unet" in (text := capsys.readouterr().out) and " of 1.3" in text
