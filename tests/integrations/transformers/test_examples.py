"""The scripts of examples/ that need transformers."""

from example_scripts import run_example

from flash_attn_jit.integrations import transformers


def test_transformers_generate(capsys):
    transformers.calls.reset()
    run_example("transformers_generate.py")
    assert "transformers: 8 calls ran in flash_attn_jit, 0 in " in capsys.readouterr().out


def test_peft_finetune(capsys):
    transformers.calls.reset()
    run_example("peft_finetune.py")
    assert "transformers: 8 calls ran in flash_attn_jit, 0 in " in capsys.readouterr().out


def test_end_to_end(capsys):
    run_example("end_to_end.py", "--small", "--rounds", "1", "--models", "llama-train,llama-generate,vit")
    assert "100% of tokens the same" in capsys.readouterr().out
