"""The notebook of examples/ from top to bottom, in the interpreter."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[3] / "examples" / "flash_attention_on_a_t4.ipynb"


@pytest.mark.sample
def test_it_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # Jupyter and matplotlib write there
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    copy = Path(shutil.copy(NOTEBOOK, tmp_path))
    notebook = nbformat.read(copy, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "largest difference from float64" in text
    assert "transformers: " in text and "diffusers: " in text
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == 5  # speed, loss, and three of the report


def _install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """What the first cell has pip install in that folder, where there is no flash_attn_jit."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    commands: list[list[str]] = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.delenv("FLASH_ATTN_JIT_PREBUILT", raising=False)
    exec(cell.source, {})
    return [command[-1] for command in commands]


def test_the_wheel_with_kernels_is_taken_where_there_is_one(tmp_path, monkeypatch):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    with pytest.raises(SystemExit, match="make wheels"):
        _install(monkeypatch, tmp_path)
    plain = f"flash_attn_jit-0.1.0-{tag}-{tag}-manylinux_2_28_x86_64.whl"
    for name in (plain, "flash_attn_jit-0.1.0-cp39-cp39-manylinux_2_28_x86_64.whl"):
        (tmp_path / name).touch()
    assert _install(monkeypatch, tmp_path) == [f"./{plain}"]
    with_kernels = plain.replace("0.1.0", "0.1.0+sm75")
    (tmp_path / with_kernels).touch()
    (tmp_path / "sm_75.zip").touch()
    assert _install(monkeypatch, tmp_path) == [f"./{with_kernels}"]
    assert os.environ["FLASH_ATTN_JIT_PREBUILT"] == str(tmp_path / "sm_75.zip")


def test_it_is_committed_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None, cell["id"]
